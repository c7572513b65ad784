"""Determinants, by Gaussian elimination with partial pivoting.

for each matrix:   for column k:   bring the row with the largest number of the column to the top,
                                   multiply it into the result, take its multiples from the rows below
"""

from __future__ import annotations

from tvm import tirx

from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    bind,
    dim,
    i64,
    let,
    local,
    prim_func,
    put,
    serial,
    when,
    workspace,
)

VERSION = 1


def name(dtype: str) -> str:
    return f"determinant_{dtype}"


def build(dtype: str) -> PrimFunc:
    """The kernel over (matrices [B, M, M], determinants [B]) of a type."""

    def body() -> None:
        count, size = dim(None, "count"), dim(None, "size")
        matrices = argument("matrices", (count, size, size), dtype)
        results = argument("results", (count,), dtype)
        work, result = workspace((size, size), dtype), local((1,), dtype)
        with serial(count) as matrix:
            with serial(size) as row, serial(size) as column:
                put(work, matrices[matrix, row, column], row, column)
            put(result, tirx.const(1.0, dtype), 0)
            with serial(size) as step:
                _swap(work, result, size, bind(step), dtype)
                _eliminate(work, size, bind(step))
                put(result, result[i64(0)] * work[step, step], 0)
            put(results, result[i64(0)], matrix)

    return prim_func(name(dtype), body)


def _swap(work: Buffer, result: Buffer, size: Expr, step: Expr, dtype: str) -> None:
    """Bring the row with the largest number in a column to its place, which changes the sign."""
    top = local((1,), "int64")
    put(top, step, 0)
    with serial(size - step) as below:
        row = bind(step + below)
        larger = tirx.abs(work[row, step]) > tirx.abs(work[top[i64(0)], step])
        when(larger, lambda row=row: put(top, row, 0))  # type: ignore[misc]
    other = bind(top[i64(0)])

    def exchange() -> None:
        put(result, result[i64(0)] * tirx.const(-1.0, dtype), 0)
        with serial(size) as column:
            held = local((1,), dtype)
            put(held, work[step, column], 0)
            put(work, work[other, column], step, column)
            put(work, held[i64(0)], other, column)

    when(other != step, exchange)


def _eliminate(work: Buffer, size: Expr, step: Expr) -> None:
    """Take from each row below as much of a row as makes its number in the column 0."""

    def rows() -> None:
        with serial(size - step - 1) as below:
            row = bind(step + 1 + below)
            factor = local((1,), work.dtype)
            put(factor, work[row, step] / work[step, step], 0)
            with serial(size - step - 1) as right:
                column = let(step + 1 + right)
                put(work, work[row, column] - factor[i64(0)] * work[step, column], row, column)

    when(work[step, step] != tirx.const(0.0, work.dtype), rows)
