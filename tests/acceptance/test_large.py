"""A model beyond the 2 GB of a protobuf message: loaded, inspected, optimized and written like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest

import xopt
from tests.acceptance import command
from xopt.ir import load, save
from xopt.ir.io import LARGEST_MESSAGE, weight_bytes
from xopt.runtime.session import Session

WIDTH, LAYERS = 16_640, 2
"""Two square layers of 1.1 GB."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """float32 [batch, WIDTH] -> relu(x W0) W1, random weights."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 16e9 or psutil.virtual_memory().available < 12e9:
        pytest.skip("16 GB of disk and 12 GB of memory are needed")
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> large (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) '
        f"<float[{WIDTH}, {WIDTH}] w0, float[{WIDTH}, {WIDTH}] w1> "
        "{ a = MatMul(x, w0) b = Identity(a) h = Relu(b) y = MatMul(h, w1) }"
    )
    graph = ir.from_proto(model)
    for index in range(LAYERS):
        array = random.standard_normal((WIDTH, WIDTH), np.float32)
        array *= WIDTH**-0.5
        value = next(v for node in graph.graph for v in node.inputs if v is not None and v.name == f"w{index}")
        value.const_value = ir.tensor(array, name=value.name)
        graph.graph.register_initializer(value)
    save(graph, folder / "large.onnx")
    yield folder / "large.onnx"
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_beyond_two_gigabytes(large: Path, tmp_path: Path) -> None:
    model = load(large)
    assert weight_bytes(model) > LARGEST_MESSAGE
    assert large.stat().st_size < 1e6
    found = json.loads(command.xopt("inspect", large, "--json").out)
    assert found["parameters"] == LAYERS * WIDTH**2
    try:
        xopt.optimize(large, peers=()).save(tmp_path / "out")
        written = load(tmp_path / "out" / "model.onnx")
        assert [node.op_type for node in written.graph] == ["MatMul", "Relu", "MatMul"]
        x = np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)
        (y,) = Session.load(tmp_path / "out").run({"x": x}).values()
        weights = [node.inputs[1].const_value.numpy() for node in written.graph if node.op_type == "MatMul"]
        # Sums of 16640 products of size 1/129 in another order: the error grows as its root.
        np.testing.assert_allclose(y, np.maximum(x @ weights[0], 0) @ weights[1], rtol=0, atol=2e-5)
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
