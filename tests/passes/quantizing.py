"""Helpers for tests of quantized models: the pass under verification, and the QDQ form spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.ir import builders
from xopt.data.dataset import Dataset
from xopt.ir import edit
from xopt.passes import Quantize
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach

INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)


def samples(model: ir.Model, count: int = 8) -> Dataset:
    """Inputs that count as data: the builders' random ones, with padding where there is a mask."""
    return Dataset(builders.feeds(model, {"batch": count}))


def run(model: ir.Model, data: Dataset | None = None, **options: Any) -> PassReport:
    """The pass under verification."""
    context = PassContext(calibration=data or samples(model))
    (step,) = PassManager([Quantize(**options)], instruments=[VerifyEach()]).run(model, context)
    return step.report


def products(model: ir.Model) -> list[ir.Node]:
    """MatMuls whose second operand is stored in 8 bits, after checking everything about their form."""
    found = []
    for node in model.graph:
        weight = edit.producer(edit.input_at(node, 1), "DequantizeLinear")
        if not edit.is_op(node, "MatMul") or weight is None:
            continue
        x = edit.producer(node.inputs[0], "DequantizeLinear")
        q = edit.producer(edit.input_at(x, 0), "QuantizeLinear") if x is not None else None
        assert x is not None and q is not None
        assert list(x.inputs[1:]) == list(q.inputs[1:])
        scale, zero = (edit.constant(value) for value in q.inputs[1:])
        assert scale is not None and scale.dtype == np.float32 and scale.shape == () and scale > 0
        assert zero is not None and zero.dtype == np.uint8 and zero.shape == ()
        integers, columns = (edit.constant(value) for value in weight.inputs)
        assert integers is not None and integers.dtype == np.int8 and integers.min() >= -127
        assert columns is not None and columns.dtype == np.float32 and columns.shape == integers.shape[1:]
        assert weight.attributes["axis"].as_int() == 1
        found.append(node)
    return found


def linear(x: np.ndarray, weight: np.ndarray, low: float, high: float) -> np.ndarray:
    """``x @ weight`` by the textbook: affine uint8 by symmetric int8, sums in integers, scales at the end; float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    sx = np.float32((high - low) / 255)
    zero = int(np.rint(-low / float(sx)))
    xq = np.clip(np.rint(x / sx).astype(np.int64) + zero, 0, 255)
    sw = (np.abs(weight.astype(np.float64)).max(0) / 127).astype(np.float32)
    wq = np.rint(weight.astype(np.float64) / sw).astype(np.int64)
    return ((xq - zero) @ wq) * float(sx) * sw.astype(np.float64)


def one_layer(weight: np.ndarray, *between: str) -> ir.Model:
    """``y = f(x) @ weight`` for x float32 [batch, K], f being the named elementwise ops."""
    from tests.ir.net import Net

    net = Net("one")
    x = net.input("x", ["batch", weight.shape[0]])
    for op_type in between:
        x = net.op(op_type, x)
    net.output(net.op("MatMul", x, net.constant("w", weight), name="product"), "y")
    return net.build()


def close(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], step: float = 0.02, median: float = 1e-5
) -> None:
    """Equal but for numbers on the border of two steps, which rounding may move to either.

    Most elements then see none of these, and agree to float32 rounding; no output moves more than a few steps.
    xopt's own kernels approximate GELU more coarsely where its results are rounded to 8 bits: give the ``median`` that
    this may make.
    """
    for name, wanted in theirs.items():
        scale = np.abs(wanted).max()
        difference = np.abs(ours[name].astype(np.float64) - wanted) / scale
        assert np.median(difference) < median, name
        assert difference.max() < step, name
