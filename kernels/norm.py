"""LayerNormalization and RMSNormalization over the last axis, with an optional residual added first.

    for row:                       in parallel, rows [low, high) of X [*rows, D]
        sum (x + r)                one pass over the row, which then lies in the first-level cache
        sum (x + r - mean)**2      a second pass: the exact variance, no cancellation
        (x + r - mean) * rsqrt(variance + epsilon) * scale + bias

Any D: the last partial vector is gathered lane by lane.  NaN and infinity propagate.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm import tirx

from xopt.kernels import precision
from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    dims,
    each_row,
    flat,
    i64,
    keep,
    let,
    load,
    local,
    partial_load,
    prim_func,
    product,
    put,
    reduce_lanes,
    serial,
    splat,
    store,
)
from xopt.kernels.isa import Isa
from xopt.kernels.precision import Result

VERSION = 1


@dataclass(frozen=True)
class Workload:
    """One normalization.

    Args:
        rows: leading dimensions, None where dynamic.
        width: the normalized last axis.
        epsilon: added to the variance (or mean square).
        rms: RMSNormalization: no mean, no bias.
        bias: LayerNormalization with its bias.
        residual: normalize x + r, and also give x + r as a first output.
        results: formats that the normalized rows are written in: "float32", "bfloat16", "uint8".
    """

    rows: tuple[int | None, ...]
    width: int
    epsilon: float
    rms: bool = False
    bias: bool = True
    residual: bool = False
    results: tuple[str, ...] = ("float32",)


@dataclass(frozen=True)
class Config:
    """``chains`` independent partial sums hide the latency of the additions."""

    chains: int


def space(workload: Workload, isa: Isa) -> Iterator[Config]:
    for chains in (1, 2, 4, 8):
        if chains * isa.lanes <= max(workload.width, isa.lanes):
            yield Config(chains)


def heuristic(workload: Workload, isa: Isa) -> Config:
    return max((c for c in space(workload, isa) if c.chains <= 4), key=lambda c: c.chains)


def pack_vector(values: npt.NDArray[np.float32], isa: Isa) -> npt.NDArray[np.float32]:
    """Scale or bias [D], zero padded to whole vectors."""
    return np.pad(values.astype(np.float32), (0, -len(values) % isa.lanes))


def name(workload: Workload, config: Config, isa: Isa) -> str:
    rows = "x".join("any" if extent is None else str(extent) for extent in workload.rows)
    kind = "rms_norm" if workload.rms else "layer_norm"
    parts = [part for part in ("bias", "residual") if getattr(workload, part) and not (part == "bias" and workload.rms)]
    epsilon = f"{workload.epsilon:g}".replace("-", "m").replace(".", "p").replace("+", "")
    return "_".join(
        [
            kind,
            rows,
            str(workload.width),
            epsilon,
            *parts,
            *precision.suffix("float32", workload.results),
            isa.token,
            str(config.chains),
        ]
    )


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (X [*rows, D], [R], scale, [bias], [quantization], [X + R], Y...), packed by `pack_vector`.

    Y comes once for each format; quantization belongs to "uint8" (`xopt.kernels.precision.Result`).
    """
    w, lanes = workload, isa.lanes
    padded = -(-w.width // lanes) * lanes

    def body() -> None:
        rows = dims(w.rows, "m")
        shape = (*rows, w.width)
        x_full = argument("x", shape)
        r_full = argument("r", shape) if w.residual else None
        scale = argument("scale", (padded,))
        bias = argument("bias", (padded,)) if w.bias and not w.rms else None
        quantization = precision.quantization_argument(w.results)
        sum_full = argument("sum", shape) if w.residual else None
        y_full = Result(precision.result_arguments("y", w.results, shape), quantization, isa)
        m = let(product(rows))
        x, r, total = (t if t is None else flat(t, (m, w.width)) for t in (x_full, r_full, sum_full))
        y = y_full.flat((m, w.width))
        with each_row(m, w.rows, w.width) as row:
            if r is not None:
                _add(x, r, total, row, w.width, lanes)
            _normalize(w, config, isa, total if r is not None else x, scale, bias, y, row)

    return prim_func(name(w, config, isa), body)


def _add(x: Buffer, r: Buffer, total: Buffer, row: Expr, width: int, lanes: int) -> None:
    if whole := width // lanes:
        with serial(whole) as v:
            column = v * lanes
            store(
                total, load(x, row, column, lanes=lanes) + load(r, row, column, lanes=lanes), row, column, lanes=lanes
            )
    for column in range(width - width % lanes, width):
        put(total, x[row, i64(column)] + r[row, i64(column)], row, column)


def _normalize(
    w: Workload, config: Config, isa: Isa, x: Buffer, scale: Buffer, bias: Buffer | None, y: Result, row: Expr
) -> None:
    lanes = isa.lanes
    mean = None if w.rms else _mean(w, config, isa, x, row)
    square = _mean(w, config, isa, x, row, splat(0.0, lanes) if mean is None else mean)
    factor = keep(splat(1.0, lanes) / tirx.sqrt(square + splat(w.epsilon, lanes)), lanes)

    def normalized(value: Expr, column: int | Expr) -> Expr:
        centred = value if mean is None else value - mean
        result = centred * factor * load(scale, column, lanes=lanes)
        return result if bias is None else result + load(bias, column, lanes=lanes)

    whole, tail = divmod(w.width, lanes)
    if whole:
        with serial(whole) as v:
            column = v * lanes
            y.store(normalized(load(x, row, column, lanes=lanes), column), row, column)
    if tail:
        column = whole * lanes
        value = normalized(partial_load(x, row, column, count=tail, lanes=lanes), column)
        y.partial_store(value, row, column, count=tail)


def _mean(w: Workload, config: Config, isa: Isa, x: Buffer, row: Expr, centre: Expr | None = None) -> Expr:
    """The mean of the row, or of its squared distance from ``centre``, in every lane."""
    lanes = isa.lanes
    sums = local((config.chains, lanes))

    def add(chain: int, value: Expr) -> None:
        if centre is not None:
            distance = keep(value - centre, lanes)
            value = distance * distance
        store(sums, load(sums, chain, 0, lanes=lanes) + value, chain, 0, lanes=lanes)

    for chain in range(config.chains):
        store(sums, splat(0.0, lanes), chain, 0, lanes=lanes)
    whole, tail = divmod(w.width, lanes)
    trips, rest = divmod(whole, config.chains)
    if trips:
        with serial(trips) as v:
            for chain in range(config.chains):
                add(chain, load(x, row, (v * config.chains + chain) * lanes, lanes=lanes))
    for chain in range(rest):
        add(chain, load(x, row, (trips * config.chains + chain) * lanes, lanes=lanes))
    if tail:
        # Lanes past the row hold the centre itself, so that they add nothing.
        fill = splat(0.0, lanes) if centre is None else centre
        add(0, partial_load(x, row, whole * lanes, count=tail, lanes=lanes, fill=fill))
    total = load(sums, 0, 0, lanes=lanes)
    for chain in range(1, config.chains):
        total = total + load(sums, chain, 0, lanes=lanes)
    return keep(reduce_lanes(total, operator.add, lanes) * splat(1.0 / w.width, lanes), lanes)
