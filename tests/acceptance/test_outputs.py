"""What ``optimize`` writes: a model.onnx that other runtimes run with the artifact's outputs, and a recipe of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import xopt
from tests.acceptance import digits
from xopt.pipeline import text
from xopt.pipeline.rounding import rounding_bound
from xopt.search import steps

PASSES = "prune-heads{keep=0.75, ffn=true}, merge-tokens{ratio=0.2}"
ARTIFACT = {"model.so", "model.weights", "manifest.json"}
FILES = ARTIFACT | {"model.onnx", "pipeline.yaml", "report.html", "report.json", ".xopt-files.json"}
Arrays = Mapping[str, np.ndarray]
ROUNDING = 2e-5
"""Of the largest output: four blocks of float32 sums in another order."""


@pytest.fixture(scope="module")
def always_faster() -> Any:
    """Lossy passes are kept whatever the clock says: here it is about their outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "FASTER", float("inf"))
        yield


def optimized(model: Path, passes: Any, folder: Path, **settings: Any) -> Path:
    return xopt.optimize(model, passes, peers=(), threads=2, **settings).save(folder / "out")


@pytest.fixture(scope="module")
def vit(always_faster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return optimized(digits.MODEL, PASSES, tmp_path_factory.mktemp("vit"))


def in_onnxruntime(path: Path, feeds: Arrays) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, dict(feeds))]


def in_openvino(path: Path, feeds: Arrays) -> list[np.ndarray]:
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return [np.asarray(output) for output in compiled(dict(feeds)).values()]


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def test_everything_is_written(vit: Path) -> None:
    assert {file.name for file in vit.iterdir()} == FILES
    report = json.loads((vit / "report.json").read_text())
    assert [step["pass"] for step in report["steps"] if step["kept"]][-2:] == ["prune-heads", "merge-tokens"]
    assert report["final"]["macs"] < 0.75 * report["steps"][0]["macs"]
    assert "</html>" in (vit / "report.html").read_text()


def test_the_file_is_plain_onnx(vit: Path) -> None:
    model = onnx.load(vit / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_digits_in_another_runtime(vit: Path, runtime: str) -> None:
    feeds = {"pixel_values": digits.held_out_images(60)}
    (artifact,) = xopt.Session.load(vit).run(feeds).values()
    (plain,) = RUNTIMES[runtime](vit / "model.onnx", feeds)
    close = np.abs(artifact - plain).max(1) <= ROUNDING * np.abs(plain).max()
    np.testing.assert_array_equal(artifact.argmax(1)[close], plain.argmax(1)[close])
    for index in np.flatnonzero(~close):
        assert on_edge(vit / "model.onnx", runtime, feeds["pixel_values"][index : index + 1])
    assert close.mean() >= 0.9


def on_edge(path: Path, runtime: str, image: np.ndarray) -> bool:
    """Whether two pairs of tokens are so nearly equal that this runtime itself merges others in an image that is
    changed in the last bits: then no runtime's choice is the right one.
    """
    noise = np.random.default_rng(0).standard_normal((64, *image.shape[1:]))
    images = np.concatenate([image, (image * (1 + 3e-7 * noise)).astype(np.float32)])
    (outputs,) = RUNTIMES[runtime](path, {"pixel_values": images})
    return bool((np.abs(outputs - outputs[:1]).max(1) > ROUNDING * np.abs(outputs).max()).any())


@pytest.mark.slow
def test_the_recipe_gives_the_same_bytes(vit: Path, always_faster: None, tmp_path: Path) -> None:
    recipe = text.from_yaml((vit / "pipeline.yaml").read_text())
    again = optimized(digits.MODEL, recipe, tmp_path)
    assert (again / "model.onnx").read_bytes() == (vit / "model.onnx").read_bytes()
    assert (again / "model.weights").read_bytes() == (vit / "model.weights").read_bytes()
    assert (again / "pipeline.yaml").read_bytes() == (vit / "pipeline.yaml").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_minilm_in_another_runtime(minilm_pruned: Path, runtime: str) -> None:
    rng = np.random.default_rng(0)
    mask = (np.arange(33)[None] < np.array([[33], [20], [7], [1]])).astype(np.int64)
    feeds = {"input_ids": rng.integers(0, 30522, mask.shape), "attention_mask": mask}
    artifact = list(xopt.Session.load(minilm_pruned).run(feeds).values())
    plain = RUNTIMES[runtime](minilm_pruned / "model.onnx", feeds)
    bound = rounding_bound(xopt.load(minilm_pruned / "model.onnx"))
    for found, wanted in zip(artifact, plain, strict=True):
        assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


@pytest.fixture(scope="module")
def minilm_pruned(minilm_file: Path, always_faster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    passes = "prune-heads{keep=0.75, ffn=true, score=magnitude}"
    folder = optimized(minilm_file, passes, tmp_path_factory.mktemp("minilm_pruned"), dims={"seq": 33})
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return folder
