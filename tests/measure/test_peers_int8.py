"""Peers at 8 bits on the digits model: each runs, and finds the digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import xopt.ir
from tests.acceptance import digits
from xopt.measure import peers_int8


@pytest.mark.slow
def test_each_peer_finds_the_digits(tmp_path: Path) -> None:
    for package in ("openvino", "nncf"):
        pytest.importorskip(package)
    train, test = digits.splits()
    path = tmp_path / "int8.onnx"
    peers_int8.write_quantized(digits.MODEL, train.take(64), path)

    def canonical() -> ir.Model:
        model = xopt.ir.load(digits.MODEL)
        xopt.ir.canonicalize(model)
        return model

    found = peers_int8.prepare(digits.MODEL, path, canonical, test.inputs, train, threads=2)
    assert found.skipped == {}
    for name, runner in found.runners.items():
        assert np.mean(runner(test.inputs)["logits"].argmax(1) == test.labels) > 0.97, name
