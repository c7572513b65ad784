"""Operators that reduce over axes, and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

Reduce = Callable[[relax.Expr, "list[int] | None", bool], relax.Expr]


def _reduction(reduce: Reduce) -> Emitter:
    return lambda call: over(call, reduce, call.numbers(1, "axes"))


def over(call: Call, reduce: Reduce, axes: list[int] | None) -> Value:
    """Input 0 reduced over axes; over all, or none, where there are none: the node says which."""
    keep, noop = bool(call.attr("keepdims", 1)), bool(call.attr("noop_with_empty_axes", 0))
    if call.dims.equal(call.dims.product(call.shape()), 0) and (axes or not noop):
        return _of_none(call, axes, keep)
    if not axes and noop:
        axes = [len(call.shape())]  # each element by itself: an axis of one element behind the others
        x = call.lowering.reshape(call.x(), [*call.shape(), 1])
        return call.emit(reduce(x, axes, False))
    return call.emit(reduce(call.x(), axes or None, keep))


def _of_none(call: Call, axes: list[int] | None, keep: bool) -> Value:
    """What comes of no elements, for each place of the result."""
    shape = call.shape()
    gone = call.axes(axes or range(len(shape)), len(shape))
    result = [1 if axis in gone else dim for axis, dim in enumerate(shape) if keep or axis not in gone]
    return nothing(call, result)


def nothing(call: Call, shape: Sequence[Dim]) -> Value:
    """A tensor of what a node gives for no elements."""
    dtype = str(call.x().ty.dtype)
    value = EMPTY.get(call.node.op_type, 0.0)
    if dtype == "bool":
        value = value > 0
    elif "int" in dtype and np.isinf(value):
        value = np.iinfo(dtype).max if value > 0 else np.iinfo(dtype).min
    return call.lowering.full(shape, value, dtype)


def _extreme(reduce: Reduce, end: float) -> Reduce:
    """Maximum or minimum; of floats that are all the farthest infinity, TVM would give the last finite number."""

    def extreme(x: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
        dtype = str(x.ty.dtype)
        if dtype == "bool":
            return relax.op.astype(reduce(relax.op.astype(x, "uint8"), axes, keep), "bool")
        found = reduce(x, axes, keep)
        if "float" not in dtype:
            return found
        infinity = relax.const(end, dtype)
        nearer = relax.op.max(relax.op.astype(relax.op.not_equal(x, infinity), "int8"), axes, keep)
        any_nearer = relax.op.greater(nearer, relax.const(0, "int8"))  # of no elements it is the least number
        return relax.op.where(any_nearer, found, infinity)

    return extreme


def _log_sum_exp(x: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
    top = relax.op.max(x, axes, True)
    total = relax.op.log(relax.op.sum(relax.op.exp(relax.op.subtract(x, top)), axes, True))
    result = relax.op.add(total, top)
    return result if keep else relax.op.squeeze(result, axes)


def _mean(x: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
    if "float" not in str(x.ty.dtype):
        raise TypeError("means of integers are not compiled")
    return relax.op.mean(x, axes, keep)


def _norm2(x: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
    return relax.op.sqrt(relax.op.sum(relax.op.multiply(x, x), axes, keep))


def _softmax(function: Callable[[relax.Expr, int], relax.Expr]) -> Emitter:
    return lambda call: call.emit(function(call.x(), call.axis(-1, len(call.shape()))))


REDUCTIONS: dict[str, Reduce] = {
    "ReduceSum": relax.op.sum, "ReduceMean": _mean,
    "ReduceMax": _extreme(relax.op.max, -np.inf), "ReduceMin": _extreme(relax.op.min, np.inf),
    "ReduceProd": relax.op.prod, "ReduceL2": _norm2,
    "ReduceL1": lambda x, axes, keep: relax.op.sum(relax.op.abs(x), axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: relax.op.sum(relax.op.multiply(x, x), axes, keep),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceLogSum": lambda x, axes, keep: relax.op.log(relax.op.sum(x, axes, keep)),
}  # fmt: skip
"""What reduces over axes (None: all), by operator type."""

EMPTY = {
    "ReduceProd": 1.0, "ReduceMax": -np.inf, "ReduceMin": np.inf, "ReduceLogSum": -np.inf, "ReduceLogSumExp": -np.inf,
    "ReduceMean": np.nan,
}  # fmt: skip
"""What comes of no elements, where it is not 0."""

OPS: dict[str, Emitter] = {
    **{name: _reduction(reduce) for name, reduce in REDUCTIONS.items()},
    "Softmax": _softmax(relax.op.nn.softmax), "LogSoftmax": _softmax(relax.op.nn.log_softmax),
}  # fmt: skip
"""Emitters by operator type."""
