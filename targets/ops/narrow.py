"""Numbers of types that processors do not compute with: rounded to such a type, and taken in and out of memory.

While a graph is lowered they are carried in float32, int8 or uint8, which hold each of their values
(:mod:`xopt.targets.widening`). These operators of the domain ``xopt.narrow`` are put where that matters:

    Round    any number   → carried, the nearest number that the type has (Cast)
    Unpack   as stored    → carried
    Pack     carried      → as stored: float16 as itself, bfloat16 in uint16, all others in a byte each
    BitCast  as stored    → as stored, of another type
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.widening import CARRIERS, DOMAIN, storage

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


@dataclass(frozen=True)
class Bits:
    """How a float of float32's or float64's kind is made of bits.

    Attributes:
        dtype: its name.
        integer: the integer type of its width.
        mantissa: bits of its mantissa.
        bias: what is added to exponents.
    """

    dtype: str
    integer: str
    mantissa: int
    bias: int

    def exponent(self, x: Any) -> Any:
        """The exponent of the first digit of ``x`` (-bias for 0, bias + 1 for infinities and NaN)."""
        field = (tirx.reinterpret(self.integer, x) >> self._int(self.mantissa)) & self._int(2 * self.bias + 1)
        return field - self._int(self.bias)

    def power(self, exponent: Any) -> Any:
        """2 to an exponent in the range of normal numbers."""
        return tirx.reinterpret(self.dtype, (exponent + self._int(self.bias)) << self._int(self.mantissa))

    def number(self, value: float) -> Any:
        """A constant."""
        return tirx.const(value, self.dtype)

    def _int(self, value: int) -> Any:
        return tirx.const(value, self.integer)


SINGLE = Bits("float32", "int32", 23, 127)
DOUBLE = Bits("float64", "int64", 52, 1023)


def _round(call: Call) -> Value:
    """The nearest number of the type, ties to even; beyond its range by ``saturate`` and ``round_mode``."""
    to = ir.DataType(call.attr("type"))
    x, shape = call.x(), call.lowering.shape_of(call.x())
    source = str(x.ty.dtype)
    saturate, mode = bool(call.attr("saturate", 1)), str(call.attr("round_mode", "up"))
    if CARRIERS[to] != ir.DataType.FLOAT:
        return call.lowering.compute("wrapped", shape, lambda x, *i: _wrapped(x(*i), source, to), x)
    wide = DOUBLE if source in ("float64", "int32", "uint32", "int64", "uint64") else SINGLE

    def element(x: Any, *index: Any) -> Any:
        number = x(*index).astype(wide.dtype)
        if to == ir.DataType.FLOAT8E8M0:
            return _power_of_two(number.astype("float32"), saturate, mode)
        return rounded(number, to, wide, saturate).astype("float32")

    return call.lowering.compute("rounded", shape, element, x)


def _wrapped(x: Any, source: str, to: ir.DataType) -> Any:
    """An integer of a few bits: the lowest bits of the number, which is cut off towards zero first."""
    width, carrier = to.bitwidth, CARRIERS[to].numpy().name
    if "float" in source:
        x = x.astype("int32")
    free = tirx.const(8 - width, "int8")
    return (x.astype(carrier) << free.astype(carrier)) >> free.astype(carrier)


def rounded(x: Any, to: ir.DataType, wide: Bits, saturate: bool) -> Any:
    """``x`` of the type ``wide`` as the nearest number of a narrower one."""
    if to == ir.DataType.FLOAT16 and wide is SINGLE:
        return x.astype("float16").astype("float32")
    form = ml_dtypes.finfo(to.numpy())  # type: ignore[no-untyped-call]
    top, ends = float(form.max), _beyond(to.numpy(), to.bitwidth, saturate)
    low, high = (tirx.const(int(exponent), wide.integer) for exponent in (form.minexp, form.maxexp))
    digits = tirx.const(int(form.nmant), wide.integer)
    if to == ir.DataType.BFLOAT16 and wide is SINGLE:
        return _half_of_single(x)
    exponent = tirx.min(tirx.max(wide.exponent(x), low), high)
    near = tirx.nearbyint(x * wide.power(digits - exponent)) * wide.power(exponent - digits)
    near = tirx.Select(near > wide.number(top), wide.number(ends), near)
    near = tirx.Select(near < wide.number(-top), wide.number(-ends), near)
    if not np.isnan(np.array(np.nan, np.float32).astype(to.numpy()).astype(np.float32)):
        near = tirx.Select(tirx.isnan(near), wide.number(-0.0), near)
    if to.name.endswith("UZ"):  # these have no -0
        near = tirx.Select(tirx.EQ(near, wide.number(0.0)), wide.number(0.0), near)
    return near


def _beyond(dtype: np.dtype[Any], width: int, saturate: bool) -> float:
    """What becomes of numbers beyond the largest."""
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if width >= 16 or not saturate:
        with np.errstate(over="ignore"):
            return float(np.array(np.inf, np.float32).astype(dtype).astype(np.float32))
    return largest


def _half_of_single(x: Any) -> Any:
    """bfloat16 is the upper half of float32."""
    bits = tirx.reinterpret("uint32", x)
    odd = (bits >> tirx.const(16, "uint32")) & tirx.const(1, "uint32")
    near = (bits + tirx.const(0x7FFF, "uint32") + odd) & tirx.const(0xFFFF0000, "uint32")
    return tirx.Select(tirx.isnan(x), x, tirx.reinterpret("float32", near))


def _power_of_two(x: Any, saturate: bool, mode: str) -> Any:
    """float8 of exponents alone, which has no sign: up, down or to the nearest power (ties up), by ONNX's reference."""
    bits = tirx.reinterpret("int32", x) & tirx.const(0x7FFFFFFF, "int32")
    code = bits >> tirx.const(23, "int32")
    half = {"up": 0x7FFFFF, "nearest": 0x400000, "down": 0}[mode]
    up = (bits + tirx.const(half, "int32")) >> tirx.const(23, "int32")
    if mode == "nearest":  # below the least normal number a tie goes down
        up = tirx.Select(code > 0, up, (bits + tirx.const(0x3FFFFF, "int32")) >> tirx.const(23, "int32"))
    if saturate:
        up = tirx.min(up, tirx.const(254, "int32"))
    least, special = tirx.const(0x00400000, "int32"), tirx.const(0x7FC00000, "int32")
    field = tirx.Select(up > 0, up << tirx.const(23, "int32"), least)
    field = tirx.Select(tirx.Or(code > 254, up > 254), special, field)
    return tirx.reinterpret("float32", field)


