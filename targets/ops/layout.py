"""Operators that move elements without computing: reshape, transpose, slice, concatenate, pad, fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.lowering import Value


def _reshape(call: Call) -> Value:
    old, wanted = call.shape(), call.ints(1) or []
    shape: list[Dim] = []
    for axis, dim in enumerate(wanted):
        copies = isinstance(dim, int) and dim == 0 and not call.attr("allowzero", 0)
        shape.append(old[axis] if copies else dim)
    if (free := _free_axis(shape)) is not None:
        shape[free] = call.dims.quotient(old, shape[:free] + shape[free + 1 :])
    return _view(call, shape)


def _free_axis(shape: Sequence[Dim]) -> int | None:
    """The axis given as -1."""
    return next((axis for axis, dim in enumerate(shape) if isinstance(dim, int) and dim == -1), None)


def _view(call: Call, shape: Sequence[Dim]) -> Value:
    value = call.lowering.value(call.input(0))
    if isinstance(value, np.ndarray) and all(isinstance(dim, int) for dim in shape):
        return value.reshape([int(dim) for dim in shape])
    return call.lowering.reshape(call.x(), shape)


def _flatten(call: Call) -> Value:
    shape = call.shape()
    axis = int(call.attr("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return _view(call, [call.dims.product(shape[:axis]), call.dims.product(shape[axis:])])


def _squeeze(call: Call) -> Value:
    shape = call.shape()
    axes = call.numbers(1, "axes")
    if axes is None:
        axes = [axis for axis, dim in enumerate(shape) if call.dims.equal(dim, 1)]
    dropped = {axis % len(shape) for axis in axes}
    return _view(call, [dim for axis, dim in enumerate(shape) if axis not in dropped])


def _unsqueeze(call: Call) -> Value:
    axes = call.numbers(1, "axes") or []
    rank = len(call.shape()) + len(axes)
    inserted = {axis % rank for axis in axes}
    rest = iter(call.shape())
    return _view(call, [1 if axis in inserted else next(rest) for axis in range(rank)])


def _transpose(call: Call) -> Value:
    rank = len(call.shape())
    order = call.attr("perm") or list(reversed(range(rank)))
    shape = call.shape()
    kept = [axis for axis in order if not call.dims.equal(shape[axis], 1)]
    if kept == sorted(kept):
        return _view(call, [shape[axis] for axis in order])
    first = call.lowering.tokens_first.get(call.lowering.base(call.x()))
    if first is not None and list(order) == [0, *range(2, rank), 1]:
        return call.lowering.reshape(first, [shape[axis] for axis in order])
    return call.emit(relax.op.permute_dims(call.x(), [int(axis) for axis in order]))


def _concat(call: Call) -> Value:
    tensors = call.xs()
    if len(tensors) == 1:
        return tensors[0]
    axis = call.axis(0, len(call.lowering.shape_of(tensors[0])))
    return call.emit(relax.op.concat(_same_but(call, tensors, axis), axis))


def _same_but(call: Call, tensors: list[relax.Expr], axis: int) -> list[relax.Expr]:
    """Tensors whose dimensions are provably equal except along ``axis``."""
    first = call.lowering.shape_of(tensors[0])
    result = [tensors[0]]
    for tensor in tensors[1:]:
        shape = call.lowering.shape_of(tensor)
        wanted = [dim if i == axis else first[i] for i, dim in enumerate(shape)]
        result.append(call.lowering.recast(tensor, wanted))
    return result


def _split(call: Call) -> list[Value]:
    shape = call.shape()
    axis = call.axis(0, len(shape))
    sizes = call.ints(1, "split")
    if sizes is None:
        count = len(call.node.outputs)
        if not isinstance(shape[axis], int):
            raise call.unsupported("it splits a dynamic dimension into equal parts")
        chunk = -(-shape[axis] // count)
        sizes = [min(chunk, shape[axis] - i * chunk) for i in range(count)]
    starts: list[Dim] = [0]
    for size in sizes[:-1]:
        starts.append(call.dims.simplify(starts[-1] + size))
    return [strided(call, call.x(), {axis: (start, size, 1)}) for start, size in zip(starts, sizes)]


def strided(call: Call, x: relax.Expr, parts: dict[int, tuple[Dim, Dim, int]]) -> relax.Expr:
    """The part of ``x`` given by axis: (first index, count, step)."""
    shape = call.lowering.shape_of(x)
    parts = {axis: p for axis, p in parts.items() if not (call.dims.equal(p[1], shape[axis]) and p[2] == 1)}
    if not parts:
        return x
    result = [parts[axis][1] if axis in parts else dim for axis, dim in enumerate(shape)]

    def element(tensor: Any, *index: Any) -> Any:
        where = [parts[a][0] + i * parts[a][2] if a in parts else i for a, i in enumerate(index)]
        return tensor(*where)

    return call.lowering.compute("slice", result, element, x)


def _slice(call: Call) -> Value:
    shape = call.shape()
    starts, ends = call.ints(1, "starts") or [], call.ints(2, "ends") or []
    axes = call.numbers(3, "axes") or list(range(len(starts)))
    steps = call.numbers(4) or [1] * len(starts)
    parts = {}
    for axis, start, end, step in zip(axes, starts, ends, steps):
        axis %= len(shape)
        parts[axis] = _part(call, shape[axis], start, end, step)
    return strided(call, call.x(), parts)


def _part(call: Call, dim: Dim, start: Dim, end: Dim, step: int) -> tuple[Dim, Dim, int]:
    """First index and count of ``start:end:step`` on a dimension, by ONNX's rules of clamping.

    A dynamic end on a static dimension (a table of positions cut to the sequence) is taken to lie inside it: the
    session refuses longer inputs, which could not work.
    """
    if isinstance(dim, int) and step == 1:
        call.dims.limit(end, dim)
    low, high = (0, dim) if step > 0 else (-1, dim - 1)
    first = _clamp(call, _from_end(call, start, dim), 0, dim if step > 0 else dim - 1)
    last = _clamp(call, _from_end(call, end, dim) if not _is_below(end, dim, step) else -1, low, high)
    span = call.dims.simplify(last - first if step > 0 else first - last)
    count = span if abs(step) == 1 else _ceil_quotient(call, span, abs(step))
    return first, count if not isinstance(count, int) else max(count, 0), step


def _is_below(end: Dim, dim: Dim, step: int) -> bool:
    """Whether a backward slice runs past element 0 (ends at or below ``-dim - 1``)."""
    if step > 0 or not isinstance(end, int) or end >= 0:
        return False
    return end < -(1 << 31) or (isinstance(dim, int) and end < -dim)


def _ceil_quotient(call: Call, span: Dim, step: int) -> Dim:
    return -(-span // step) if isinstance(span, int) else call.dims.simplify(tirx.floordiv(span + step - 1, step))


def _from_end(call: Call, index: Dim, dim: Dim) -> Dim:
    if isinstance(index, int):
        return call.dims.simplify(dim + index) if index < 0 else index
    return call.dims.simplify(dim + index) if call.dims.proves(index < 0) else index


def _clamp(call: Call, index: Dim, low: Dim, high: Dim) -> Dim:
    """``min(max(index, low), high)``, as simple as it can be proved."""
    if isinstance(index, int) and index >= 1 << 31:
        return call.dims.simplify(high)
    for bound, build, beyond in ((low, tirx.max, -1), (high, tirx.min, 1)):
        excess = call.dims.simplify(index - bound)
        if isinstance(excess, int):
            index = bound if excess * beyond > 0 else index
        elif call.dims.proves(excess >= 0 if beyond > 0 else excess <= 0):
            index = bound
        elif not call.dims.proves(excess <= 0 if beyond > 0 else excess >= 0):
            index = build(*(tirx.IntImm("int64", x) if isinstance(x, int) else x for x in (index, bound)))
    return call.dims.simplify(index)


def expand(call: Call, x: relax.Expr, wanted: Sequence[Dim]) -> relax.Expr:
    """``x`` broadcast against a shape, in both directions as ONNX's Expand does."""
    shape = call.dims.broadcast(call.lowering.shape_of(x), wanted)
    if call.dims.same_shape(shape, call.lowering.shape_of(x)):
        return x
    return call.emit(relax.op.broadcast_to(x, shape))


