"""Operators that move elements without computing: reshape, transpose, slice, concatenate, pad, fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from xopt.ir.shape_rules import equal_parts
from xopt.targets.ops.bounds import inside
from xopt.targets.ops.call import Call, Emitter, label
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


FAR = 1 << 40
"""Beyond every dimension: bounds and steps of slices up to the ends of int64 mean no more than this one."""


def _reshape(call: Call) -> Value:
    old, wanted = call.shape(), call.ints(1) or []
    zeros_stay = bool(call.attr("allowzero", 0))
    shape: list[Dim] = []
    for axis, dim in enumerate(wanted):
        copies = isinstance(dim, int) and dim == 0 and not zeros_stay
        if copies and axis >= len(old):
            raise call.unsupported(f"it copies axis {axis} of a tensor of rank {len(old)}")
        shape.append(old[axis] if copies else dim)
    free = [axis for axis, dim in enumerate(shape) if isinstance(dim, int) and dim == -1]
    if len(free) > 1:
        raise call.unsupported("more than one axis is -1")
    for axis in free:
        rest = shape[:axis] + shape[axis + 1 :]
        call.require(call.dims.product(rest) >= 1, "an axis of -1 beside one of 0")
        shape[axis] = call.dims.quotient(old, rest)
    return _view(call, shape)


def _view(call: Call, shape: Sequence[Dim]) -> Value:
    """Input 0 with another shape of as many elements."""
    value = call.lowering.value(call.input(0))
    call.dims.require_sizes(shape, f"{label(call.node)}: its result")
    before, after = call.dims.product(call.shape()), call.dims.product(shape)
    call.require(call.dims.same(before, after), "its result would have another number of elements")
    if isinstance(value, np.ndarray) and all(isinstance(dim, int) for dim in shape):
        return value.reshape([int(dim) for dim in shape])
    return call.lowering.reshape(call.x(), shape)


def _flatten(call: Call) -> Value:
    shape = call.shape()
    axis = int(call.attr("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    if not 0 <= axis <= len(shape):
        raise call.unsupported(f"axis {axis} is not one of its {len(shape)}")
    return _view(call, [call.dims.product(shape[:axis]), call.dims.product(shape[axis:])])


def _squeeze(call: Call) -> Value:
    shape = call.shape()
    axes = call.numbers(1, "axes")
    if axes is None:
        axes = [axis for axis, dim in enumerate(shape) if call.dims.equal(dim, 1)]
        for axis, dim in enumerate(shape):
            call.require(axis in axes or dim > 1, f"axis {axis}, which it keeps, is of size 1")
    dropped = call.axes(axes, len(shape))
    for axis in dropped:
        call.require(call.dims.same(shape[axis], 1), f"axis {axis} is not of size 1")
    return _view(call, [dim for axis, dim in enumerate(shape) if axis not in dropped])


def _unsqueeze(call: Call) -> Value:
    given = call.numbers(1, "axes") or []
    rank = len(call.shape()) + len(given)
    inserted = call.axes(given, rank)
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


TENSORS_AT_ONCE = 16
"""Of a concatenation in one kernel, which asks for each element from which of them it comes."""


def _concat(call: Call) -> Value:
    tensors = call.xs()
    axis = call.axis(0, len(call.lowering.shape_of(tensors[0])))
    while len(tensors) > 1:
        groups = [tensors[i : i + TENSORS_AT_ONCE] for i in range(0, len(tensors), TENSORS_AT_ONCE)]
        tensors = [
            call.emit(relax.op.concat(_same_but(call, group, axis), axis)) if len(group) > 1 else group[0]
            for group in groups
        ]
    return tensors[0]


def _same_but(call: Call, tensors: list[relax.Expr], axis: int) -> list[relax.Expr]:
    """Tensors whose dimensions are provably equal except along ``axis``."""
    first = call.lowering.shape_of(tensors[0])
    result = [tensors[0]]
    for tensor in tensors[1:]:
        shape = call.lowering.shape_of(tensor)
        wanted = [dim if i == axis else first[i] for i, dim in enumerate(shape)]
        result.append(call.lowering.recast(tensor, wanted))
    return result


def _equal_parts(call: Call, size: Dim, count: int) -> list[Dim]:
    """Sizes of the parts of a Split that names none: equal, but for the last."""
    if isinstance(size, int):
        return [max(part, 0) for part in equal_parts(size, count)]
    part = call.dims.simplify(tirx.floordiv(size + (count - 1), count))
    return [*[part] * (count - 1), call.dims.simplify(size - part * (count - 1))]


def _split(call: Call) -> list[Value]:
    shape = call.shape()
    axis = call.axis(0, len(shape))
    sizes, count = call.ints(1, "split"), len(call.node.outputs)
    call.pass_over("num_outputs")
    if sizes is None:
        sizes = _equal_parts(call, shape[axis], count)
    if len(sizes) != count:
        raise call.unsupported(f"it has {count} outputs and {len(sizes)} sizes")
    for size in sizes:
        call.require(size >= 0, "a part has a negative size")
    total = call.dims.simplify(sum(sizes))
    call.require(call.dims.same(total, shape[axis]), f"its parts do not add up to axis {axis}")
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
    given = call.numbers(3, "axes")
    axes = call.axes(range(len(starts)) if given is None else given, len(shape))
    steps = call.numbers(4) or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise call.unsupported("its starts, ends, axes and steps are not of one length")
    if 0 in steps:
        raise call.unsupported("a step is 0")
    parts = {
        axis: _part(call, shape[axis], start, end, max(min(step, FAR), -FAR))
        for axis, start, end, step in zip(axes, starts, ends, steps)
    }
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
    last = _clamp(call, _from_end(call, end, dim), low, high)
    span = call.dims.simplify(last - first if step > 0 else first - last)
    return first, ceil_quotient(call, span, abs(step)), step


def ceil_quotient(call: Call, span: Dim, step: int) -> Dim:
    """How many steps begin inside a span, none when it is negative."""
    if isinstance(span, int):
        return max(-(-span // step), 0)
    count = span if step == 1 else call.dims.simplify(tirx.floordiv(span + step - 1, step))
    return count if call.dims.proves(count >= 0) else tirx.max(count, tirx.const(0, "int64"))


def _from_end(call: Call, index: Dim, dim: Dim) -> Dim:
    """An index with negative ones counted from the end; still negative when it lies before the first element."""
    if isinstance(index, int):
        index = max(min(index, FAR), -FAR)
        return call.dims.simplify(dim + index) if index < 0 else index
    if call.dims.proves(index < 0):
        return call.dims.simplify(dim + index)
    call.require(index >= 0, "a bound is negative")
    return index


def _clamp(call: Call, index: Dim, low: Dim, high: Dim) -> Dim:
    """``min(max(index, low), high)``, as simple as it can be proved."""
    if isinstance(index, int) and index >= FAR:
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
    """``x`` broadcast against a shape, in both directions as ONNX's Expand does.

    A dimension that cannot be told apart from 1 may turn out to be it: its one element is then repeated.
    """
    call.dims.require_sizes(wanted, f"{label(call.node)}: its result")
    given = call.lowering.shape_of(x)
    shape = call.dims.broadcast(wanted, given)
    if call.dims.same_shape(shape, given):
        return x
    first = len(shape) - len(given)
    unsure = {}
    for axis, dim in enumerate(given):
        one, same = (call.dims.same(dim, other) for other in (1, shape[first + axis]))
        if one is not True and same is not True:
            call.require(tirx.Or(_condition(one), _condition(same)), f"axis {axis} does not broadcast")
            unsure[axis] = one
    if not unsure:
        return call.emit(relax.op.broadcast_to(x, shape))

    def element(tensor: Any, *index: Any) -> Any:
        zero = tirx.const(0, "int64")
        at = [zero if call.dims.equal(dim, 1) else index[first + axis] for axis, dim in enumerate(given)]
        return tensor(*[tirx.Select(_condition(unsure[a]), zero, i) if a in unsure else i for a, i in enumerate(at)])

    return call.lowering.compute("expand", shape, element, x)


def _condition(truth: Any) -> Any:
    return tirx.const(truth, "bool") if isinstance(truth, bool) else truth


def _expand(call: Call) -> Value:
    return expand(call, call.x(), call.ints(1) or [])


def _tile(call: Call) -> Value:
    shape, repeats = call.shape(), call.ints(1) or []
    if len(repeats) != len(shape):
        raise call.unsupported(f"{len(repeats)} repeats do not fit rank {len(shape)}")
    result = [call.dims.simplify(dim * count) for dim, count in zip(shape, repeats)]
    call.dims.require_sizes([*repeats, *result], f"{label(call.node)}: its result")

    def element(tensor: Any, *index: Any) -> Any:
        return tensor(*[tirx.floormod(i, dim) for i, dim in zip(index, shape)])

    return call.lowering.compute("tile", result, element, call.x())


def _pad(call: Call) -> Value:
    shape = call.shape()
    before, after = _pads(call, len(shape))
    result = [call.dims.simplify(dim + a + b) for dim, a, b in zip(shape, before, after)]
    call.dims.require_sizes(result, f"{label(call.node)}: its result")
    mode = str(call.attr("mode", "constant"))
    for pad in (*before, *after) if mode == "wrap" else ():
        call.require(pad >= 0, "it takes elements away and wraps around what is left")
    for axis, dim in enumerate(shape) if mode != "constant" else ():
        call.require(dim >= 1, f"axis {axis} has no element to repeat")
        for pad in (before[axis], after[axis]) if mode == "reflect" else ():
            call.require(pad < dim, f"axis {axis} is shorter than what is to be reflected of it")
    return padded(call, result, before)


def padded(call: Call, result: Sequence[Dim], before: Sequence[Any], table: relax.Expr | None = None) -> Value:
    """Input 0 with elements added around it.

    Args:
        call: the Pad.
        result: the shape of what it gives.
        before: by axis, how many elements are added before it; with ``table``, where they stand in that.
        table: int64 vector.
    """
    x, shape, mode = call.x(), call.shape(), str(call.attr("mode", "constant"))
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise call.unsupported("there is no such mode")
    fill = _fill(call, str(x.ty.dtype))
    extra = [] if table is None else [table]

    def element(tensor: Any, value: Any, *rest: Any) -> Any:
        index = rest[len(extra) :]
        shifts = before if table is None else [rest[0](place) for place in before]
        at = [i - shift for i, shift in zip(index, shifts)]
        if mode != "constant":
            sources = [_mirrored(i, dim, mode) for i, dim in zip(at, shape)]
            return tensor(*(sources if table is None else [inside(i, dim) for i, dim in zip(sources, shape)]))
        moved = [axis for axis, shift in enumerate(shifts) if not (_is_zero(shift) and same[axis])]
        within = [tirx.all(at[axis] >= 0, at[axis] < shape[axis]) for axis in moved]
        return tirx.if_then_else(tirx.all(*within), tensor(*at), value()) if within else tensor(*at)

    same = [call.dims.equal(new, old) for new, old in zip(result, shape)]
    return call.lowering.compute("pad", result, element, x, fill, *extra)


def _fill(call: Call, dtype: str) -> relax.Expr:
    """What a Pad adds, as a scalar; it may be data."""
    if not call.has(2):
        return relax.const(0, dtype)
    return call.lowering.reshape(call.x(2), [])


def _pads(call: Call, rank: int) -> tuple[list[Dim], list[Dim]]:
    """Elements to add before and after each axis; negative ones are taken away."""
    pads, given = call.ints(1, "pads") or [], call.numbers(3)
    axes = call.axes(range(rank) if given is None else given, rank)
    if len(pads) != 2 * len(axes):
        raise call.unsupported(f"{len(pads)} pads do not fit {len(axes)} axes")
    before: list[Dim] = [0] * rank
    after: list[Dim] = [0] * rank
    for position, axis in enumerate(axes):
        before[axis], after[axis] = pads[position], pads[position + len(axes)]
    return before, after


def _is_zero(value: Dim) -> bool:
    return isinstance(value, int) and value == 0


def _mirrored(index: Any, dim: Dim, mode: str) -> Any:
    """The source index of a padded position for the modes reflect, edge and wrap."""
    if mode == "edge":
        return inside(index, dim)
    if mode == "wrap":
        return tirx.floormod(index, dim)
    index = tirx.abs(index)
    return tirx.min(index, 2 * (dim - 1) - index)


def _constant_of_shape(call: Call) -> Value:
    value, shape = call.attr("value"), call.ints(0) or []
    array = np.zeros(1, np.float32) if value is None else value.numpy().reshape(-1)
    if array.size != 1:
        raise call.unsupported("its value is no single number")
    call.dims.require_sizes(shape, f"{label(call.node)}: its result")
    return call.lowering.full(shape, array[0], str(array.dtype))


def _triangle(call: Call) -> Value:
    given, upper, shape = call.numbers(1), bool(call.attr("upper", 1)), call.shape()
    offset = tirx.const(max(min(given[0], FAR), -FAR) if given else 0, "int64")

    def element(x: Any, *index: Any) -> Any:
        away = index[-1] - index[-2]
        kept = away >= offset if upper else away <= offset
        return tirx.Select(kept, x(*index), tirx.const(0, x.dtype))

    return call.lowering.compute("triangle", shape, element, call.x())


OPS: dict[str, Emitter] = {
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Transpose": _transpose, "Concat": _concat, "Split": _split, "Slice": _slice, "Expand": _expand, "Tile": _tile,
    "Pad": _pad, "ConstantOfShape": _constant_of_shape, "Trilu": _triangle,
}  # fmt: skip
"""Emitters by operator type."""
