"""Operands of matrix products in 32-bit lanes of one, two or four values, and the instruction that multiplies them.

    float32    1 value a lane      acc += a * w                     a fused multiply-add
    bfloat16   2 values a lane     acc += a0 * w0 + a1 * w1         VDPBF16PS, else two multiply-adds after shifts
    int8       4 values a lane     acc += sum of four u8 * s8       VPDPBUSD, else two VPMADDWD, else shifts; exact

Activations lie with the reduced dimension last, so a lane is four neighbouring bytes, broadcast; weights are packed so
that a lane holds the same neighbours of one column.  A reduced dimension that does not fill its lanes is padded with
zeros.  bfloat16 is stored as uint16, because TVM turns arithmetic on its own bfloat16 vectors into float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm import tirx

from xopt.kernels import isa as isas
from xopt.kernels.emit import (
    FLOAT32_FMA,
    Buffer,
    Dot,
    Expr,
    argument,
    flat,
    i64,
    keep,
    llvm_function,
    load,
    local,
    partial_store,
    put,
    serial,
    splat,
    store,
)
from xopt.kernels.isa import Isa


@dataclass(frozen=True)
class Precision:
    """How the operands of a product are stored.

    Attributes:
        pack: values in a 32-bit lane.
        activation, weight: element types in memory.
        accumulator: element type of the sums.
    """

    name: str
    pack: int
    activation: str
    weight: str
    accumulator: str

    def padded(self, extent: int) -> int:
        """``extent`` rounded up to whole lanes."""
        return -(-extent // self.pack) * self.pack


FLOAT32 = Precision("float32", 1, "float32", "float32", "float32")
BFLOAT16 = Precision("bfloat16", 2, "uint16", "uint16", "float32")
INT8 = Precision("int8", 4, "uint8", "int8", "int32")

BY_NAME = {precision.name: precision for precision in (FLOAT32, BFLOAT16, INT8)}

STORAGE = {"float32": "float32", "bfloat16": "uint16", "uint8": "uint8", "uint8-columns": "uint8"}
"""Element type in memory of each format that a kernel can write."""

MOST_LANES = max(isa.lanes for isa in isas.BY_NAME.values())
"""float32 numbers in the longest vector of any instruction set."""


# -- operands ----------------------------------------------------------------------------------------------------------
def scalar_lane(buffer: Buffer, precision: Precision, *index: int | Expr) -> Expr:
    """One lane of an activation: the value at ``index``, or the pair or four from there on as int32."""
    if precision.pack == 1:
        return buffer[tuple(i64(i) for i in index)]
    return tirx.reinterpret("int32", load(buffer, *index, lanes=precision.pack))


def vector_lanes(buffer: Buffer, precision: Precision, *index: int | Expr, lanes: int) -> Expr:
    """``lanes`` neighbouring lanes, from element ``index`` on: of float32, else as int32."""
    if precision.pack == 1:
        return load(buffer, *index, lanes=lanes)
    return tirx.reinterpret(f"int32x{lanes}", load(buffer, *index, lanes=lanes * precision.pack))


def dot(precision: Precision, isa: Isa) -> Dot:
    """The step of a sum of products on an instruction set."""
    if precision is FLOAT32:
        return FLOAT32_FMA
    if precision is BFLOAT16:
        return Dot("float32", _bf16_instruction(isa) if isa.bf16 else _bf16_by_shifts(isa))
    if isa.vnni:
        return Dot("int32", _int8_instruction(isa))
    return Dot("int32", _int8_by_pairs(isa) if isa.pairs else _int8_by_shifts(isa))


Step = Callable[[Expr, Expr, Expr], Expr]


def _bf16_instruction(isa: Isa) -> Step:
    lanes, bits = isa.lanes, 32 * isa.lanes
    name = f"xopt_dpbf16_{bits}"
    floats, ints, halves = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    text = f"""