def _expand(call: Call) -> Value:
    return expand(call, call.x(), call.ints(1) or [])


def _tile(call: Call) -> Value:
    shape, repeats = call.shape(), call.ints(1) or []
    result = [call.dims.simplify(dim * count) for dim, count in zip(shape, repeats)]

    def element(tensor: Any, *index: Any) -> Any:
        return tensor(*[tirx.floormod(i, dim) for i, dim in zip(index, shape)])

    return call.lowering.compute("tile", result, element, call.x())


def _pad(call: Call) -> Value:
    x, shape = call.x(), call.shape()
    pads = call.ints(1, "pads") or []
    axes = [axis % len(shape) for axis in call.numbers(3) or range(len(shape))]
    before: list[Dim] = [0] * len(shape)
    after: list[Dim] = [0] * len(shape)
    for position, axis in enumerate(axes):
        before[axis], after[axis] = pads[position], pads[position + len(axes)]
    value = call.const(2)
    fill = tirx.const(0 if value is None else value.reshape(-1)[0].item(), str(x.ty.dtype))
    result = [call.dims.simplify(dim + a + b) for dim, a, b in zip(shape, before, after)]
    mode = call.attr("mode", "constant")

    def element(tensor: Any, *index: Any) -> Any:
        at = [i - b for i, b in zip(index, before)]
        if mode != "constant":
            return tensor(*[_mirrored(i, dim, mode) for i, dim in zip(at, shape)])
        padded = [a for a in range(len(shape)) if not (_is_zero(before[a]) and _is_zero(after[a]))]
        inside = [tirx.all(at[a] >= 0, at[a] < shape[a]) for a in padded]
        return tirx.if_then_else(tirx.all(*inside), tensor(*at), fill) if inside else tensor(*at)

    return call.lowering.compute("pad", result, element, x)


