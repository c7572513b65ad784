"""Operators whose integer parameters (axes, shapes, bounds, pads, repeats, counts) are known only when the model runs.

    parameters ──▶ sizes int64 [n] ──▶ dimensions of the result       a small kernel, clamped to what can be
         └──────────────────────────▶ elements of the result          read where each element is computed
Whatever the parameters say, kernels stay inside their tensors; parameters that ONNX does not allow end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from xopt.kernels.emit import i64
from xopt.targets.emitting import pick
from xopt.targets.ops.bounds import inside, refuse_rows
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.indexing import in_order, one_hot, sums_along
from xopt.targets.ops.layout import padded, strided
from xopt.targets.ops.reduction import REDUCTIONS, nothing, over
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

LARGEST = 1 << 28
"""Elements of a result whose size the data decide: a wrong number must not take all memory."""
Element = Callable[..., Any]


def vector(call: Call, index: int) -> relax.Expr:
    """Input ``index`` as int64 [n], n known. Raises InputError E-UNSUPPORTED-OP when n is not."""
    x = call.x(index)
    shape = call.lowering.shape_of(x)
    count = call.dims.product(shape)
    if not isinstance(count, int):
        raise call.unsupported(f"the length of input {index} is not known")
    flat = call.lowering.reshape(x, [count])
    if str(x.ty.dtype) == "int64":
        return flat
    return call.lowering.compute("wide", [count], lambda t, i: t(i).astype("int64"), flat)


def _length(call: Call, tensor: relax.Expr) -> int:
    return int(call.lowering.shape_of(tensor)[0])


def numbers(call: Call, name: str, items: int, element: Callable[..., Sequence[Any]], *inputs: relax.Expr) -> relax.Var:
    """An int64 tensor [items] of what ``element(*tensors)`` gives for each place."""

    def at(*arguments: Any) -> Any:
        *tensors, position = arguments
        return pick(position, element(*tensors))

    return call.lowering.compute(name, [items], at, *inputs)


def _read(tensor: Any, count: int) -> list[Any]:
    return [tensor(tirx.const(k, "int64")) for k in range(count)]


def _clip(value: Any, low: Any, high: Any) -> Any:
    return tirx.max(tirx.min(value, i64(high)), i64(low))


def bounded(sizes: Sequence[Any]) -> list[Any]:
    """Sizes, or zeros where they are no sizes, or more than `LARGEST` elements."""
    wrong = _too_many(sizes)
    return [tirx.Select(wrong, i64(0), size) for size in sizes]


def _refuse_large(call: Call, index: int, elements: Callable[[list[Any]], Any]) -> None:
    refuse_rows(call, index, _count(call, index), lambda row: _too_many(elements(row)), "its result would be too large")


def _too_many(sizes: Sequence[Any]) -> Any:
    total, wrong = i64(1), tirx.const(False, "bool")
    for size in sizes:
        wrong = tirx.Or(wrong, tirx.Or(size < 0, size > LARGEST))
        total = tirx.min(total, i64(LARGEST)) * _clip(size, 0, LARGEST)
        wrong = tirx.Or(wrong, total > LARGEST)
    return wrong


def _count(call: Call, index: int) -> int:
    count = call.dims.product(call.shape(index))
    if not isinstance(count, int):
        raise call.unsupported(f"the length of input {index} is not known")
    return count


def sizes(call: Call, index: int) -> list[Dim]:
    """The sizes that an input holds: known, or decided by the data within bounds."""
    known = call.known(index)
    if known is not None:
        found = [int(x) if isinstance(x, float) else x for x in known.reshape(-1)]
        call.dims.require_sizes(found, f"{call.lowering.node}: its result")
        return found
    count = _count(call, index)
    _refuse_large(call, index, lambda row: row)
    table = numbers(call, "sizes", count, lambda t: bounded(_read(t, count)), vector(call, index))
    return list(call.lowering.decide(table, count)) if count else []


# -- axes ----------------------------------------------------------------------------------------------------------
def _flags(call: Call, index: int, rank: int) -> relax.Var:
    """int64 [rank]: 1 for the axes that input ``index`` names."""
    axes = vector(call, index)
    count = _length(call, axes)
    _refuse_axes(call, index, rank)

    def element(tensor: Any) -> list[Any]:
        given = _read(tensor, count)
        named = [[_names(axis, k, rank) for axis in given] for k in range(rank)]
        return [reduce(tirx.Or, found).astype("int64") if found else i64(0) for found in named]

    return numbers(call, "axes", rank, element, axes)


def _refuse_axes(call: Call, index: int, rank: int) -> None:
    """End the run when input ``index`` names an axis that there is not."""
    refuse_rows(call, index, 1, lambda row: tirx.Or(row[0] < -rank, row[0] >= rank), f"an axis is not one of {rank}")


def _names(given: Any, axis: int, rank: int) -> Any:
    """Whether a number, perhaps counted from the end, names an axis."""
    return tirx.Or(given == axis, given == axis - rank)


def _nth(place: int, chosen: Sequence[Any], items: Sequence[Dim]) -> Any:
    """The item of the ``place``-th axis that is chosen (1, not 0), in order."""
    result, before = i64(0), i64(0)
    for flag, item in zip(chosen, items):
        result = tirx.Select(tirx.And(flag == 1, before == place), i64(item), result)
        before = before + flag
    return result


def _reduced(name: str) -> Emitter:
    """The axes that stay become the first of a matrix, the others its rows' elements: [kept, reduced]."""
    function = REDUCTIONS[name]

    def emit(call: Call) -> Value:
        shape, count = call.shape(), _count(call, 1)
        rank, keep = len(shape), bool(call.attr("keepdims", 1))
        if count == 0:
            return over(call, function, [])
        call.attr("noop_with_empty_axes")  # there are some
        flags = _flags(call, 1, rank)

        def sizes(tensor: Any) -> list[Any]:
            gone = _read(tensor, rank)
            rest = reduce(lambda a, b: a * b, [tirx.Select(f == 1, i64(1), i64(d)) for f, d in zip(gone, shape)])
            over = reduce(lambda a, b: a * b, [tirx.Select(f == 1, i64(d), i64(1)) for f, d in zip(gone, shape)])
            kept = [1 - flag for flag in gone]
            result = (
                [tirx.Select(f == 1, i64(1), i64(d)) for f, d in zip(gone, shape)]
                if keep
                else [_nth(place, kept, shape) for place in range(rank - count)]
            )
            return [rest, over, *result]

        width = 2 + (rank if keep else rank - count)
        dims = call.lowering.decide(numbers(call, "sizes", width, sizes, flags), width)

        if call.dims.equal(call.dims.product(shape), 0):
            return nothing(call, dims[2:])

        def element(x: Any, tensor: Any, row: Any, column: Any) -> Any:
            gone, where = _read(tensor, rank), []
            for axis in reversed(range(rank)):
                extent = i64(shape[axis])
                where.append(tirx.floormod(tirx.Select(gone[axis] == 1, column, row), extent))
                row = tirx.Select(gone[axis] == 1, row, tirx.floordiv(row, extent))
                column = tirx.Select(gone[axis] == 1, tirx.floordiv(column, extent), column)
            return x(*reversed(where))

        matrix = call.lowering.compute("by_axes", dims[:2], element, call.x(), flags)
        result = call.emit(function(matrix, [1], False))
        return call.lowering.reshape(result, dims[2:])

    return emit