declare {floats} @llvm.x86.avx512bf16.dpbf16ps.{bits}({floats}, {halves}, {halves})
define linkonce_odr {floats} @{name}({floats} %acc, {ints} %a, {ints} %w) alwaysinline nounwind {{
  %x = bitcast {ints} %a to {halves}
  %y = bitcast {ints} %w to {halves}
  %sum = call {floats} @llvm.x86.avx512bf16.dpbf16ps.{bits}({floats} %acc, {halves} %x, {halves} %y)
  ret {floats} %sum
}}"""
    return lambda acc, a, w: llvm_function(name, text, f"float32x{lanes}", acc, a, w)


def _bf16_by_shifts(isa: Isa) -> Step:
    lanes = isa.lanes
    sixteen, high_half = splat(16, lanes, "int32"), splat(-(1 << 16), lanes, "int32")

    def low(pair: Expr) -> Expr:
        return tirx.reinterpret(f"float32x{lanes}", pair << sixteen)

    def high(pair: Expr) -> Expr:
        return tirx.reinterpret(f"float32x{lanes}", pair & high_half)

    return lambda acc, a, w: acc + low(a) * low(w) + high(a) * high(w)


def _int8_instruction(isa: Isa) -> Step:
    lanes = isa.lanes
    intrinsic = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"

    def step(acc: Expr, a: Expr, w: Expr) -> Expr:
        unsigned, signed = (tirx.reinterpret(f"{kind}8x{4 * lanes}", x) for kind, x in (("uint", a), ("int", w)))
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, acc, unsigned, signed)

    return step


def _int8_by_pairs(isa: Isa) -> Step:
    """The even and the odd bytes, widened to 16 bits; VPMADDUBSW, which takes the bytes as they are, saturates."""
    lanes = isa.lanes
    intrinsic = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"

    def halves(value: Expr) -> Expr:
        return tirx.reinterpret(f"int16x{2 * lanes}", value)

    def multiplied(a: Expr, w: Expr) -> Expr:
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, a, w)

    eight = splat(8, 2 * lanes, "int16")

    def step(acc: Expr, a: Expr, w: Expr) -> Expr:
        even = halves(a & splat(0x00FF00FF, lanes, "int32"))
        odd = halves((a >> splat(8, lanes, "int32")) & splat(0x00FF00FF, lanes, "int32"))
        return acc + multiplied(even, (halves(w) << eight) >> eight) + multiplied(odd, halves(w) >> eight)

    return step


def _int8_by_shifts(isa: Isa) -> Step:
    lanes = isa.lanes

    def shift(bits: int) -> Expr:
        return splat(bits, lanes, "int32")

    def step(acc: Expr, a: Expr, w: Expr) -> Expr:
        for byte in range(4):
            unsigned = (a >> shift(8 * byte)) & shift(255)
            acc = acc + unsigned * ((w << shift(24 - 8 * byte)) >> shift(24))
        return acc

    return step


# -- packing, in numpy -------------------------------------------------------------------------------------------------
def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact."""
    return (values.astype(np.uint32) << 16).view(np.float32)


