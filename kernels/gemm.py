"""Linear layer: ``C[M, N] = act(A[M, K] @ W[K, N] + bias) * gate + residual``, with W packed at compile time.

    for panel (NT columns of W), block of rows:      in parallel; a thread keeps to its panels, W is read once
        acc[rows, NT] in registers = sum over K      a row of A broadcast against the vectors of the panel
        for row: epilogue, store                     from an L1-resident copy of the tile

The M rows are split evenly over the row blocks, so each block holds ``MT`` rows or a few less: one specialized tile per
row count, chosen at run time, and no masked work for any M.  When A outgrows the cache, the rows are walked in groups.
Ragged N: W and bias are padded with zeros, the last columns are stored one by one.
Source    Goto, van de Geijn (2008): panels packed for a register tile; a rank-1 update per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xopt.kernels import vector
from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    at_least_one,
    bind,
    ceil_div,
    dims,
    flat,
    i64,
    keep,
    let,
    load,
    local,
    outer_product,
    parallel,
    partial_load,
    partial_store,
    prefetch,
    prim_func,
    product,
    serial,
    store,
    switch,
    when,
)
from xopt.kernels.isa import Isa

VERSION = 1
MOST_ROWS = 14  # every row count is a copy of the tile: more of them cost compile time and gain little
GROUP_BYTES = 2 << 20  # rows of A that are read again for every panel should stay in the second- or third-level cache


@dataclass(frozen=True)
class Workload:
    """One linear layer.

    Args:
        rows: leading dimensions of A and C, None where dynamic: ``(None,)`` is A[M, K], ``(None, None)`` A[B, S, K].
        k: input features.
        n: output features.
        bias: add a vector [N padded] (see `pack_bias`) before the activation.
        activation: "none", "gelu", "gelu-tanh", "swish" or "relu".
        alpha: the factor inside swish.
        gate: multiply by a tensor shaped like C, after the activation.
        residual: add a tensor shaped like C, last.
    """

    rows: tuple[int | None, ...]
    k: int
    n: int
    bias: bool = False
    activation: str = "none"
    alpha: float = 1.0
    gate: bool = False
    residual: bool = False

    @property
    def m(self) -> int | None:
        """The number of rows, None when any leading dimension is dynamic."""
        static = [extent for extent in self.rows if extent is not None]
        return math.prod(static) if len(static) == len(self.rows) else None


@dataclass(frozen=True)
class Config:
    """Register tile: at most ``mt`` rows by ``vectors`` vectors of columns."""

    mt: int
    vectors: int

    def panel(self, isa: Isa) -> int:
        """Columns of a packed panel of W."""
        return self.vectors * isa.lanes


def space(workload: Workload, isa: Isa) -> Iterator[Config]:
    """Every tile that fits the registers and is not wider than N."""
    widest = max(1, min(6, -(-workload.n // isa.lanes)))
    for vectors in range(1, widest + 1):
        full = min(isa.tile_rows(vectors), workload.m or isa.registers)
        for mt in range(max(1, full // 2), full + 1):
            yield Config(mt, vectors)


def heuristic(workload: Workload, isa: Isa) -> Config:
    """The tile that loads least per multiply-add, counting the columns padded for a ragged N."""

    def cost(vectors: int) -> float:
        mt = min(isa.tile_rows(vectors), MOST_ROWS)
        panel = vectors * isa.lanes
        padded = -(-workload.n // panel) * panel
        loads = (mt + vectors) / (mt * vectors)
        return padded * (1.0 + 0.2 * loads)

    widest = 4 if isa.registers > 16 else 3
    best = min(range(1, widest + 1), key=cost)
    mt = min(isa.tile_rows(best), MOST_ROWS)
    return Config(min(mt, workload.m) if workload.m else mt, best)


def pack_weight(weight: npt.NDArray[np.float32], config: Config, isa: Isa) -> npt.NDArray[np.float32]:
    """W [K, N] as panels [ceil(N / NT), K, vectors, lanes], zero padded."""
    k, n = weight.shape
    panel = config.panel(isa)
    padded = np.zeros((k, -(-n // panel) * panel), np.float32)
    padded[:, :n] = weight
    panels = padded.reshape(k, -1, config.vectors, isa.lanes).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(panels)


def pack_bias(bias: npt.NDArray[np.float32], config: Config, isa: Isa) -> npt.NDArray[np.float32]:
    """Bias [N], zero padded to whole panels."""
    return np.pad(bias.astype(np.float32), (0, -len(bias) % config.panel(isa)))


def name(workload: Workload, config: Config, isa: Isa) -> str:
    rows = "x".join("any" if extent is None else str(extent) for extent in workload.rows)
    parts = [f"gemm_{rows}_{workload.k}x{workload.n}"]
    parts += [part for part in ("bias", "gate", "residual") if getattr(workload, part)]
    if workload.activation != "none":
        parts.append(workload.activation.replace("-", "_") + f"{workload.alpha:g}".replace(".", "p"))
    return "_".join([*parts, isa.name, f"{config.mt}x{config.vectors}"])


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (A [*rows, K], W packed, [bias packed], [gate], [residual], C [*rows, N]), all float32."""
    w = workload
    lanes, vectors, nt = isa.lanes, config.vectors, config.panel(isa)
    panels = -(-w.n // nt)

    def body() -> None:
        rows = dims(w.rows, "m")
        a_full = argument("a", (*rows, w.k))
        weight = argument("w", (panels, w.k, vectors, lanes))
        bias = argument("bias", (panels * nt,)) if w.bias else None
        sides = {side: argument(side, (*rows, w.n)) for side in ("gate", "residual") if getattr(w, side)}
        c_full = argument("c", (*rows, w.n))
        m = let(product(rows))
        a = flat(a_full, (m, w.k))
        c = flat(c_full, (m, w.n))
        epilogue = _Epilogue(w, isa, bias, {side: flat(t, (m, w.n)) for side, t in sides.items()}, c)

        blocks = let(at_least_one(ceil_div(m, config.mt)))
        groups = let(at_least_one(ceil_div(m * (4 * w.k), GROUP_BYTES)))
        group = let(ceil_div(blocks, groups))
        with parallel(groups * panels * group) as task:
            panel = bind(task // group % panels)
            block = bind(task // (group * panels) * group + task % group)
            low = bind(block * m // blocks)
            count = bind((block + 1) * m // blocks - low)
            stage = local((config.mt, nt))
            line = bind(block % vectors)

            def tile(count: int) -> None:
                outer_product(
                    count,
                    vectors,
                    w.k,
                    lambda r, k: a[low + r, k],
                    lambda v, k: load(weight, panel, k, v, 0, lanes=lanes),
                    lambda r, v, acc: store(stage, acc, r, v * lanes, lanes=lanes),
                    lanes=lanes,
                    chains=isa.chains,
                    # A model's weights fit no cache: each block fetches a share of the next panel.  So few rows
                    # come only as a single block, which memory limits anyway.
                    ahead=None if 2 * count <= config.mt else lambda k: prefetch(weight, panel + 1, k, line, 0),
                )

            def compute() -> None:
                switch(count, _counts(w.m, config.mt), tile)
                with serial(count) as r:
                    epilogue.row(stage, r, low + r, panel, nt)

            when(block < blocks, compute)

    return prim_func(name(w, config, isa), body)


def _counts(m: int | None, mt: int) -> list[int]:
    """The row counts that an even split of m rows into blocks of at most mt can give, most frequent first."""
    if m is None:
        return list(range(mt, 0, -1))
    blocks = max(1, -(-m // mt))
    return sorted({m // blocks, -(-m // blocks)} - {0}, reverse=True)


@dataclass(frozen=True)
class _Epilogue:
    """Bias, activation, gate and residual of one row of a tile, and the store into C."""

    workload: Workload
    isa: Isa
    bias: Buffer | None
    sides: dict[str, Buffer]
    c: Buffer

    def row(self, stage: Buffer, stage_row: Expr, row: Expr, panel: Expr, nt: int) -> None:
        full = self.workload.n // nt
        ragged = self.workload.n % nt
        if not ragged:
            self.columns(stage, stage_row, row, panel * nt, nt)
        elif not full:
            self.columns(stage, stage_row, row, i64(0), ragged)
        else:
            when(
                panel < full,
                lambda: self.columns(stage, stage_row, row, panel * nt, nt),
                lambda: self.columns(stage, stage_row, row, i64(full * nt), ragged),
            )

    def columns(self, stage: Buffer, stage_row: Expr, row: Expr, first: Expr, width: int) -> None:
        lanes = self.isa.lanes
        if vectors := width // lanes:
            with serial(vectors) as v:
                column = bind(first + v * lanes)
                sides = {side: load(t, row, column, lanes=lanes) for side, t in self.sides.items()}
                store(self.c, self.value(stage, stage_row, v * lanes, column, sides), row, column, lanes=lanes)
        if tail := width % lanes:
            offset = width - tail
            column = first + offset
            sides = {side: partial_load(t, row, column, count=tail, lanes=lanes) for side, t in self.sides.items()}
            value = self.value(stage, stage_row, offset, column, sides)
            partial_store(self.c, value, row, column, count=tail, lanes=lanes)

    def value(self, stage: Buffer, stage_row: Expr, offset: int | Expr, column: Expr, sides: dict[str, Expr]) -> Expr:
        lanes = self.isa.lanes
        value = load(stage, stage_row, offset, lanes=lanes)
        if self.bias is not None:
            value = value + load(self.bias, column, lanes=lanes)
        value = keep(value, lanes)
        value = vector.activation(self.workload.activation, self.workload.alpha)(value, lanes)
        if "gate" in sides:
            value = value * sides["gate"]
        if "residual" in sides:
            value = value + sides["residual"]
        return value
