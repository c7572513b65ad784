"""QuantizeLinear and DequantizeLinear as the standard defines them, where no kernel of ours takes them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

ROUNDED = ("uint8", "int8", "uint16", "int16")
"""Types that float32 holds exactly, so that zero points can be added in it."""


def _quantize(call: Call) -> Value:
    """``saturate(round to even(x / scale) + zero)``."""
    dtype = _zero_dtype(call)
    if dtype not in ROUNDED:
        raise call.unsupported(f"quantization to {dtype}")
    limits = np.iinfo(dtype)

    def element(x: Any, *rest: Any) -> Any:
        parameters, index = rest[: len(operands)], rest[len(operands) :]
        scale, zero = _at(parameters, index, axis)
        level = tirx.nearbyint(x(*index).astype("float32") / scale) + zero.astype("float32")
        return tirx.max(tirx.min(level, float(limits.max)), float(limits.min)).astype(dtype)

    operands, axis = _parameters(call, dtype)
    return call.lowering.compute("quantized", call.shape(), element, call.x(), *operands)


def _dequantize(call: Call) -> Value:
    """``(x - zero) * scale``, the difference in int32, or in float32 where x is a float of few bits."""
    dtype = str(call.x(1).ty.dtype)
    exact = "float32" if "float" in str(call.x().ty.dtype) else "int32"

    def element(x: Any, *rest: Any) -> Any:
        parameters, index = rest[: len(operands)], rest[len(operands) :]
        scale, zero = _at(parameters, index, axis)
        return (x(*index).astype(exact) - zero.astype(exact)).astype(dtype) * scale

    operands, axis = _parameters(call, str(call.x().ty.dtype))
    return call.lowering.compute("dequantized", call.shape(), element, call.x(), *operands)


def _zero_dtype(call: Call) -> str:
    """The type of the integers: that of the zero point, or as the attribute says, or uint8."""
    if call.has(2):
        return str(call.x(2).ty.dtype)
    wanted = int(call.attr("output_dtype", 0))
    return ir.DataType(wanted).numpy().name if wanted else "uint8"


def _parameters(call: Call, dtype: str) -> tuple[list[Value], int]:
    """Scale and zero point as tensors of one number or one a slice, and the axis of the slices (-1 for none)."""
    shape: list[Dim] = call.shape(1)
    if call.attr("block_size", 0) or len(shape) > 1:
        raise call.unsupported("blocks with scales of their own")
    zero = call.x(2) if call.has(2) else call.lowering.constant(np.zeros((), dtype), "zero_point")
    if not call.has(2) and shape:
        zero = call.lowering.constant(np.zeros([int(dim) for dim in shape], dtype), "zero_points")
    whole = not shape or shape == [1]
    if whole:
        return [call.lowering.reshape(value, []) for value in (call.x(1), zero)], -1
    axis = call.axis(1, len(call.shape()))
    call.require(call.dims.same(shape[0], call.shape()[axis]), f"it has not one scale for each place on axis {axis}")
    if call.has(2):
        call.require(call.dims.same(shape[0], call.shape(2)[0]), "it has not as many zero points as scales")
    return [call.x(1), zero], axis


def _at(parameters: Any, index: Any, axis: int) -> list[Any]:
    return [parameter() if axis < 0 else parameter(index[axis]) for parameter in parameters]


OPS: dict[str, Emitter] = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}
"""Emitters by operator type."""
