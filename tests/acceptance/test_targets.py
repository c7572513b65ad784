"""``xopt optimize`` for machines that are not here: artifacts that are checked, run under emulation, and not timed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import xopt
from tests.acceptance import digits
from tests.acceptance.command import xopt as command
from xopt.runtime.manifest import Manifest, manifest_path
from xopt.targets import arm_runtime, cuda_toolkit

PRUNE = "prune-heads{keep=0.75, ffn=true, score=magnitude}"


def optimized(model: Path, target: str, folder: Path, *options: object) -> Path:
    """The output folder of the command, whose answer says that nothing was timed."""
    done = command("optimize", model, "--target", target, "--passes", PRUNE, "--json", "-o", folder / "out", *options)
    assert done.status == 0, done.err
    answer = json.loads(done.out)
    last = answer["steps"][-1]
    assert last["kept"] and last["reason"].endswith("latency not measured")
    assert {step["latency_ms"] and step["latency_ms"]["median"] for step in answer["steps"]} == {None}
    assert answer["runtimes"] == {}
    assert "not measured" in (folder / "out" / "report.html").read_text()
    return Path(answer["output"])


def emulated(library: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    manifest = Manifest.from_json(manifest_path(library).read_text(), str(library))
    return arm_runtime.run(library, manifest, feeds)[0]


def same_on_arm_and_x86(folder: Path, feeds: Mapping[str, np.ndarray], tolerance: float, tmp_path: Path) -> None:
    """The optimized model for ARM, emulated, against the same compiled for the machine that runs the tests."""
    if lack := arm_runtime.missing():
        pytest.skip(lack)
    library = folder / "model.so"
    assert library.read_bytes()[18:20] == (183).to_bytes(2, "little")  # EM_AARCH64
    native = xopt.Session.load(xopt.compile(folder / "model.onnx", output=tmp_path / "model.so")).run(feeds)
    for found, wanted in zip(emulated(library, feeds), native.values(), strict=True):
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def holds_sm_90(library: Path) -> bool:
    return set(cuda_toolkit.cubin_architectures(library)) == {"sm_90"}


@pytest.mark.slow
def test_digits_on_arm(tmp_path: Path) -> None:
    folder = optimized(digits.MODEL, "arm", tmp_path)
    # Four layers of float32 sums in another order: tens of units in the last place of the largest logit.
    same_on_arm_and_x86(folder, {"pixel_values": digits.held_out_images(8)}, 1e-5, tmp_path)


@pytest.mark.slow
def test_digits_on_cuda(tmp_path: Path) -> None:
    if cuda_toolkit.device_present():
        pytest.skip("this machine has a GPU, so that latency is measured")
    assert holds_sm_90(optimized(digits.MODEL, "cuda", tmp_path) / "model.so")


@pytest.mark.slow
def test_minilm_on_arm(minilm_file: Path, tmp_path: Path) -> None:
    folder = optimized(minilm_file, "arm", tmp_path)
    mask = (np.arange(16)[None] < np.array([[16], [5]])).astype(np.int64)
    ids = np.random.default_rng(0).integers(0, 30522, mask.shape)
    # Six layers, sums of up to 1536 terms.
    same_on_arm_and_x86(folder, {"input_ids": ids, "attention_mask": mask}, 2e-5, tmp_path)


@pytest.mark.slow
def test_minilm_on_cuda(minilm_file: Path, tmp_path: Path) -> None:
    if cuda_toolkit.device_present():
        pytest.skip("this machine has a GPU, so that latency is measured")
    assert holds_sm_90(optimized(minilm_file, "cuda", tmp_path) / "model.so")
