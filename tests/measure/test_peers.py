"""Peers run the digits model and agree; those that cannot are left out with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir.canonical import canonicalize
from xopt.ir.io import load
from xopt.measure import machine, peers

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "digits_vit.onnx"


def canonical() -> ir.Model:
    model = load(DIGITS)
    canonicalize(model)
    return model


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return Dataset.random(load(DIGITS), 3, 0).inputs


def test_peers_agree_with_onnxruntime(feeds: dict[str, np.ndarray]) -> None:
    pytest.importorskip("openvino")
    found = peers.prepare(DIGITS, canonical, feeds, threads=2, names=("onnxruntime", "openvino", "torch"))
    assert found.skipped == {}
    expected = found.runners["onnxruntime"](feeds)["logits"]
    for name in ("openvino", "torch"):
        # 4 blocks of float32 with sums of at most 256 terms; logits are of order 10
        np.testing.assert_allclose(found.runners[name](feeds)["logits"], expected, atol=1e-3, rtol=1e-3)


def test_a_runtime_that_is_missing_or_fails_is_left_out(
    feeds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    found = peers.prepare(tmp_path / "broken.onnx", canonical, feeds, threads=1, names=("onnxruntime", "openvino"))
    assert found.runners == {}
    assert "not installed" in found.skipped["openvino"]
    assert found.skipped["onnxruntime"]


def test_an_unknown_runtime_is_refused(feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="tensorrt"):
        peers.prepare(DIGITS, canonical, feeds, threads=1, names=("tensorrt",))


def test_the_machine_is_described() -> None:
    facts = machine.describe()
    assert facts["cpu"] and facts["usable_cores"] >= 1 and facts["memory"] > 1 << 28
    assert facts["versions"]["onnxruntime"].count(".") == 2
