"""Linear layer: ``C[M, N] = act(A[M, K] @ W[K, N] + bias) * gate + residual``, with W packed at compile time.

    for panel (NT columns of W), block of rows:      in parallel; a thread keeps to its panels, W is read once
        acc[rows, NT] in registers = sum over K      a row of A broadcast against the vectors of the panel
        for row: epilogue, store                     from an L1-resident copy of the tile

The M rows are split evenly over the row blocks, so each block holds ``MT`` rows or a few less: one specialized tile per
row count, chosen at run time, and no masked work for any M.  When A outgrows the cache, the rows are walked in groups.
Ragged N: W and bias are padded with zeros, the last columns are stored one by one.

A and W are float32, bfloat16 or int8 (see `xopt.kernels.precision`); sums are float32 or int32, and the epilogue is
float32.  For int8, with x = scale_a (q - zero_point) and w = scale_w[n] q:

    C[m, n] = act(scale[n] * (sum_k a[m, k] w[k, n] - offset[n]) + bias[n]) ...
              scale = scale_a scale_w[n]     offset = zero_point * sum_k w[k, n], where the integer sum starts

Source    Goto, van de Geijn (2008): panels packed for a register tile; a rank-1 update per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tvm import tirx

from xopt.kernels import precision, vector
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
    prefetch,
    prim_func,
    product,
    serial,
    splat,
    store,
    switch,
    when,
)
from xopt.kernels.isa import Isa
from xopt.kernels.precision import Precision, Result

Array: TypeAlias = npt.NDArray[Any]

VERSION = 2
MOST_ROWS = 14  # every row count is a copy of the tile: more of them cost compile time and gain little
FEW_ROWS, NARROW = 16, 2
STEPS_AHEAD = 16
PANEL_BYTES = 640 << 10  # a panel of W is read again for every block of rows, and shares the second-level cache with A
LATE_BYTES = 384 << 10
GROUP_BYTES = 2 << 20  # rows of A that are read again for every panel should stay in the second- or third-level cache


@dataclass(frozen=True)
class Workload:
    """One linear layer.

    Args:
        rows: leading dimensions of A and C, None where dynamic: ``(None,)`` is A[M, K], ``(None, None)`` A[B, S, K].
        k: input features.
        n: output features.
        bias: add a vector [N padded] (see `pack_columns`) before the activation.
        activation: "none", "gelu", "gelu-tanh", "swish" or "relu".
        alpha: the factor inside swish.
        gate: multiply by a tensor shaped like C, after the activation.
        residual: add a tensor shaped like C, last.
        operands: "float32", "bfloat16" or "int8", the precision of A and W.
        results: formats that C is written in, each a tensor of its own: "float32", "bfloat16", "uint8" or
            "uint8-columns".
    """

    rows: tuple[int | None, ...]
    k: int
    n: int
    bias: bool = False
    activation: str = "none"
    alpha: float = 1.0
    gate: bool = False
    residual: bool = False
    operands: str = "float32"
    results: tuple[str, ...] = ("float32",)

    @property
    def precision(self) -> Precision:
        """How A and W lie in memory."""
        return precision.BY_NAME[self.operands]

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
    """Every tile of at most `MOST_ROWS` that fits the registers and is not wider than N."""
    widest = max(1, min(6, -(-workload.n // isa.lanes)))
    for vectors in range(1, widest + 1):
        full = min(isa.tile_rows(vectors), MOST_ROWS, workload.m or MOST_ROWS)
        for mt in range(max(1, full // 2), full + 1):
            yield Config(mt, vectors)


def heuristic(workload: Workload, isa: Isa) -> Config:
    """The tile that loads least per multiply-add, counting the columns padded for a ragged N.

    It is narrower where K is so long that a wider panel leaves the cache, and where rows are few, or may be: it then
    takes more of them at once, and W is read from memory once for all of them.
    """
    if workload.m is not None and 1 < workload.m <= FEW_ROWS:
        vectors = min(NARROW, -(-workload.n // isa.lanes))
        blocks = -(-workload.m // min(isa.tile_rows(vectors), MOST_ROWS))
        return Config(-(-workload.m // blocks), vectors)

    def cost(vectors: int) -> float:
        mt = min(isa.tile_rows(vectors), MOST_ROWS)
        panel = vectors * isa.lanes
        padded = -(-workload.n // panel) * panel
        loads = (mt + vectors) / (mt * vectors)
        return padded * (1.0 + 0.2 * loads)

    most = 4 if isa.registers > 16 and workload.m is not None else 3
    column = 4 * workload.precision.padded(workload.k) // workload.precision.pack
    widest = max(NARROW, min(most, PANEL_BYTES // (column * isa.lanes)))
    best = min(range(1, widest + 1), key=cost)
    mt = min(isa.tile_rows(best), MOST_ROWS)
    return Config(min(mt, workload.m) if workload.m else mt, best)


def pack_weight(weight: Array, config: Config, isa: Isa, operands: str = "float32") -> Array:
    """W [K, N] (float32; int8 for "int8") as panels [ceil(N / NT), ceil(K / pack), vectors, lanes * pack], zero padded.

    ``pack`` neighbours along K of one column lie side by side.
    """
    form = precision.BY_NAME[operands]
    (k, n), panel, depth = weight.shape, config.panel(isa), form.padded(weight.shape[0]) // form.pack
    packed = np.empty((-(-n // panel), depth, config.vectors, isa.lanes * form.pack), form.weight)
    for index, target in enumerate(packed):  # one at a time: a vocabulary's matrix is hundreds of megabytes
        columns = weight[:, index * panel : (index + 1) * panel]
        block = np.zeros((form.padded(k), panel), form.weight)
        block[:k, : columns.shape[1]] = precision.to_bfloat16(columns) if operands == "bfloat16" else columns
        lanes = block.reshape(depth, form.pack, config.vectors, isa.lanes)
        target[...] = lanes.transpose(0, 2, 3, 1).reshape(target.shape)
    return packed


def pack_columns(values: Array, config: Config, isa: Isa) -> Array:
    """One number per column [N] (bias, scale, offset), zero padded to whole panels."""
    return np.pad(values, (0, -len(values) % config.panel(isa)))


def offset(weight: npt.NDArray[np.int8], zero_point: int) -> npt.NDArray[np.int32]:
    """What int8 sums over K are too large by, because activations are stored with a zero point."""
    sums: npt.NDArray[np.int32] = weight.astype(np.int32).sum(axis=0, dtype=np.int32)
    return np.multiply(sums, zero_point, dtype=np.int32)


def name(workload: Workload, config: Config, isa: Isa) -> str:
    rows = "x".join("any" if extent is None else str(extent) for extent in workload.rows)
    parts = [f"gemm_{rows}_{workload.k}x{workload.n}"]
    parts += [part for part in ("bias", "gate", "residual") if getattr(workload, part)]
    if workload.activation != "none":
        parts.append(workload.activation.replace("-", "_") + f"{workload.alpha:g}".replace(".", "p"))
    parts += precision.suffix(workload.operands, workload.results)
    return "_".join([*parts, isa.token, f"{config.mt}x{config.vectors}"])


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (A [*rows, K], W packed, [scale, offset], [bias], [gate], [residual], [quantization], C...).

    A [*rows, K padded] holds what `Precision.activation` says; scale and offset (int32) come with int8, quantization
    with a "uint8" result (`xopt.kernels.precision.Result`); C [*rows, N] comes once for each format.
    """
    w = workload
    form = w.precision
    lanes, vectors, nt = isa.lanes, config.vectors, config.panel(isa)
    panels = -(-w.n // nt)
    depth = form.padded(w.k) // form.pack

    def body() -> None:
        rows = dims(w.rows, "m")
        a_full = argument("a", (*rows, form.padded(w.k)), form.activation)
        weight = argument("w", (panels, depth, vectors, lanes * form.pack), form.weight)
        scale, start = (
            (argument("scale", (panels * nt,)), argument("offset", (panels * nt,), "int32"))
            if form is precision.INT8
            else (None, None)
        )
        bias = argument("bias", (panels * nt,)) if w.bias else None
        sides = {side: argument(side, (*rows, w.n)) for side in ("gate", "residual") if getattr(w, side)}
        quantization = precision.quantization_argument(w.results, w.n)
        c_full = precision.result_arguments("c", w.results, (*rows, w.n))
        steps = flat(weight, (panels * depth, vectors, lanes * form.pack))
        m = let(product(rows))
        a = flat(a_full, (m, form.padded(w.k)))
        result = Result(c_full, quantization, isa).flat((m, w.n))
        epilogue = _Epilogue(w, isa, scale, bias, {side: flat(t, (m, w.n)) for side, t in sides.items()}, result)

        blocks = let(at_least_one(ceil_div(m, config.mt)))
        groups = let(at_least_one(ceil_div(m * (4 * depth), GROUP_BYTES)))
        group = let(ceil_div(blocks, groups))
        with parallel(groups * panels * group) as task:
            panel = bind(task // group % panels)
            block = bind(task // (group * panels) * group + task % group)
            low = bind(block * m // blocks)
            count = bind((block + 1) * m // blocks - low)
            stage = local((config.mt, nt), form.accumulator)
            line = bind(block % vectors)
            # A single block is done with its panel before it could fetch the next: it looks a few steps ahead. Where
            # the cache does not hold two panels, the next one comes with the last blocks; the others fetch nothing new.
            late = blocks - vectors if 4 * depth * nt > LATE_BYTES else i64(0)
            distance = bind(tirx.Select(blocks == 1, i64(STEPS_AHEAD), tirx.Select(block >= late, i64(depth), i64(0))))

            def fetch(k: Expr, lines: int) -> None:
                for i in range(lines):
                    prefetch(steps, panel * depth + k + distance, (line + i) % vectors, 0)

            def tile(count: int, lines: int) -> None:
                outer_product(
                    count,
                    vectors,
                    depth,
                    lambda r, k: precision.scalar_lane(a, form, low + r, k * form.pack),
                    lambda v, k: precision.vector_lanes(weight, form, panel, k, v, 0, lanes=lanes),
                    lambda r, v, acc: store(stage, acc, r, v * lanes, lanes=lanes),
                    lanes=lanes,
                    chains=isa.chains,
                    start=None
                    if start is None
                    else lambda r, v: splat(0, lanes, "int32") - load(start, panel * nt + v * lanes, lanes=lanes),
                    dot=precision.dot(form, isa),
                    ahead=lambda k: fetch(k, lines),
                )

            def compute() -> None:
                # A model's weights fit no cache: the blocks fetch the next panel, all of it each when they are few.
                # One row reads them in order, which the processor foresees.
                few, many = _counts(w.m, config)
                when(
                    blocks < vectors,
                    lambda: switch(count, few, lambda count: tile(count, vectors if count > 1 else 0)),
                    lambda: switch(count, many, partial(tile, lines=1)),
                )
                with serial(count) as r:
                    epilogue.row(stage, r, low + r, panel, nt)

            when(block < blocks, compute)

    return prim_func(name(w, config, isa), body)


def _counts(m: int | None, config: Config) -> tuple[list[int], list[int]]:
    """The row counts that an even split of m rows can give: into fewer blocks than vectors, and into as many or more.

    The most frequent come first.
    """
    mt, vectors = config.mt, config.vectors
    if m is None:
        least = ((vectors - 1) * mt + 1) // vectors
        return list(range(mt, 0, -1)), list(range(mt, max(least, 1) - 1, -1))
    blocks = max(1, -(-m // mt))
    counts = sorted({m // blocks, -(-m // blocks)} - {0}, reverse=True)
    return (counts, []) if blocks < vectors else ([], counts)


@dataclass(frozen=True)
class _Epilogue:
    """Scale, bias, activation, gate and residual of one row of a tile, and the store into C."""

    workload: Workload
    isa: Isa
    scale: Buffer | None
    bias: Buffer | None
    sides: dict[str, Buffer]
    c: Result

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
                self.c.store(self.value(stage, stage_row, v * lanes, column, sides), row, column)
        if tail := width % lanes:
            offset = width - tail
            column = first + offset
            sides = {side: partial_load(t, row, column, count=tail, lanes=lanes) for side, t in self.sides.items()}
            value = self.value(stage, stage_row, offset, column, sides)
            self.c.partial_store(value, row, column, count=tail)

    def value(self, stage: Buffer, stage_row: Expr, offset: int | Expr, column: Expr, sides: dict[str, Expr]) -> Expr:
        lanes = self.isa.lanes
        value = load(stage, stage_row, offset, lanes=lanes)
        if self.scale is not None:
            value = value.astype(f"float32x{lanes}") * load(self.scale, column, lanes=lanes)
        if self.bias is not None:
            value = value + load(self.bias, column, lanes=lanes)
        value = keep(value, lanes)
        coarse = "float32" not in self.workload.results
        value = vector.activation(self.workload.activation, self.workload.alpha, coarse)(value, lanes)
        if "gate" in sides:
            value = value * sides["gate"]
        if "residual" in sides:
            value = value + sides["residual"]
        return value
