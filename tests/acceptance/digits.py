"""The bundled vision transformer for handwritten digits, and images that it never saw."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "digits"
MODEL = FOLDER / "digits_vit.onnx"
"""float32 [batch, 1, 8, 8] -> logits [batch, 10]."""


def held_out_images(count: int) -> np.ndarray:
    """float32 [count, 1, 8, 8] of the test split that the example trains without."""
    sys.path.insert(0, str(FOLDER))
    try:
        from train import digits
    finally:
        sys.path.remove(str(FOLDER))
    _, held_out = digits()
    return np.ascontiguousarray(held_out.images[:count])
