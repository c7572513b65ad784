"""QuantizeLinear and DequantizeLinear as the standard defines them, where no kernel of ours takes them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import relax, tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.narrow import SINGLE, rounded
from xopt.targets.symbolic import Dim
from xopt.targets.widening import CARRIERS

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

INTEGERS = frozenset((
    ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16,
    ir.DataType.UINT4, ir.DataType.INT4, ir.DataType.UINT2, ir.DataType.INT2,
))  # fmt: skip
"""Types that float32 holds exactly, so that zero points can be added in it."""
FLOATS = frozenset(kind for kind in CARRIERS if kind.is_floating_point() and kind.bitwidth <= 8)
Where = Callable[[Sequence[Any]], Sequence[Any]]
"""The index of the parameters of an element."""


def _quantize(call: Call) -> Value:
    """``saturate(round to even(x / scale) + zero)``."""
    kind, divide = _kind(call), _division(call)
    saturate = bool(call.attr("saturate", 1))
    if kind not in INTEGERS | FLOATS:
        raise call.unsupported(f"quantization to {kind.name}")
    operands, where = _parameters(call)
    dtype = CARRIERS.get(kind, kind).numpy().name

    def element(x: Any, *rest: Any) -> Any:
        (scale, *zero), index = rest[: len(operands)], rest[len(operands) :]
        at = where(index)
        level = divide(x(*index), scale(*at))
        if kind in INTEGERS:
            level = tirx.nearbyint(level)
        for offset in zero:
            level = level + offset(*at).astype("float32")
        if kind in FLOATS:
            return rounded(level, kind, SINGLE, saturate)
        low, high = _range(kind)
        return tirx.max(tirx.min(level, float(high)), float(low)).astype(dtype)

    return call.lowering.compute("quantized", call.shape(), element, call.x(), *operands)


def _dequantize(call: Call) -> Value:
    """``(x - zero) * scale``, the difference in int32, or in float32 where x is a float of few bits."""
    dtype = str(call.x(1).ty.dtype)
    wanted = ir.DataType(int(call.attr("output_dtype", 0)))
    result = dtype if wanted == ir.DataType.UNDEFINED else CARRIERS.get(wanted, wanted).numpy().name
    exact = "float32" if "float" in str(call.x().ty.dtype) else "int32"
    operands, where = _parameters(call)

    def element(x: Any, *rest: Any) -> Any:
        (scale, *zero), index = rest[: len(operands)], rest[len(operands) :]
        at = where(index)
        level = x(*index).astype(exact)
        for offset in zero:
            level = level - offset(*at).astype(exact)
        return (level.astype(dtype) * scale(*at)).astype(result)

    return call.lowering.compute("dequantized", call.shape(), element, call.x(), *operands)


def _kind(call: Call) -> ir.DataType:
    """The type of the result: as the attribute says, or that of the zero point, or uint8."""
    wanted = int(call.attr("output_dtype", 0))
    if wanted:
        return ir.DataType(wanted)
    return ir.DataType[str(call.x(2).ty.dtype).upper()] if call.has(2) else ir.DataType.UINT8


def _range(kind: ir.DataType) -> tuple[int, int]:
    """The least and the largest integer of a type."""
    if kind.is_signed():
        return -(1 << (kind.bitwidth - 1)), (1 << (kind.bitwidth - 1)) - 1
    return 0, (1 << kind.bitwidth) - 1


def _division(call: Call) -> Callable[[Any, Any], Any]:
    """``x / scale`` in the type that ``precision`` names, as float32."""
    kind = ir.DataType(int(call.attr("precision", 0)))
    if kind == ir.DataType.DOUBLE:
        return lambda x, scale: (x.astype("float64") / scale.astype("float64")).astype("float32")
    if kind not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return lambda x, scale: x.astype("float32") / scale.astype("float32")

    def narrow(x: Any) -> Any:
        return rounded(x.astype("float32"), kind, SINGLE, False)

    return lambda x, scale: narrow(narrow(x) / narrow(scale))


def _parameters(call: Call) -> tuple[list[relax.Expr], Where]:
    """Scale, and zero point if there is one, and which of theirs an element has: one for all, a slice, or a block."""
    shape, whole, block = call.shape(1), call.shape(), int(call.attr("block_size", 0))
    operands = [call.x(1), *([call.x(2)] if call.has(2) else [])]
    shapes = [call.lowering.shape_of(operand) for operand in operands]
    if all(len(given) <= 1 and call.dims.equal(call.dims.product(given), 1) for given in shapes):
        call.pass_over("axis", "block_size")
        return [call.lowering.reshape(operand, []) for operand in operands], lambda index: []
    for given in shapes[1:]:
        call.require(len(given) == len(shape), "its zero points do not fit its scales")
        for one, other in zip(given, shape):
            call.require(call.dims.same(one, other), "its zero points do not fit its scales")
    axis = call.axis(1, len(whole))
    if len(shape) == 1 and not block:
        call.require(call.dims.same(shape[0], whole[axis]), f"it has not one scale for each place on axis {axis}")
        return operands, lambda index: [index[axis]]
    if block < 1 or len(shape) != len(whole):
        raise call.unsupported(f"scales of rank {len(shape)} with blocks of {block} do not fit rank {len(whole)}")
    for place, (size, dim) in enumerate(zip(shape, whole)):
        needed: Dim = (dim + (block - 1)) // block if place == axis else dim
        call.require(call.dims.same(size, needed), f"it has not one scale for each block on axis {place}")
    blocks = tirx.const(block, "int64")
    return operands, lambda index: [tirx.floordiv(i, blocks) if k == axis else i for k, i in enumerate(index)]


OPS: dict[str, Emitter] = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}
"""Emitters by operator type."""
