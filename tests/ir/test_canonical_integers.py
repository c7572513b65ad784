"""Operators on quantized tensors become QDQ, and compute what they did."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from xopt.ir import canonicalize

RANDOM = np.random.default_rng(0)
U8, I8 = np.uint8, np.int8


def grid(kind: type, count: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A scale and a zero point, or some of each."""
    shape = (count,) if count else ()
    return RANDOM.uniform(0.02, 0.1, shape).astype(np.float32), RANDOM.integers(0, 20, shape).astype(kind)


def of(op: str, operands: list[Any], **attributes: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model whose first operand is an input and whose others are constants."""
    names = [f"i{k}" for k in range(len(operands))]
    kind = onnx.helper.np_dtype_to_tensor_dtype(operands[0].dtype)
    output = onnx.helper.np_dtype_to_tensor_dtype(operands[7].dtype)
    node = onnx.helper.make_node(op, names, ["y"], name="it", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("i0", kind, ["n", *operands[0].shape[1:]])],
        [onnx.helper.make_tensor_value_info("y", output, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in zip(names[1:], operands[1:])],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), {"i0": operands[0]}


def integers(kind: type, *shape: int) -> np.ndarray:
    info = np.iinfo(kind)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(kind)


def matmul(left: type, right: type, columns: int = 0) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    y = np.float32(6.0), np.asarray(60 if left is U8 else 3, left)
    return of("QLinearMatMul", [integers(left, 3, 8), *grid(left), integers(right, 8, 5), *grid(right, columns), *y])


def conv(bias: bool, channels: int = 0, **attributes: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    y = np.float32(4.0), np.asarray(100, U8)
    operands = [integers(U8, 2, 4, 6, 6), *grid(U8), integers(I8, 6, 4, 3, 3), *grid(I8, channels), *y]
    operands[5] = np.zeros_like(operands[5])  # onnxruntime and the hardware know no other for weights of channels
    return of("QLinearConv", operands + ([integers(np.int32, 6) // (1 << 20)] if bias else []), **attributes)


@pytest.mark.parametrize(
    ("proto", "feeds"),
    [
        matmul(U8, U8),
        matmul(I8, I8),
        matmul(U8, I8),
        conv(False),
        conv(True),
        conv(True, 6),
        conv(True, pads=[1, 1, 1, 1]),
    ],
    ids=["u8u8", "i8i8", "u8i8", "conv", "bias", "channels", "pads"],
)
def test_the_same_integers(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    (want,) = ReferenceEvaluator(proto).run(None, feeds)
    model = ir.from_proto(proto)
    report = canonicalize(model)
    kinds = {node.op_type for node in model.graph}
    assert kinds >= {"QuantizeLinear", "DequantizeLinear"}
    assert not kinds & {"QLinearMatMul", "QLinearConv"}
    assert report.counts["qlinear-matmul"] + report.counts["qlinear-conv"] == 1
    (got,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    assert got.dtype == want.dtype
    off = np.abs(got.astype(int) - want.astype(int))
    assert off.max() <= 1  # a tie, rounded the other way after another order of float32 products
    assert np.mean(off > 0) < 0.05
    assert len(np.unique(want)) > 8


def test_scales_of_matrices_are_left_alone() -> None:
    proto, _ = matmul(U8, U8)
    for tensor in proto.graph.initializer:
        if tensor.name in ("i4", "i5"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).reshape(1, 1), tensor.name))
    model = ir.from_proto(proto)
    canonicalize(model)
    assert "QLinearMatMul" in {node.op_type for node in model.graph}