def _squeeze(call: Call) -> Value:
    shape, count = call.shape(), _count(call, 1)
    rank = len(shape)
    flags = _flags(call, 1, rank)

    def sizes(tensor: Any) -> list[Any]:
        kept = [1 - flag for flag in _read(tensor, rank)]
        return [_nth(place, kept, shape) for place in range(rank - count)]

    if rank == count:
        return call.lowering.reshape(call.x(), [])
    dims = call.lowering.decide(numbers(call, "sizes", rank - count, sizes, flags), rank - count, call.node.outputs[0])
    call.require(call.dims.same(call.dims.product(dims), call.dims.product(shape)), "an axis is not of size 1")
    return call.lowering.reshape(call.x(), dims)


def _unsqueeze(call: Call) -> Value:
    shape, count = call.shape(), _count(call, 1)
    rank = len(shape) + count
    flags = _flags(call, 1, rank)

    def sizes(tensor: Any) -> list[Any]:
        new = _read(tensor, rank)
        result, before = [], i64(0)
        for flag in new:
            result.append(tirx.Select(flag == 1, i64(1), pick(before, shape) if shape else i64(1)))
            before = before + 1 - flag
        return result

    dims = call.lowering.decide(numbers(call, "sizes", rank, sizes, flags), rank, call.node.outputs[0])
    call.require(call.dims.same(call.dims.product(dims), call.dims.product(shape)), "an axis is named twice")
    return call.lowering.reshape(call.x(), dims)


