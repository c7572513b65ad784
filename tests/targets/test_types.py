"""Every element type in and out of compiled code: Cast is ONNX's, and sums of float16 are made in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference.ops.op_cast import cast_to

import xopt
from tests.ir.net import Net

Array = np.ndarray
NARROW = ("FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2FNUZ", "FLOAT4E2M1", "FLOAT8E8M0", "INT4", "UINT2")
NUMBERS = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(64) * 10 ** np.linspace(-12, 6, 64),
        [0, np.inf, -np.inf, np.nan, 1e30, 464, 465, -464, 6, 0.0625],
    ]
).astype(np.float32)


def run(nodes: list[onnx.NodeProto], x: Array, source: int, target: int, folder: Path) -> Array:
    inputs = [helper.make_tensor_value_info("x", source, x.shape)]
    outputs = [helper.make_tensor_value_info("y", target, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    onnx.save(model, folder / "model.onnx")
    library = xopt.compile(folder / "model.onnx", "cpu", folder / "model.so", threads=1, database=False)
    found: Array = xopt.Session.load(library, threads=1).run({"x": x})["y"]
    return found


def cast(name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", ["x"], ["y"], to=getattr(TensorProto, name))


@pytest.mark.parametrize("name", NARROW)
def test_cast_to_a_narrow_type_and_back(name: str, tmp_path: Path) -> None:
    narrow = getattr(TensorProto, name)
    x = NUMBERS if "INT" not in name else np.arange(-8, 8).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = cast_to(x.astype(np.int32) if "INT" in name else x, narrow, True, "up")
    found = run([cast(name)], x, TensorProto.FLOAT, narrow, tmp_path)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
    back = run([cast("FLOAT")], expected, narrow, TensorProto.FLOAT, tmp_path)
    np.testing.assert_array_equal(back, expected.astype(np.float32))


@pytest.mark.parametrize("name", ["FLOAT16", "BFLOAT16", "FLOAT8E5M2"])
def test_rounding_through_a_narrow_type_is_not_folded_away(name: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=getattr(TensorProto, name)),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    x = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    expected = cast_to(x, getattr(TensorProto, name), True).astype(np.float32)
    assert (expected != x).any()
    np.testing.assert_array_equal(run(nodes, x, TensorProto.FLOAT, TensorProto.FLOAT, tmp_path), expected)


def test_means_in_float16_are_summed_in_float32(tmp_path: Path) -> None:
    x = np.full((2, 4096), 1000, np.float16)
    node = helper.make_node("ReduceMean", ["x"], ["y"])
    found = run([node], x, TensorProto.FLOAT16, TensorProto.FLOAT16, tmp_path)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.full((1, 1), 1000, np.float16))


def test_compiling_leaves_a_model_of_narrow_types_as_it_was(tmp_path: Path) -> None:
    """Its types are those of the copy that is lowered, too."""
    net = Net("half")
    x = net.input("x", ["n", 8], ir.DataType.FLOAT16)
    weight = net.constant("w", np.ones((8, 8), np.float16))
    net.output(net.op("Tanh", net.op("MatMul", x, weight)), "y")
    model = net.build()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    xopt.targets.compile(model, "cpu", tmp_path / "model.so")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("op", "constants"), [("LayerNormalization", 2), ("LayerNormalization", 1), ("RMSNormalization", 1)]
)
def test_norms_in_double_precision(op: str, constants: int, tmp_path: Path) -> None:
    net = Net("double")
    x = net.input("x", ["n", 3, 8], ir.DataType.DOUBLE)
    random = np.random.default_rng(0)
    parameters = [net.constant(f"p{place}", random.standard_normal(8)) for place in range(constants)]
    net.output(net.op(op, x, *parameters, axis=-1, stash_type=11), "y")
    given = random.standard_normal((2, 3, 8))
    library = xopt.compile(net.build(), output=tmp_path / "model.so", threads=1, database=False)
    found = xopt.Session.load(library).run({"x": given})["y"]
    centred = given - (given.mean(-1, keepdims=True) if op == "LayerNormalization" else 0)
    scale, bias = (value.const_value.numpy() for value in (*parameters, net.constant("zero", 0.0))[:2])
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