def _is_zero(value: Dim) -> bool:
    return isinstance(value, int) and value == 0


def _mirrored(index: Any, dim: Dim, mode: str) -> Any:
    """The source index of a padded position for the modes reflect, edge and wrap."""
    if mode == "edge":
        return tirx.min(tirx.max(index, tirx.const(0, "int64")), dim - 1)
    if mode == "wrap":
        return tirx.floormod(index, dim)
    index = tirx.abs(index)
    return tirx.min(index, 2 * (dim - 1) - index)


def _constant_of_shape(call: Call) -> Value:
    value = call.attr("value")
    array = np.zeros(1, np.float32) if value is None else value.numpy().reshape(-1)
    fill = relax.const(array[0], str(array.dtype))
    return call.emit(relax.op.full(call.ints(0) or [], fill, str(array.dtype)))


def _range(call: Call) -> Value:
    dtype = call.node.outputs[0].dtype
    name = "int64" if dtype is None else dtype.numpy().name
    start, limit, step = (_single(call, index) for index in range(3))
    if isinstance(step, int) and step == 1 and isinstance(start, int):
        count = call.dims.simplify(limit - start)
    elif all(isinstance(x, (int, float)) for x in (start, limit, step)):
        count = max(int(np.ceil((limit - start) / step)), 0)
    else:
        count = _ceil_quotient(call, call.dims.simplify(limit - start), step)
    return call.lowering.compute(
        "range", [count], lambda i: tirx.Cast(name, start + i * step) if name != "int64" else start + i * step
    )


def _single(call: Call, index: int) -> Dim:
    array = call.known(index)
    if array is None:
        raise call.unsupported("its bounds depend on the data")
    return array.reshape(-1)[0]


def _triangle(call: Call) -> Value:
    offset = call.numbers(1)
    function = relax.op.triu if call.attr("upper", 1) else relax.op.tril
    return call.emit(function(call.x(), offset[0] if offset else 0))


OPS: dict[str, Emitter] = {
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Transpose": _transpose, "Concat": _concat, "Split": _split, "Slice": _slice, "Expand": _expand, "Tile": _tile,
    "Pad": _pad, "ConstantOfShape": _constant_of_shape, "Range": _range, "Trilu": _triangle,
}  # fmt: skip
"""Emitters by operator type."""