# -- shapes --------------------------------------------------------------------------------------------------------
def _reshape(call: Call) -> Value:
    old, rank = call.shape(), _count(call, 1)
    copies = not call.attr("allowzero", 0)
    total = i64(call.dims.product(old))

    def sizes(tensor: Any) -> list[Any]:
        wanted = _read(tensor, rank)
        if copies:
            wanted = [tirx.Select(w == 0, i64(old[k]) if k < len(old) else w, w) for k, w in enumerate(wanted)]
        known = reduce(lambda a, b: a * b, [tirx.Select(w < 0, i64(1), _clip(w, 0, LARGEST)) for w in wanted], i64(1))
        free = tirx.floordiv(total, tirx.max(known, i64(1)))
        return [tirx.Select(w < 0, free, _clip(w, 0, LARGEST)) for w in wanted]

    dims = (
        call.lowering.decide(numbers(call, "sizes", rank, sizes, vector(call, 1)), rank, call.node.outputs[0])
        if rank
        else []
    )
    product = call.dims.product(dims)
    call.require(call.dims.same(product, call.dims.product(old)), "its result would have another number of elements")
    return call.lowering.reshape(call.x(), dims)


def _expand(call: Call) -> Value:
    given, count = call.shape(), _count(call, 1)
    rank = max(len(given), count)
    shape = [*([1] * (rank - len(given))), *given]
    wanted = vector(call, 1)

    def target(row: Sequence[Any]) -> list[Any]:
        asked = [*([i64(1)] * (rank - count)), *row]
        return [tirx.Select(a == 1, i64(d), a) for a, d in zip(asked, shape)]

    def sizes(tensor: Any) -> list[Any]:
        return bounded(target(_read(tensor, count)))

    def unfit(row: list[Any]) -> Any:
        found = [tirx.And(size != i64(d), i64(d) != 1) for size, d in zip(target(row), shape)]
        return reduce(tirx.Or, found)

    refuse_rows(call, 1, count, unfit, "it does not broadcast")
    _refuse_large(call, 1, target)
    dims = call.lowering.decide(numbers(call, "sizes", rank, sizes, wanted), rank, call.node.outputs[0])

    def element(x: Any, *index: Any) -> Any:
        inner = index[rank - len(given) :]
        return x(*[i64(0) if d == 1 else tirx.min(i, i64(d) - 1) for i, d in zip(inner, given)])

    return call.lowering.compute("expand", dims, element, call.x())


def _tile(call: Call) -> Value:
    shape = call.shape()
    if _count(call, 1) != len(shape):
        raise call.unsupported(f"{_count(call, 1)} repeats do not fit rank {len(shape)}")

    def target(row: Sequence[Any]) -> list[Any]:
        return [_clip(r, -1, LARGEST) * i64(d) for r, d in zip(row, shape)]

    _refuse_large(call, 1, target)
    repeats = vector(call, 1)
    sizes = numbers(call, "sizes", len(shape), lambda t: bounded(target(_read(t, len(shape)))), repeats)
    dims = call.lowering.decide(sizes, len(shape), call.node.outputs[0])

    def element(x: Any, *index: Any) -> Any:
        return x(*[tirx.floormod(i, i64(d)) for i, d in zip(index, shape)])

    return call.lowering.compute("tile", dims, element, call.x())


def _constant_of_shape(call: Call) -> Value:
    value = call.attr("value")
    array = np.zeros(1, np.float32) if value is None else value.numpy().reshape(-1)
    return call.lowering.full(sizes(call, 0), array[0], str(array.dtype))


