"""Train a small vision transformer on the handwritten digits that ship with scikit-learn, and export it to ONNX.

    python examples/digits/train.py                 # data and model, about a minute on two cores
    python examples/digits/train.py --data-only     # calibration.npz and test.npz alone, a second

Writes, beside this file unless ``--output`` names another folder, in which no file is written over:

    digits_vit.onnx    ViT of 4 blocks, 64 wide, 4 heads, 2x2 patches (16 tokens and a class token), dynamic batch
    calibration.npz    400 training images ``pixel_values`` float32 [400, 1, 8, 8], with their ``labels``
    test.npz           360 images that training never saw, with their ``labels``

The data is 1797 images of 8x8 pixels, 16 grey levels (UCI Optical Recognition of Handwritten Digits).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 0
TEST_IMAGES = 360
CALIBRATION_IMAGES = 400
FILES = ("calibration.npz", "test.npz", "digits_vit.onnx")


class Split(NamedTuple):
    """Images float32 [N, 1, 8, 8] in -1..1 and their digits int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def save(self, path: Path) -> None:
        np.savez(path, pixel_values=self.images, labels=self.labels)


def digits() -> tuple[Split, Split]:
    """The training and the test split, the same on every machine."""
    bunch = load_digits()
    images = (bunch.images[:, None] / 8.0 - 1.0).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=SEED)
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])


def write_data(train: Split, test: Split, folder: Path) -> None:
    Split(train.images[:CALIBRATION_IMAGES], train.labels[:CALIBRATION_IMAGES]).save(folder / FILES[0])
    test.save(folder / FILES[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--data-only", action="store_true", help="write the two .npz files and stop")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    present = [name for name in FILES[: 2 if options.data_only else 3] if (options.output / name).exists()]
    if present and not options.output.samefile(Path(__file__).parent):
        parser.error(f"{options.output} has {', '.join(present)} already: name another folder")
    train, test = digits()
    write_data(train, test, options.output)
    if options.data_only:
        return

    from model import DigitsViT, accuracy, export, fit

    model = fit(DigitsViT(), train, epochs=options.epochs, seed=SEED)
    print(f"test accuracy {accuracy(model, test):.4f} on {len(test.labels)} images")
    export(model, options.output / FILES[2])


if __name__ == "__main__":
    main()
