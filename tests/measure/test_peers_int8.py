"""Peers at 8 bits on the digits model: each runs, and finds the digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.acceptance import digits
from xopt.measure import peers_int8


@pytest.mark.slow
def test_each_peer_finds_the_digits(tmp_path: Path) -> None:
    for package in ("openvino", "nncf"):
        pytest.importorskip(package)
    train, test = digits.splits()
    path = tmp_path / "int8.onnx"
    peers_int8.write_quantized(digits.MODEL, train.take(64), path)

    factories = peers_int8.factories(digits.MODEL, path, test.inputs, train, threads=2)
    assert set(factories) == set(peers_int8.NAMES)
    for name, factory in factories.items():
        assert np.mean(factory()(test.inputs)["logits"].argmax(1) == test.labels) > 0.97, name
