"""Scatter: rows of updates into, or combined with, rows of a tensor, one after the other.

    Y = X                           rows in parallel
    for i:                          in order, so that the last of equal indices counts
        Y[where_i] = Y[where_i] op updates_i

``where`` says inside which rows: what computes it clamps, see `xopt.targets.ops.bounds`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from xopt.kernels.emit import Expr, PrimFunc, argument, bind, dim, i64, parallel, prim_func, put, serial

VERSION = 1


def _updated(old: Expr, new: Expr) -> Expr:
    return new


REDUCTIONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "none": _updated,
    "add": operator.add,
    "mul": operator.mul,
    "min": tirx.min,
    "max": tirx.max,
}
"""What becomes of an element and its update."""


@dataclass(frozen=True)
class Workload:
    """One scatter into X [M, width].

    Args:
        width: elements of a row; None for a dynamic number.
        dtype: of X, the updates and Y.
        reduction: a name of `REDUCTIONS`.
    """

    width: int | None
    dtype: str
    reduction: str


def name(workload: Workload) -> str:
    width = "any" if workload.width is None else workload.width
    return f"scatter_{workload.reduction}_{width}_{workload.dtype}"


def build(workload: Workload) -> PrimFunc:
    """The kernel over (X [M, width], where int64 [N], updates [N, width], Y [M, width]).

    Raises:
        ValueError: there is no such reduction.
    """
    if workload.reduction not in REDUCTIONS:
        raise ValueError(f"there is no reduction {workload.reduction}")
    combine = REDUCTIONS[workload.reduction]

    def body() -> None:
        rows, count, width = dim(None, "rows"), dim(None, "count"), dim(workload.width, "width")
        x = argument("x", (rows, width), workload.dtype)
        where = argument("where", (count,), "int64")
        updates = argument("updates", (count, width), workload.dtype)
        y = argument("y", (rows, width), workload.dtype)
        with parallel(rows) as row, serial(width) as column:
            put(y, x[row, column], row, column)
        with serial(count) as update:
            row = bind(i64(where[update]))
            with serial(width) as column:
                put(y, combine(y[row, column], updates[update, column]), row, column)

    return prim_func(name(workload), body)
