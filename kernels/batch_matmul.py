"""Matrix product of two activations: ``C[b, M, N] = A[b, M, K] @ B[b, K, N]``, every extent possibly dynamic.

    for b, panel of columns, group of rows:     in parallel
        pack the panel of B                     contiguous and zero padded, so that any N runs in full vectors
        for block of rows:                      even blocks, a register tile for each row count
            acc[rows, NT] = sum over K          as in gemm.py

Packing costs one pass over the panel against M multiply-adds per element: right for M of a few dozen and more, and no
worse than the memory traffic of B itself for a single row.
Source    Goto, van de Geijn (2008).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx

from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    at_least_one,
    bind,
    ceil_div,
    dim,
    dims,
    flat,
    i64,
    let,
    load,
    outer_product,
    parallel,
    partial_load,
    partial_store,
    prim_func,
    product,
    serial,
    store,
    switch,
    when,
    workspace,
)
from xopt.kernels.isa import Isa

VERSION = 1


@dataclass(frozen=True)
class Workload:
    """One batched product; None marks a dynamic dimension.

    Args:
        batch: leading dimensions of A and C, and of B unless it is shared.
        m, k, n: the matrices' extents.
        shared: B is one matrix [K, N] for the whole batch.
    """

    batch: tuple[int | None, ...]
    m: int | None
    k: int | None
    n: int | None
    shared: bool = False


@dataclass(frozen=True)
class Config:
    """Register tile: at most ``mt`` rows by ``vectors`` vectors of columns."""

    mt: int
    vectors: int


def space(workload: Workload, isa: Isa) -> Iterator[Config]:
    for vectors in range(1, 5):
        yield Config(min(isa.tile_rows(vectors), 12), vectors)


def heuristic(workload: Workload, isa: Isa) -> Config:
    def cost(config: Config) -> float:
        panel = config.vectors * isa.lanes
        columns = workload.n or 8 * panel
        loads = (config.mt + config.vectors) / (config.mt * config.vectors)
        return -(-columns // panel) * panel * (1.0 + 0.2 * loads)

    return min(space(workload, isa), key=cost)


def name(workload: Workload, config: Config, isa: Isa) -> str:
    w = workload
    shape = "x".join("any" if extent is None else str(extent) for extent in (*w.batch, w.m, w.k, w.n))
    kind = "batch_matmul_shared" if w.shared else "batch_matmul"
    return f"{kind}_{shape}_{isa.token}_{config.mt}x{config.vectors}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (A [*batch, M, K], B [*batch, K, N] or [K, N], C [*batch, M, N]), float32."""
    w, lanes = workload, isa.lanes
    nt = config.vectors * lanes

    def body() -> None:
        lead = dims(w.batch, "b")
        m, k, n = dim(w.m, "m"), dim(w.k, "k"), dim(w.n, "n")
        a_full = argument("a", (*lead, m, k))
        b_full = argument("b", (k, n) if w.shared else (*lead, k, n))
        c_full = argument("c", (*lead, m, n))
        batch = let(product(lead))
        a, c = flat(a_full, (batch, m, k)), flat(c_full, (batch, m, n))
        b = flat(b_full, (1 if w.shared else batch, k, n))
        panels = let(at_least_one(ceil_div(n, nt)))
        blocks = let(at_least_one(ceil_div(m, config.mt)))
        # Few panels: share the rows among the threads too, at the price of packing a panel more than once.
        groups = let(tirx.Select(batch * panels < 8, tirx.min(blocks, i64(4)), i64(1)))
        with parallel(batch * panels * groups) as task:
            group = bind(task % groups)
            panel = bind(task // groups % panels)
            item = bind(task // (groups * panels))
            packed = workspace((k, nt))
            _pack(b, packed, i64(0) if w.shared else item, panel * nt, k, n, config.vectors, lanes)
            first = bind(group * blocks // groups)
            with serial((group + 1) * blocks // groups - first) as step:
                block = first + step
                low = bind(block * m // blocks)
                count = bind((block + 1) * m // blocks - low)
                _tile(config, isa, a, packed, c, item, low, count, panel * nt, k, n)

    return prim_func(name(w, config, isa), body)


def _pack(b: Buffer, packed: Buffer, item: Expr, first: Expr, k: Expr, n: Expr, vectors: int, lanes: int) -> None:
    with serial(k) as row:
        for v in range(vectors):
            column = first + v * lanes

            def whole(column: Expr = column, v: int = v) -> None:
                store(packed, load(b, item, row, column, lanes=lanes), row, v * lanes, lanes=lanes)

            def ragged(column: Expr = column, v: int = v) -> None:
                count = tirx.max(n - column, i64(0))
                store(packed, partial_load(b, item, row, column, count=count, lanes=lanes), row, v * lanes, lanes=lanes)

            when(column + lanes <= n, whole, ragged)


def _tile(
    config: Config, isa: Isa, a: Buffer, packed: Buffer, c: Buffer,
    item: Expr, low: Expr, count: Expr, first: Expr, k: Expr, n: Expr,
) -> None:  # fmt: skip
    lanes = isa.lanes

    def finish(r: int, v: int, acc: Expr) -> None:
        column = first + v * lanes
        left = tirx.max(n - column, i64(0))
        when(
            column + lanes <= n,
            lambda: store(c, acc, item, low + r, column, lanes=lanes),
            lambda: partial_store(c, acc, item, low + r, column, count=left, lanes=lanes),
        )

    def tile(rows: int) -> None:
        outer_product(
            rows,
            config.vectors,
            k,
            lambda r, step: a[item, low + r, step],
            lambda v, step: load(packed, step, v * lanes, lanes=lanes),
            finish,
            lanes=lanes,
            chains=isa.chains,
        )

    switch(count, range(config.mt, 0, -1), tile)
