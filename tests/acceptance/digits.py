"""The bundled vision transformer for handwritten digits, and images that it never saw."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from xopt.data.dataset import Dataset

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "digits"
MODEL = FOLDER / "digits_vit.onnx"
"""float32 [batch, 1, 8, 8] -> logits [batch, 10]."""


def splits() -> tuple[Dataset, Dataset]:
    """The images that the example trains on, and those that it never sees, with labels."""
    sys.path.insert(0, str(FOLDER))
    try:
        from train import digits
    finally:
        sys.path.remove(str(FOLDER))
    train, held_out = (Dataset({"pixel_values": part.images}, part.labels) for part in digits())
    return train, held_out


def held_out_images(count: int) -> np.ndarray:
    """float32 [count, 1, 8, 8] of the test split that the example trains without."""
    return np.ascontiguousarray(splits()[1].inputs["pixel_values"][:count])
