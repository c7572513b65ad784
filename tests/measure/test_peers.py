"""Peers run the digits model and agree."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.ir import builders
from tests.ir.renaming import Renaming
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir.io import load, save
from xopt.measure import machine, peers
from xopt.runtime.reference import ReferenceSession

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "digits_vit.onnx"


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return Dataset.random(load(DIGITS), 3, 0).inputs


def test_peers_agree_with_onnxruntime(feeds: dict[str, np.ndarray]) -> None:
    pytest.importorskip("openvino")
    factories = peers.factories(DIGITS, feeds, threads=2, names=("onnxruntime", "openvino", "torch"))
    found = {name: factory()(feeds)["logits"] for name, factory in factories.items()}
    for name in ("openvino", "torch"):
        # 4 blocks of float32 with sums of at most 256 terms; logits are of order 10
        np.testing.assert_allclose(found[name], found["onnxruntime"], atol=1e-3, rtol=1e-3)


def test_torch_runs_a_model_whatever_its_names_are(tmp_path: Path) -> None:
    model = Renaming(lambda kind, name: f"{name}\r'\"\0 self")
    plain = builders.bert(layers=1)
    given = builders.feeds(plain)
    path = tmp_path / "model.onnx"
    save(model.model(plain), path)
    hostile = {model("value", name): array for name, array in given.items()}
    got = peers.torch_runner(path, hostile, 1)(hostile)
    (expected,) = ReferenceSession(plain).run(given).values()
    np.testing.assert_allclose(got[model("value", "embedding")], expected, atol=1e-4)  # sums of up to 128 float32


@pytest.mark.parametrize("location", [None, "weights.data"])
def test_onnxruntime_finds_a_model_whose_path_is_no_utf8(location: str | None, tmp_path: Path) -> None:
    plain, given = builders.vit(layers=1), builders.feeds(builders.vit(layers=1))
    save(plain, tmp_path / "m.onnx")
    if location is not None:
        proto, shown = onnx.load(tmp_path / "m.onnx"), tmp_path / "m.onnx"
        onnx.save_model(proto, shown, save_as_external_data=True, location=location, size_threshold=256)
    folder = tmp_path / os.fsdecode(b"caf\xe9 '\n")
    folder.mkdir()
    for file in [file for file in tmp_path.iterdir() if file.is_file()]:
        file.rename(folder / (os.fsdecode(b"\xe9.onnx") if file.suffix == ".onnx" else file.name))
    before = os.listdir("/proc/self/fd")
    found = peers.onnxruntime_runner(folder / os.fsdecode(b"\xe9.onnx"), 1)(given)["logits"]
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    np.testing.assert_allclose(found, ReferenceSession(plain).run(given)["logits"], atol=1e-5)


def test_onnxruntime_has_no_bfloat16(feeds: dict[str, np.ndarray]) -> None:
    factories = peers.factories(DIGITS, feeds, threads=1, names=("onnxruntime",), precision="bf16")
    with pytest.raises(InputError, match="bfloat16"):
        factories["onnxruntime"]()


def test_an_unknown_runtime_is_refused(feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="tensorrt"):
        peers.factories(DIGITS, feeds, threads=1, names=("tensorrt",))


def test_the_machine_is_described() -> None:
    facts = machine.describe()
    assert facts["cpu"] and facts["usable_cores"] >= 1 and facts["memory"] > 1 << 28
    assert facts["versions"]["onnxruntime"].count(".") == 2
