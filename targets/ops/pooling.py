"""Pooling: the maximum, the mean or a norm of windows or of whole axes, and what undoes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, te, tirx

from xopt.kernels.emit import i64
from xopt.targets.ops.bounds import check_indices, inside, valid
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.indexing import scattered
from xopt.targets.ops.parameters import sizes
from xopt.targets.ops.reduction import REDUCTIONS
from xopt.targets.ops.windows import Window, attributes, explicit_pads, padded, sliding, taps_of
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def _windows(call: Call) -> list[Window]:
    """The windows of a pooling by its attributes."""
    if len(call.shape()) < 3:
        raise call.unsupported("its input has no axes to pool over")
    taps = [int(x) for x in call.attr("kernel_shape", [])]
    return sliding(call, call.shape()[2:], taps, bool(call.attr("ceil_mode", 0)))


def _lowest(dtype: str) -> float:
    return -np.inf if "float" in dtype else int(np.iinfo(dtype).min)


def _larger(dtype: str) -> Callable[..., Any]:
    """A reduction to the maximum; NaN where there is one."""

    def combine(x: Any, y: Any) -> Any:
        if "float" not in dtype:
            return tirx.max(x, y)
        return tirx.Select(tirx.Or(tirx.isnan(x), x > y), x, y)

    return te.comm_reducer(combine, lambda kind: tirx.const(_lowest(dtype), kind), name="largest")  # type: ignore[no-any-return]


def _over(
    call: Call, name: str, x: relax.Expr, windows: Sequence[Window], reducer: Callable[..., Any],
    element: Callable[[Any], Any] = lambda value: value,
) -> relax.Var:  # fmt: skip
    """``element`` of all elements of each window, reduced."""
    taps = taps_of(windows)
    outer = call.shape()[:2]

    def result(tensor: Any, *index: Any) -> Any:
        at = [w.place(i, tap) for w, i, tap in zip(windows, index[2:], taps)]
        return reducer(element(tensor(*index[:2], *at)), axis=taps)

    return call.lowering.compute(name, [*outer, *(w.count for w in windows)], result, x)


def _max_pool(call: Call) -> Value | list[Value]:
    windows, x = _windows(call), call.x()
    dtype = str(x.ty.dtype)
    surrounded, moved = padded(call, x, windows, _lowest(dtype))
    largest = _over(call, "max_pool", surrounded, moved, _larger(dtype))
    by_columns = bool(call.attr("storage_order", 0))
    if len(call.node.outputs) == 1:
        return largest
    return [largest, _places(call, x, largest, windows, by_columns)]


def _places(call: Call, x: relax.Expr, largest: relax.Expr, windows: Sequence[Window], by_columns: bool) -> relax.Expr:
    """int64: where the first of the largest elements of each window lies in the flat input.

    A window whose largest is NaN is said to have it at its first element inside.
    """
    taps, shape = taps_of(windows), call.shape()
    is_float = "float" in str(x.ty.dtype)
    end = i64(call.dims.product(shape))

    def number(index: Sequence[Any]) -> Any:
        order = list(range(len(windows)))
        flat: Any = i64(0)
        for axis in reversed(order) if by_columns else order:
            flat = flat * i64(windows[axis].size) + index[axis]
        return flat

    def element(tensor: Any, found: Any, *index: Any) -> Any:
        at = [w.place(i, tap) for w, i, tap in zip(windows, index[2:], taps)]
        exists = reduce(tirx.And, [tirx.And(place >= 0, place < i64(w.size)) for place, w in zip(at, windows)])
        near = [inside(place, w.size) for place, w in zip(at, windows)]
        value, top = tensor(*index[:2], *near), found(*index)
        same = tirx.EQ(value, top)
        if is_float:
            same = tirx.Or(same, tirx.isnan(top))
        plane = (index[0] * i64(shape[1]) + index[1]) * i64(call.dims.product(shape[2:]))
        return te.min(tirx.Select(tirx.And(exists, same), plane + number(at), end), axis=taps)

    places = call.lowering.compute("places", call.lowering.shape_of(largest), element, x, largest)
    return call.lowering.compute(
        "places_inside", call.lowering.shape_of(places), lambda p, *i: tirx.min(p(*i), end - 1), places
    )


def _average_pool(call: Call) -> Value:
    """The mean of the elements inside, or of those that are padded too."""
    windows, x = _windows(call), call.x()
    surrounded, moved = padded(call, x, windows, 0.0)
    total = _over(call, "sums", surrounded, moved, te.sum)
    with_padding = bool(call.attr("count_include_pad", 0))

    def element(sums: Any, *index: Any) -> Any:
        count: Any = i64(1)
        for w, i in zip(windows, index[2:]):
            low, high = (-i64(w.before), w.size + i64(w.after)) if with_padding else (i64(0), i64(w.size))
            count = count * w.inside(i, low, high)
        return sums(*index) / tirx.max(count, i64(1)).astype(sums.dtype)

    return call.lowering.compute("average_pool", call.lowering.shape_of(total), element, total)


def _lp_pool(call: Call) -> Value:
    windows, p = _windows(call), int(call.attr("p", 2))
    surrounded, moved = padded(call, call.x(), windows, 0.0)
    sums = _over(call, "sums", surrounded, moved, te.sum, _power(p, str(call.x().ty.dtype)))
    return _root(call, sums, p)


def _power(p: int, dtype: str) -> Callable[[Any], Any]:
    def power(value: Any) -> Any:
        if p == 2:
            return value * value
        size = tirx.abs(value)
        return size if p == 1 else tirx.pow(size, tirx.const(float(p), dtype))

    return power


def _root(call: Call, sums: relax.Expr, p: int) -> Value:
    if p < 1:
        raise call.unsupported(f"p is {p}")
    if p == 1:
        return sums
    dtype = str(sums.ty.dtype)
    root = relax.op.sqrt(sums) if p == 2 else relax.op.power(sums, relax.const(1.0 / p, dtype))
    return call.emit(root)


# -- whole axes ----------------------------------------------------------------------------------------------------
def _global(name: str) -> Emitter:
    """A reduction over all axes but the first two."""

    def emit(call: Call) -> Value:
        axes = list(range(2, len(call.shape())))
        return call.emit(REDUCTIONS[name](call.x(), axes, True)) if axes else call.x()

    return emit


def _global_lp(call: Call) -> Value:
    p, axes = int(call.attr("p", 2)), list(range(2, len(call.shape())))
    power = _power(p, str(call.x().ty.dtype))
    raised = call.lowering.compute("raised", call.shape(), lambda x, *i: power(x(*i)), call.x())
    return _root(call, call.emit(relax.op.sum(raised, axes, True)) if axes else raised, p)


# -- back ----------------------------------------------------------------------------------------------------------
def _max_unpool(call: Call) -> Value:
    """Every element at its place in a tensor of zeros; in the corner of a larger one where a shape is given.

    The places count elements of the tensor that the attributes tell the size of.
    """
    shape, taps = call.shape(), [int(x) for x in call.attr("kernel_shape", [])]
    rank = len(shape) - 2
    if rank < 1 or len(taps) != rank or not call.dims.same_shape(shape, call.shape(1)):
        raise call.unsupported("its kernel or its indices do not fit its input")
    (strides, _), (before, after) = attributes(call, rank), explicit_pads(call, rank)
    extents = [
        call.dims.simplify((dim - 1) * stride - low - high + size)
        for dim, stride, low, high, size in zip(shape[2:], strides, before, after, taps)
    ]
    inner = [*shape[:2], *extents]
    for size in extents:
        call.require(size >= 1, "its result would have no elements")
    total, count = call.dims.product(inner), call.dims.product(shape)
    check_indices(call, 1, [total])
    where = call.lowering.compute(
        "places", [count], lambda t, i: valid(t(i), total), call.lowering.reshape(call.x(1), [count])
    )
    dtype = str(call.x().ty.dtype)
    empty = call.emit(relax.op.zeros(inner, dtype))
    placed = scattered(call, empty, where, call.x(), (total, 1), "none")
    return _in_corner(call, placed, inner) if call.has(2) else placed


def _in_corner(call: Call, x: relax.Expr, shape: Sequence[Dim]) -> Value:
    """``x`` cut or filled up with zeros, to the shape that input 2 gives."""
    wanted = sizes(call, 2)
    result = [*shape[:2], *wanted[2:]]
    if len(result) != len(shape):
        raise call.unsupported("its output_shape has another rank than its input")

    def element(tensor: Any, *index: Any) -> Any:
        exists = reduce(tirx.And, [i < i64(dim) for i, dim in zip(index, shape)])
        return tirx.if_then_else(exists, tensor(*index), tirx.const(0, tensor.dtype))

    return call.lowering.compute("in_corner", result, element, x)


OPS: dict[str, Emitter] = {
    "MaxPool": _max_pool, "AveragePool": _average_pool, "LpPool": _lp_pool, "MaxUnpool": _max_unpool,
    "GlobalAveragePool": _global("ReduceMean"), "GlobalMaxPool": _global("ReduceMax"), "GlobalLpPool": _global_lp,
}  # fmt: skip
"""Emitters by operator type."""