# -- results -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """A result that a kernel writes in one or more formats: "float32", "bfloat16" or "uint8".

    Attributes:
        buffers: a tensor for each format.
        quantization: float32 [2], one over the scale and the zero point of "uint8": q = round(x / scale) + zero point,
            saturated; [2, columns] for "uint8-columns", see `pack_quantization`.
    """

    buffers: tuple[Buffer, ...]
    quantization: Buffer | None
    isa: Isa

    @property
    def lanes(self) -> int:
        return self.isa.lanes

    def flat(self, shape: Sequence[int | Expr]) -> Result:
        """The same memory under another shape."""
        return Result(tuple(flat(buffer, shape) for buffer in self.buffers), self.quantization, self.isa)

    def store(self, value: Expr, *index: int | Expr) -> None:
        """Store a float32 vector from ``index`` on."""
        value = keep(value, self.lanes)
        for buffer in self.buffers:
            store(buffer, self._converted(value, buffer.dtype, index[-1]), *index, lanes=self.lanes)

    def partial_store(self, value: Expr, *index: int | Expr, count: int | Expr) -> None:
        """Store the first ``count`` lanes."""
        value = keep(value, self.lanes)
        for buffer in self.buffers:
            converted = self._converted(value, buffer.dtype, index[-1])
            partial_store(buffer, converted, *index, count=count, lanes=self.lanes)

    def scatter(self, value: Expr, count: Expr, index: Callable[[Expr], tuple[Expr, ...]]) -> None:
        """Store the first ``count`` lanes, lane i at ``index(i)``."""
        value = keep(value, self.lanes)
        for buffer in self.buffers:
            spill = local((self.lanes,), buffer.dtype)
            store(spill, self._converted(value, buffer.dtype, 0), 0, lanes=self.lanes)
            with serial(count) as lane:
                put(buffer, spill[lane], *index(lane))

    def _converted(self, value: Expr, dtype: str, column: int | Expr) -> Expr:
        if str(dtype) == "float32":
            return value
        return bfloat16(value, self.isa) if str(dtype) == "uint16" else self._quantized(value, column)

    def _quantized(self, value: Expr, column: int | Expr) -> Expr:
        assert self.quantization is not None
        lanes = self.lanes
        if len(self.quantization.shape) == 1:
            inverse, zero_point = (splat(self.quantization[i64(i)], lanes) for i in range(2))
        else:
            inverse, zero_point = (load(self.quantization, i, column, lanes=lanes) for i in range(2))
        q = keep(tirx.nearbyint(value * inverse) + zero_point, lanes)
        nothing, most = splat(0.0, lanes), splat(255.0, lanes)
        q = keep(tirx.Select(q > nothing, q, nothing), lanes)  # NaN becomes 0
        return tirx.Select(q < most, q, most).astype(f"uint8x{lanes}")


def side_by_side(values: Sequence[Expr], pack: int, lanes: int) -> Expr:
    """Up to ``pack`` vectors of stored numbers (of one lane: scalars) as int32 lanes, the first lowest, others zero."""
    kind, result = (f"{dtype}32" if lanes == 1 else f"{dtype}32x{lanes}" for dtype in ("uint", "int"))
    whole = values[0].astype(kind)
    for i, value in enumerate(values[1:], start=1):
        bits = 32 // pack * i
        shift = tirx.const(bits, "uint32") if lanes == 1 else splat(bits, lanes, "uint32")
        whole = whole | (value.astype(kind) << shift)
    return tirx.reinterpret(result, whole)


def bfloat16(value: Expr, isa: Isa) -> Expr:
    """Round a float32 vector to bfloat16, to nearest even, as uint16; NaN stays NaN."""
    lanes = isa.lanes
    if not isa.bf16:
        bits = tirx.reinterpret(f"uint32x{lanes}", keep(value, lanes))
        half, one, sixteen = (splat(number, lanes, "uint32") for number in (0x7FFF, 1, 16))
        rounded = (bits + half + ((bits >> sixteen) & one)) >> sixteen
        quiet = (bits >> sixteen) | splat(0x40, lanes, "uint32")
        return tirx.Select(value == value, rounded, quiet).astype(f"uint16x{lanes}")
    name = f"xopt_to_bf16_{lanes}"
    text = f"""
define linkonce_odr <{lanes} x i16> @{name}(<{lanes} x float> %x) alwaysinline nounwind {{
  %rounded = fptrunc <{lanes} x float> %x to <{lanes} x bfloat>
  %bits = bitcast <{lanes} x bfloat> %rounded to <{lanes} x i16>
  ret <{lanes} x i16> %bits
}}"""
    return llvm_function(name, text, f"uint16x{lanes}", value)


def result_arguments(name: str, formats: Sequence[str], shape: Sequence[int | Expr]) -> tuple[Buffer, ...]:
    """Declare an output tensor for each format."""
    return tuple(argument(f"{name}_{form}", shape, STORAGE[form]) for form in formats)


def quantization_argument(formats: Sequence[str], columns: int = 0) -> Buffer | None:
    """Declare the input that quantized results need."""
    if "uint8-columns" in formats:
        return argument("quantization", (2, columns + -columns % MOST_LANES))
    return argument("quantization", (2,)) if "uint8" in formats else None


def pack_quantization(
    scale: npt.NDArray[np.float32] | float, zero_point: npt.NDArray[np.float32] | float
) -> npt.NDArray[np.float32]:
    """What quantized results need, of numbers or of a number for each column, which are padded to whole vectors."""
    packed = np.stack([np.float32(1) / np.asarray(scale, np.float32), np.asarray(zero_point, np.float32)])
    return packed if packed.ndim == 1 else np.pad(packed, ((0, 0), (0, -packed.shape[1] % MOST_LANES)))


def suffix(precision: str, formats: Sequence[str]) -> list[str]:
    """Parts of a kernel's name; none for a kernel that is float32 throughout."""
    parts = [precision] if precision != "float32" else []
    return parts + ([] if tuple(formats) == ("float32",) else ["to", *formats])
