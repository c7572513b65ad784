"""Rows of float32 in another format: for values that no kernel of ours has written in the format that a product reads.

for row:                    in parallel, rows of X [*rows, D]
    Y = converted X         zeros behind D, up to whole lanes of the product that reads Y
"""

from __future__ import annotations

from dataclasses import dataclass

from xopt.kernels import precision
from xopt.kernels.emit import (
    PrimFunc,
    argument,
    dims,
    each_row,
    flat,
    let,
    load,
    partial_load,
    prim_func,
    product,
    serial,
)
from xopt.kernels.fixed import Config as Config
from xopt.kernels.fixed import heuristic as heuristic
from xopt.kernels.fixed import space as space
from xopt.kernels.isa import Isa
from xopt.kernels.precision import Result

VERSION = 1


@dataclass(frozen=True)
class Workload:
    """One conversion.

    Args:
        rows: leading dimensions, None where dynamic.
        width: the last axis of X.
        padded: the last axis of Y.
        result: "bfloat16" or "uint8".
    """

    rows: tuple[int | None, ...]
    width: int
    padded: int
    result: str


def name(workload: Workload, config: Config, isa: Isa) -> str:
    rows = "x".join("any" if extent is None else str(extent) for extent in workload.rows)
    return f"to_{workload.result}_{rows}_{workload.width}_{workload.padded}_{isa.token}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (X [*rows, D], [quantization], Y [*rows, D padded])."""
    w, lanes = workload, isa.lanes

    def body() -> None:
        rows = dims(w.rows, "m")
        x_full = argument("x", (*rows, w.width))
        quantization = precision.quantization_argument((w.result,), w.padded)
        y_full = precision.result_arguments("y", (w.result,), (*rows, w.padded))
        m = let(product(rows))
        x = flat(x_full, (m, w.width))
        y = Result(y_full, quantization, isa).flat((m, w.padded))
        whole, tail = divmod(w.width, lanes)
        with each_row(m, w.rows, w.width) as row:
            if whole:
                with serial(whole) as v:
                    y.store(load(x, row, v * lanes, lanes=lanes), row, v * lanes)
            if tail:
                column = whole * lanes
                value = partial_load(x, row, column, count=tail, lanes=lanes)
                y.partial_store(value, row, column, count=min(w.padded - column, lanes))

    return prim_func(name(w, config, isa), body)
