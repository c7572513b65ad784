"""Softmax over the last axis, for scores that no attention kernel took.

for row:                    in parallel, rows of X [*rows, D]
    maximum                 NaN is skipped here and comes back in the exponentials
    Y = exp(x - maximum)    summed on the way
    Y = Y / sum
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from xopt.kernels import vector
from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    dim,
    dims,
    flat,
    keep,
    let,
    load,
    local,
    parallel,
    partial_load,
    partial_store,
    prim_func,
    product,
    reduce_lanes,
    serial,
    splat,
    store,
)
from xopt.kernels.fixed import Config as Config
from xopt.kernels.fixed import heuristic as heuristic
from xopt.kernels.fixed import space as space
from xopt.kernels.isa import Isa

VERSION = 1


@dataclass(frozen=True)
class Workload:
    """Softmax of X [*rows, width]; None marks a dynamic dimension."""

    rows: tuple[int | None, ...]
    width: int | None


def name(workload: Workload, config: Config, isa: Isa) -> str:
    shape = "x".join("any" if extent is None else str(extent) for extent in (*workload.rows, workload.width))
    return f"softmax_{shape}_{isa.token}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (X [*rows, D], Y), float32."""
    lanes = isa.lanes

    def body() -> None:
        rows, width = dims(workload.rows, "m"), dim(workload.width, "d")
        x, y = argument("x", (*rows, width)), argument("y", (*rows, width))
        m = let(product(rows))
        x, y = flat(x, (m, width)), flat(y, (m, width))
        with parallel(m) as row:
            _row(x, y, row, width, lanes)

    return prim_func(name(workload, config, isa), body)


def _row(x: Buffer, y: Buffer, row: Expr, width: Expr, lanes: int) -> None:
    acc = local((lanes,))
    tail = width % lanes
    rest = width - tail

    def over_row(source: Buffer, step: Callable[[Expr], Expr], write: bool, fill: float) -> None:
        """Replace every vector of the row by ``step`` of it, the last partial one filled up."""
        with serial(width // lanes) as v:
            value = step(load(source, row, v * lanes, lanes=lanes))
            if write:
                store(y, value, row, v * lanes, lanes=lanes)
        last = partial_load(source, row, rest, count=tail, lanes=lanes, fill=splat(fill, lanes))
        value = step(last)
        if write:
            partial_store(y, value, row, rest, count=tail, lanes=lanes)

    def larger(value: Expr) -> Expr:
        store(acc, vector.maximum(load(acc, 0, lanes=lanes), keep(value, lanes)), 0, lanes=lanes)
        return value

    store(acc, splat(-math.inf, lanes), 0, lanes=lanes)
    over_row(x, larger, False, -math.inf)
    maximum = reduce_lanes(load(acc, 0, lanes=lanes), vector.maximum, lanes)

    def exponential(value: Expr) -> Expr:
        result = keep(vector.exp(keep(value - maximum, lanes), lanes), lanes)
        store(acc, load(acc, 0, lanes=lanes) + result, 0, lanes=lanes)
        return result

    store(acc, splat(0.0, lanes), 0, lanes=lanes)
    over_row(x, exponential, True, -math.inf)
    total = reduce_lanes(load(acc, 0, lanes=lanes), lambda a, b: a + b, lanes)
    inverse = keep(splat(1.0, lanes) / total, lanes)
    over_row(y, lambda value: value * inverse, True, 0.0)
