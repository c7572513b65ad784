"""The digits example: the data are made anew, and the bundled model knows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xopt.data import metrics
from xopt.data.dataset import Dataset
from xopt.ir.canonical import canonicalize
from xopt.ir.io import load
from xopt.ir.structure import token_layout, transformer_blocks
from xopt.measure.accuracy import Evaluator
from xopt.runtime.reference import ReferenceSession

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    script = [sys.executable, str(EXAMPLE / "train.py"), "--data-only", "--output", str(path)]
    subprocess.run(script, check=True)
    return path


def test_files_of_another_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "test.npz").write_text("mine")
    script = [sys.executable, str(EXAMPLE / "train.py"), "--data-only", "--output", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "has test.npz already" in done.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("test.npz", "mine")]


def test_calibration_and_test_images_are_apart(folder: Path) -> None:
    calibration, test = (Dataset.load(folder / f"{name}.npz") for name in ("calibration", "test"))
    assert (len(calibration), len(test)) == (400, 360)
    assert calibration.inputs["pixel_values"].shape == (400, 1, 8, 8)
    # Some of the 1797 scans are alike to the last grey level; leakage would make hundreds equal.
    seen = {image.tobytes() for image in calibration.inputs["pixel_values"]}
    assert sum(image.tobytes() in seen for image in test.inputs["pixel_values"]) <= 2
    assert test.labels is not None and set(np.unique(test.labels)) == set(range(10))


def test_the_bundled_model_is_small_and_right(folder: Path) -> None:
    assert (EXAMPLE / "digits_vit.onnx").stat().st_size < 2_000_000
    model = load(EXAMPLE / "digits_vit.onnx")
    test = Dataset.load(folder / "test.npz").matched(model)
    assert metrics.default_for(test).name == "top-1"
    assert Evaluator(metrics.get("top-1"), test, ReferenceSession(model)).baseline() >= 0.97


def test_its_structure_is_found() -> None:
    model = load(EXAMPLE / "digits_vit.onnx")
    canonicalize(model)
    blocks = transformer_blocks(model)
    assert [(b.attention.heads, b.ffn.width) for b in blocks if b.attention and b.ffn] == [(4, 256)] * 4
    assert token_layout(model).class_token
