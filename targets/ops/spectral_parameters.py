"""Transforms whose axis, step or length only the data tell, and mel filters: every element by its definition.

Such files are rare, and their transforms short: each result is a sum over the axis that is transformed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import relax, te, tirx

from xopt.kernels.emit import i64
from xopt.targets.emitting import pick
from xopt.targets.ops.bounds import refuse_rows
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.parameters import numbers, vector
from xopt.targets.symbolic import Dim
from xopt.targets.widening import storage

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

LONGEST = 4096
"""Of an axis that is summed over for each result."""
LARGEST = 1 << 14
"""Bins of a spectrum, and mel bins."""
ZERO = tirx.const(0, "int64")


def dft(call: Call) -> Value:
    """DFT along an axis that is an input: [..., n, ..., 1 | 2] -> [..., K, ..., 1 | 2]."""
    *sizes, parts = call.shape()
    onesided, inverse = bool(call.attr("onesided", 0)), bool(call.attr("inverse", 0))
    call.pass_over("axis")
    wanted, half = call.numbers(1), onesided and inverse
    if not all(isinstance(size, int) and 0 < size <= LONGEST for size in sizes) or parts not in (1, 2):
        raise call.unsupported("it transforms an axis of a size that is not known")
    rank, x, given = len(sizes), call.x(), vector(call, 2)
    refuse_rows(
        call, 2, 1, lambda row: tirx.Or(row[0] < -rank - 1, tirx.Or(row[0] >= rank, row[0] == -1)), "no such axis"
    )

    def measures(axis: Any) -> tuple[Any, Any, Any]:
        """The axis, its size, and the length of the transform."""
        at = tirx.Select(axis(ZERO) < 0, axis(ZERO) + rank + 1, axis(ZERO))
        size = pick(at, sizes)
        length = i64(wanted[0]) if wanted else 2 * (size - 1) if half else size
        return at, size, tirx.max(length, i64(1))

    def shape(axis: Any) -> list[Any]:
        at, _, length = measures(axis)
        count = tirx.floordiv(length, i64(2)) + 1 if onesided and not inverse else length
        return [tirx.Select(at == place, count, i64(size)) for place, size in enumerate(sizes)]

    fixed = not onesided and not wanted
    out: list[Dim] = sizes if fixed else call.lowering.decide(numbers(call, "sizes", rank, shape, given), rank)

    def element(x: Any, axis: Any, *index: Any) -> Any:
        at, size, length = measures(axis)
        j = te.reduce_axis((ZERO, i64(max(sizes))), "j")
        places = [
            tirx.Select(at == place, tirx.min(j.var, i64(sizes[place] - 1)), tirx.min(i, i64(sizes[place] - 1)))
            for place, i in enumerate(index[:-1])
        ]
        used = tirx.min(size, tirx.floordiv(length, i64(2)) + 1 if half else length)
        value = _turned(x, places, parts, pick(at, index[:-1]) * j.var, length, inverse, index[-1])
        if inverse:
            twice = tirx.And(j.var > 0, 2 * j.var < length) if half else tirx.const(False, "bool")
            value = value * tirx.Select(twice, _number(2), _number(1)) / length.astype("float64")
        return te.sum(tirx.Select(j.var < used, value, _number(0)), axis=j)

    return _summed(call, [*out, 1 if half else 2], element, x, given)


def stft(call: Call) -> Value:
    """STFT with a step, or a length of frames, that is an input."""
    shape = call.shape()
    signal = call.x() if len(shape) == 3 else call.lowering.reshape(call.x(), [*shape, 1])
    batch, total, parts = call.lowering.shape_of(signal)
    onesided, windowed = bool(call.attr("onesided", 1)), call.has(2)
    width = call.shape(2)[0] if windowed else total
    if not all(isinstance(size, int) and 0 < size <= LONGEST for size in (total, width)) or parts not in (1, 2):
        raise call.unsupported("the length of the signal is not known")
    call.require(width <= total, "the signal is shorter than a frame")
    given = [vector(call, 1), *([vector(call, 3)] if call.has(3) else [])]
    refuse_rows(call, 1, 1, lambda row: row[0] < 1, "a step is below 1")
    if call.has(3):
        refuse_rows(call, 3, 1, lambda row: tirx.Or(row[0] < 1, row[0] > width), "a frame of a length that cannot be")

    def length_of(lengths: Sequence[Any]) -> Any:
        return tirx.max(tirx.min(lengths[0](ZERO), i64(width)), i64(1)) if lengths else i64(width)

    def sizes(step: Any, *lengths: Any) -> list[Any]:
        length = length_of(lengths)
        frames = tirx.floordiv(total - length, tirx.max(step(ZERO), i64(1))) + 1
        return [frames, tirx.floordiv(length, i64(2)) + 1 if onesided else length]

    frames, count = call.lowering.decide(numbers(call, "sizes", 2, sizes, *given), 2)

    def element(x: Any, *rest: Any) -> Any:
        *tensors, row, frame, k, part = rest
        window, (step, *lengths) = (tensors[0], tensors[1:]) if windowed else (None, tensors)
        length = length_of(lengths)
        j = te.reduce_axis((ZERO, i64(width)), "j")
        place = tirx.max(tirx.min(frame * step(ZERO) + j.var, i64(total - 1)), ZERO)
        value = _turned(x, [row, place], parts, j.var * k, length, False, part)
        value = value * window(j.var).astype("float64") if window is not None else value
        return te.sum(tirx.Select(j.var < length, value, _number(0)), axis=j)

    inputs = [signal, *([call.x(2)] if windowed else []), *given]
    return _summed(call, [batch, frames, count, 2], element, *inputs)


def _turned(x: Any, places: Sequence[Any], parts: int, steps: Any, length: Any, inverse: bool, part: Any) -> Any:
    """The part (0: real) of a complex number of ``x`` turned by ``steps / length`` of a circle, float64."""
    angle = tirx.floormod(steps, length).astype("float64") * _number(2 * math.pi) / length.astype("float64")
    cos, sin = tirx.cos(angle), tirx.sin(angle) * _number(1 if inverse else -1)
    real = x(*places, ZERO).astype("float64")
    imaginary = x(*places, tirx.const(1, "int64")).astype("float64") if parts == 2 else _number(0)
    return tirx.Select(part == 0, real * cos - imaginary * sin, real * sin + imaginary * cos)


def _summed(call: Call, shape: Sequence[Dim], element: Callable[..., Any], *inputs: relax.Expr) -> relax.Expr:
    """Sums in float64, as the type of the first input: a result near 0 is a difference of large terms."""
    wide = call.lowering.compute("spectrum", shape, element, *inputs)
    return call.emit(relax.op.astype(wide, str(inputs[0].ty.dtype)))


def _number(value: float) -> Any:
    return tirx.const(value, "float64")


def _mel(call: Call) -> Value:
    """MelWeightMatrix [dft_length // 2 + 1, bins]: triangles between bins that are equally far on the mel scale."""
    dtype = storage(ir.DataType(int(call.attr("output_datatype", 1))))
    counts = [vector(call, place) for place in range(3)]
    edges = [call.lowering.reshape(call.x(place), [1]) for place in (3, 4)]
    for place in range(3):
        refuse_rows(call, place, 1, lambda row: tirx.Or(row[0] < 1, row[0] > LARGEST), "a count that cannot be")

    def sizes(bins: Any, length: Any) -> list[Any]:
        most = i64(LARGEST)
        rows = tirx.floordiv(tirx.max(tirx.min(length(ZERO), most), ZERO), i64(2)) + 1
        return [rows, tirx.max(tirx.min(bins(ZERO), most), ZERO)]

    rows, columns = call.lowering.decide(numbers(call, "sizes", 2, sizes, *counts[:2]), 2)

    def element(bins: Any, length: Any, rate: Any, low: Any, high: Any, row: Any, column: Any) -> Any:
        mels = [_number(2595 / math.log(10)) * tirx.log(1 + e(ZERO).astype("float64") / 700) for e in (low, high)]
        step = (mels[1] - mels[0]) / (bins(ZERO) + 2).astype("float64")

        def place(index: Any) -> Any:
            mel = index.astype("float64") * step + mels[0]
            hertz = 700 * (tirx.exp(mel * _number(math.log(10) / 2595)) - 1)
            scaled = (length(ZERO) + 1).astype("float64") * hertz / tirx.max(rate(ZERO), i64(1)).astype("float64")
            return tirx.floor(scaled).astype("int64")

        left, middle, right = (place(column + offset) for offset in range(3))
        rising = (row - left).astype("float64") / tirx.max(middle - left, i64(1)).astype("float64")
        falling = (right - row).astype("float64") / tirx.max(right - middle, i64(1)).astype("float64")
        up = tirx.And(row >= left, row <= middle)
        weight = tirx.Select(up, tirx.Select(middle == left, _number(1.0), rising), _number(0.0))
        weight = tirx.Select(tirx.And(row >= middle, row < right), falling, weight)
        return weight.astype(dtype)

    return call.lowering.compute("mel", [rows, columns], element, *counts, *edges)


OPS: dict[str, Emitter] = {"MelWeightMatrix": _mel}
"""Emitters by operator type."""