def _unpack(call: Call) -> Value:
    """By a table of all codes, where the type has a byte."""
    of, x = ir.DataType(call.attr("type")), call.x()
    shape = call.lowering.shape_of(x)
    if of == ir.DataType.FLOAT16:
        return call.emit(relax.op.astype(x, "float32"))
    if of == ir.DataType.BFLOAT16:
        upper = tirx.const(16, "uint32")
        return call.lowering.compute(
            "unpacked", shape, lambda x, *i: tirx.reinterpret("float32", x(*i).astype("uint32") << upper), x
        )
    codes = np.arange(1 << of.bitwidth, dtype=np.uint8).view(of.numpy())
    numbers = np.resize(codes.astype(CARRIERS[of].numpy()), 256)  # bits above the type's own mean nothing
    table = call.lowering.constant(numbers, f"codes of {of.name}", key=("codes", of))
    return call.lowering.compute("unpacked", shape, lambda x, t, *i: t(x(*i).astype("int32")), x, table)


def _pack(call: Call) -> Value:
    """Rounded, as what was computed may lie between two numbers of the type."""
    to, x = ir.DataType(call.attr("type")), call.x()
    if to == ir.DataType.FLOAT16:
        return call.emit(relax.op.astype(x, "float16"))
    return call.lowering.compute("packed", call.lowering.shape_of(x), lambda x, *i: packed(x(*i), to), x)


def packed(x: Any, to: ir.DataType) -> Any:
    """The code of a carried number."""
    if CARRIERS[to] != ir.DataType.FLOAT:
        return x.astype("uint8") & tirx.const((1 << to.bitwidth) - 1, "uint8")
    if to == ir.DataType.BFLOAT16:
        upper = tirx.reinterpret("uint32", _half_of_single(x)) >> tirx.const(16, "uint32")
        return upper.astype("uint16")
    bits = tirx.reinterpret("int32", x)
    if to == ir.DataType.FLOAT8E8M0:
        return ((bits >> tirx.const(23, "int32")) & tirx.const(255, "int32")).astype("uint8")
    form = ml_dtypes.finfo(to.numpy())  # type: ignore[no-untyped-call]
    digits, low = int(form.nmant), int(form.minexp)
    # The exponent and the mantissa, the exponent counted from that of the least normal number on.
    normal = ((bits & tirx.const(0x7FFFFFFF, "int32")) >> tirx.const(23 - digits, "int32")) - tirx.const(
        (low + SINGLE.bias - 1) << digits, "int32"
    )
    small = (tirx.abs(x) * tirx.const(2.0 ** (digits - low), "float32")).astype("int32")
    code = tirx.Select(tirx.abs(x) < tirx.const(2.0**low, "float32"), small, normal)
    code = code | ((bits >> tirx.const(31, "int32")) & tirx.const(1, "int32")) << tirx.const(to.bitwidth - 1, "int32")
    for special in (np.inf, -np.inf, np.nan):
        code = _special(x, code, special, to.numpy())
    return code.astype("uint8")


def _special(x: Any, code: Any, special: float, dtype: np.dtype[Any]) -> Any:
    """The code of an infinity or of NaN."""
    with np.errstate(all="ignore"):
        known = tirx.const(int(np.array(special, np.float32).astype(dtype).view(np.uint8)), "int32")
    found = tirx.isnan(x) if np.isnan(special) else tirx.EQ(x, tirx.const(special, "float32"))
    return tirx.Select(found, known, code)


def _bit_cast(call: Call) -> Value:
    """The same bits as a number of another type of the same width."""
    x, to = call.x(), storage(ir.DataType(call.attr("to")))
    shape = call.lowering.shape_of(x)
    return call.lowering.compute("bits", shape, lambda x, *i: tirx.reinterpret(to, x(*i)), x)


OPS: dict[tuple[str, str], Emitter] = {
    (DOMAIN, "Round"): _round,
    (DOMAIN, "Pack"): _pack,
    (DOMAIN, "Unpack"): _unpack,
    (DOMAIN, "BitCast"): _bit_cast,
}
"""Emitters by (domain, operator type)."""