# -- parts ---------------------------------------------------------------------------------------------------------
def _slice(call: Call) -> Value:
    """Bounds of every axis as one tensor int64 [3 * rank]: starts, steps, counts."""
    shape, count = call.shape(), _count(call, 1)
    rank = len(shape)
    inputs = [vector(call, index) for index in (1, 2)]
    places = {index: len(inputs) + k for k, index in enumerate(i for i in (3, 4) if call.has(i))}
    inputs += [vector(call, index) for index in places]

    def bounds(*tensors: Any) -> list[Any]:
        starts, ends = _read(tensors[0], count), _read(tensors[1], count)
        axes = _read(tensors[places[3]], count) if 3 in places else [i64(k) for k in range(count)]
        steps = _read(tensors[places[4]], count) if 4 in places else [i64(1)] * count
        found = []
        for axis, dim in enumerate(map(i64, shape)):
            entry = (i64(0), i64(1), dim)
            for start, end, named, step in zip(starts, ends, axes, steps):
                here = _names(named, axis, rank)
                part = _part(dim, start, end, _clip(step, -LARGEST, LARGEST))
                entry = tuple(tirx.Select(here, new, old) for new, old in zip(part, entry))
            found.append(entry)
        return [entry[which] for which in range(3) for entry in found]

    if 3 in places:
        _refuse_axes(call, 3, rank)
    if 4 in places:
        refuse_rows(call, 4, 1, lambda row: row[0] == 0, "a step is 0")
    table = numbers(call, "bounds", 3 * rank, bounds, *inputs)
    sizes = numbers(call, "sizes", rank, lambda t: [t(i64(2 * rank + k)) for k in range(rank)], table)
    dims = call.lowering.decide(sizes, rank, call.node.outputs[0])

    def element(x: Any, t: Any, *index: Any) -> Any:
        where = [t(i64(k)) + i * t(i64(rank + k)) for k, i in enumerate(index)]
        return x(*[inside(i, d) for i, d in zip(where, shape)])

    return call.lowering.compute("slice", dims, element, call.x(), table)


def _part(dim: Any, start: Any, end: Any, step: Any) -> tuple[Any, Any, Any]:
    """First index, step and count of ``start:end:step`` by ONNX's rules of clamping."""
    far = i64(LARGEST)
    start, end = (_clip(x, -far, far) for x in (start, end))
    start, end = (tirx.Select(x < 0, x + dim, x) for x in (start, end))
    forward = step > 0
    first = tirx.Select(forward, _clip(start, 0, dim), _clip(start, 0, dim - 1))
    last = tirx.Select(forward, _clip(end, 0, dim), _clip(end, -1, dim - 1))
    size = tirx.Select(step == 0, i64(1), tirx.abs(step))
    span = tirx.Select(forward, last - first, first - last)
    return first, step, tirx.max(tirx.floordiv(span + size - 1, size), i64(0))


def _split(call: Call) -> list[Value]:
    shape, count = call.shape(), len(call.node.outputs)
    axis = call.axis(0, len(shape))
    if _count(call, 1) != count:
        raise call.unsupported(f"it has {count} outputs and {_count(call, 1)} sizes")

    def sizes(tensor: Any) -> list[Any]:
        left, result = i64(shape[axis]), []
        for size in _read(tensor, count):
            result.append(_clip(size, 0, left))
            left = left - result[-1]
        return result

    def unfit(row: list[Any]) -> Any:
        negative = reduce(tirx.Or, [size < 0 for size in row])
        return tirx.Or(negative, reduce(lambda a, b: a + b, row) != i64(shape[axis]))

    refuse_rows(call, 1, count, unfit, f"its parts do not add up to axis {axis}")
    dims = call.lowering.decide(numbers(call, "sizes", count, sizes, vector(call, 1)), count)
    starts: list[Dim] = [0]
    for dim in dims[:-1]:
        starts.append(call.dims.simplify(starts[-1] + dim))
    return [strided(call, call.x(), {axis: (start, dim, 1)}) for start, dim in zip(starts, dims)]


def _pad(call: Call) -> Value:
    """Pads of every axis as one tensor int64 [2 * rank], before and behind it."""
    shape, count = call.shape(), _count(call, 1)
    rank, mode = len(shape), str(call.attr("mode", "constant"))
    axes = [vector(call, 3)] if call.has(3) else []
    given = _length(call, axes[0]) if axes else rank
    if count != 2 * given:
        raise call.unsupported(f"{count} pads do not fit {given} axes")
    if axes:
        _refuse_axes(call, 3, rank)

    def pads(tensor: Any, *rest: Any) -> list[Any]:
        numbers_ = _read(tensor, count)
        named = _read(rest[0], given) if rest else [i64(k) for k in range(rank)]
        result = []
        for side in range(2):
            for axis in range(rank):
                amount = i64(0)
                for place, name in enumerate(named):
                    here = _names(name, axis, rank)
                    amount = tirx.Select(here, _clip(numbers_[side * given + place], -LARGEST, LARGEST), amount)
                result.append(amount)
        return result

    table = numbers(call, "pads", 2 * rank, pads, vector(call, 1), *axes)

    def sizes(t: Any) -> list[Any]:
        return [i64(d) + t(i64(axis)) + t(i64(rank + axis)) for axis, d in enumerate(shape)]

    def wrong(t: Any, _: Any) -> Any:
        found = _too_many(sizes(t))
        for place in range(2 * rank) if mode in ("reflect", "wrap") else ():
            most = i64(shape[place % rank]) if mode == "reflect" else i64(LARGEST)
            found = tirx.Or(found, t(i64(place)) >= most)
            found = tirx.Or(found, t(i64(place)) < 0) if mode == "wrap" else found
        return found.astype("int64")

    count_wrong = call.lowering.compute("outside", [1], wrong, table)
    call.lowering.outside.append((count_wrong, f"{call.lowering.node}: it cannot add or take away that much"))
    found = numbers(call, "sizes", rank, lambda t: bounded(sizes(t)), table)
    dims = call.lowering.decide(found, rank, call.node.outputs[0])
    return padded(call, dims, [i64(axis) for axis in range(rank)], table)


def _triangle(call: Call) -> Value:
    upper = bool(call.attr("upper", 1))

    def element(x: Any, k: Any, *index: Any) -> Any:
        away, offset = index[-1] - index[-2], k(i64(0))
        inside = away >= offset if upper else away <= offset
        return tirx.Select(inside, x(*index), tirx.const(0, x.dtype))

    return call.lowering.compute("triangle", call.shape(), element, call.x(), vector(call, 1))


def _cumulative_sum(call: Call) -> Value:
    """The sums along every axis, and those of the one that is named."""
    shape = call.shape()
    rank = len(shape)
    _refuse_axes(call, 1, rank)
    sums = [sums_along(call, axis) for axis in range(rank)]

    def element(axis: Any, *rest: Any) -> Any:
        index = rest[rank:]
        result = rest[0](*index)
        for place in range(1, rank):
            result = tirx.Select(_names(axis(i64(0)), place, rank), rest[place](*index), result)
        return result

    return call.lowering.compute("along_axis", shape, element, vector(call, 1), *sums)


def _one_hot(call: Call) -> Value:
    if _count(call, 1) != 1:
        raise call.unsupported("its depth is no single number")
    return one_hot(call, sizes(call, 1)[0])


def _top_k(call: Call) -> list[Value]:
    """All elements in order, and the first k of them."""
    shape = call.shape()
    axis = call.axis(-1, len(shape))
    if not isinstance(shape[axis], int):
        raise call.unsupported("k depends on the data, and the axis is dynamic")
    refuse_rows(call, 1, 1, lambda row: tirx.Or(row[0] < 0, row[0] > shape[axis]), "there are fewer than k elements")
    parts = in_order(call, shape[axis], axis)
    (count,) = call.lowering.decide(
        numbers(call, "sizes", 1, lambda t: [_clip(t(i64(0)), 0, shape[axis])], vector(call, 1)), 1
    )
    return [strided(call, part, {axis: (0, count, 1)}) for part in parts]


RUN_TIME: dict[str, tuple[tuple[int, ...], Emitter]] = {
    "Reshape": ((1,), _reshape), "Expand": ((1,), _expand), "Tile": ((1,), _tile), "Squeeze": ((1,), _squeeze),
    "Unsqueeze": ((1,), _unsqueeze), "Slice": ((1, 2, 3, 4), _slice), "Split": ((1,), _split),
    "Pad": ((1, 3), _pad), "Trilu": ((1,), _triangle), "CumSum": ((1,), _cumulative_sum),
    "CumProd": ((1,), _cumulative_sum), "OneHot": ((1,), _one_hot),
    "ConstantOfShape": ((0,), _constant_of_shape), "TopK": ((1,), _top_k),
    **{name: ((1,), _reduced(name)) for name in REDUCTIONS},
}  # fmt: skip
"""By operator type: its parameters, and the emitter for when one of them is not known while lowering."""


def emitter(call: Call) -> Emitter | None:
    """The emitter of a node whose parameters are not all known, else None."""
    positions, emit = RUN_TIME.get(call.node.op_type, ((), None))
    unknown = any(call.known(index) is None and call.const(index) is None for index in positions if call.has(index))
    return emit if unknown else None
