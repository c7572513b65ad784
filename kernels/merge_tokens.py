"""``xopt::MergeTokens``: N tokens in, N - r out, the r most alike pairs averaged.

    for item of the batch:              in parallel
        unit = metric / |metric|        rows of length 1
        for block of A, panel of B:     a register tile of cosines, as in gemm.py
            running maximum of each row, and where it was first
        rank of a row of A              how many are better; equal ones by position
        place of each token             protected ones, then A without the r best, then B
        Y[place] = x * size, Y[place of partner] += x * size, Y / size

Sums run in the order of positions, so that results do not depend on the number of threads. A cosine that is NaN is
never the largest: with every score NaN the first rows merge into the first, and no index leaves its range.
Source    ToMe (Bolya et al., ICLR 2023); the meaning is the body in xopt/ir/ops/merge_tokens.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tvm import tirx

from xopt.kernels import vector
from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    at_least_one,
    bind,
    ceil_div,
    dim,
    i64,
    keep,
    lanes_at,
    let,
    load,
    local,
    outer_product,
    parallel,
    partial_load,
    prim_func,
    put,
    reduce_lanes,
    serial,
    splat,
    store,
    when,
    workspace,
)
from xopt.kernels.isa import Isa

VERSION = 1
TINY = 1e-12
"""Smallest norm, as in the body."""
FORBIDDEN = -2.0
"""Score of an edge at a protected token: below every cosine."""


@dataclass(frozen=True)
class Workload:
    """One merge of x [batch, tokens, width] by metric [batch, tokens, metric]; None marks a dynamic dimension.

    Args:
        batch, tokens, width, metric: extents of the inputs.
        kept: tokens of the output; r is ``tokens - kept``, so that one kernel serves every layer.
        protected: how many tokens in front are left alone.
    """

    batch: int | None
    tokens: int | None
    kept: int | None
    width: int | None
    metric: int | None
    protected: int = 0


@dataclass(frozen=True)
class Config:
    """Register tile: ``mt`` tokens of A by ``vectors`` vectors of tokens of B."""

    mt: int
    vectors: int


def space(workload: Workload, isa: Isa) -> Iterator[Config]:
    for vectors in (1, 2, 4):
        yield Config(min(isa.tile_rows(vectors), 12), vectors)


def heuristic(workload: Workload, isa: Isa) -> Config:
    """Narrow panels: after some merges B is a few vectors long, and padding costs more than loads save."""
    return next(space(workload, isa))


def name(workload: Workload, config: Config, isa: Isa) -> str:
    w = workload
    extents = (w.batch, w.tokens, w.kept, w.width, w.metric)
    shape = "x".join("any" if extent is None else str(extent) for extent in extents)
    return f"merge_tokens_{shape}_{w.protected}_{isa.token}_{config.mt}x{config.vectors}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (x [B, N, D], metric [B, N, m], size [B, N, 1], Y [B, N - r, D], Y size [B, N - r, 1])."""
    w = workload

    def body() -> None:
        batch, n, kept = dim(w.batch, "b"), dim(w.tokens, "n"), dim(w.kept, "left")
        width, m = dim(w.width, "d"), dim(w.metric, "m")
        x, metric = argument("x", (batch, n, width)), argument("metric", (batch, n, m))
        size = argument("size", (batch, n, 1))
        y, y_size = argument("y", (batch, kept, width)), argument("y_size", (batch, kept, 1))
        with parallel(batch) as item:
            best, partner = _match(w, config, isa, metric, item, n, m)
            place = _places(w, isa, best, n, n - kept)
            _merge(isa, (x, size), (y, y_size), partner, place, item, n, kept, width)

    return prim_func(name(w, config, isa), body)


def _match(
    w: Workload, config: Config, isa: Isa, metric: Buffer, item: Expr, n: Expr, m: Expr
) -> tuple[Buffer, Buffer]:
    """The largest cosine of each token of A, whole vectors filled up with -inf, and whose it is among B."""
    lanes, mt, nt = isa.lanes, config.mt, config.vectors * isa.lanes
    a, b = let((n + 1) // 2), let(n // 2)
    panels, blocks = let(ceil_div(b, nt)), let(ceil_div(a, mt))
    unit, across = workspace((n, m)), workspace((m, at_least_one(panels) * nt))
    best, partner = workspace((ceil_div(a, lanes) * lanes,)), workspace((a,), "int32")
    with serial(n) as token:
        _normalize(metric, unit, item, token, m, lanes)
    # What lies behind the last column is anything: those scores are dropped.
    with serial(b) as token, serial(m) as k:
        put(across, unit[token * 2 + 1, k], k, token)
    with serial(ceil_div(a, lanes)) as v:
        store(best, splat(-math.inf, lanes), v * lanes, lanes=lanes)
    with serial(blocks) as block:
        low = bind(block * mt)
        maxima, places = local((mt, lanes)), local((mt, lanes), "int32")
        rows = [bind(tirx.min((low + r) * 2, n - 1)) for r in range(mt)]
        for r in range(mt):
            store(maxima, splat(-math.inf, lanes), r, 0, lanes=lanes)
            store(places, splat(0, lanes, "int32"), r, 0, lanes=lanes)
        with serial(panels) as panel:
            first = bind(panel * nt)

            def consider(r: int, v: int, cosine: Expr) -> None:
                index = tirx.Ramp((first + v * lanes).astype("int32"), tirx.const(1, "int32"), lanes)
                column = let(index)
                allowed = tirx.Select(column < splat(w.protected // 2, lanes, "int32"), splat(FORBIDDEN, lanes), cosine)
                real = column < tirx.Broadcast(b.astype("int32"), lanes)
                score = keep(tirx.Select(real, allowed, splat(-math.inf, lanes)), lanes)
                old, where = load(maxima, r, 0, lanes=lanes), load(places, r, 0, lanes=lanes)
                store(places, tirx.Select(score > old, column, where), r, 0, lanes=lanes)
                store(maxima, tirx.Select(score > old, score, old), r, 0, lanes=lanes)

            outer_product(
                mt,
                config.vectors,
                m,
                lambda r, k: unit[rows[r], k],
                lambda v, k: load(across, k, first + v * lanes, lanes=lanes),
                consider,
                lanes=lanes,
                chains=isa.chains,
            )
        with serial(tirx.min(i64(mt), a - low)) as r:
            _best_lane(w, isa, maxima, places, r, best, partner, low + r)
    return best, partner


def _normalize(metric: Buffer, unit: Buffer, item: Expr, token: Expr, m: Expr, lanes: int) -> None:
    """Scale one row of the metric to length 1."""
    sums = local((lanes,))
    tail = m % lanes

    def add(value: Expr) -> None:
        value = keep(value, lanes)
        store(sums, load(sums, 0, lanes=lanes) + value * value, 0, lanes=lanes)

    store(sums, splat(0.0, lanes), 0, lanes=lanes)
    with serial(m // lanes) as v:
        add(load(metric, item, token, v * lanes, lanes=lanes))
    add(partial_load(metric, item, token, m - tail, count=tail, lanes=lanes))
    norm = tirx.sqrt(reduce_lanes(load(sums, 0, lanes=lanes), operator.add, lanes))
    store(sums, vector.at_least(keep(norm, lanes), TINY, lanes), 0, lanes=lanes)
    _fill_row(unit, (token,), m, lanes, lambda read, spread: read(metric, item, token) / spread(sums[i64(0)]))


def _best_lane(
    w: Workload, isa: Isa, maxima: Buffer, places: Buffer, r: Expr, best: Buffer, partner: Buffer, row: Expr
) -> None:
    """Of a row's maxima, one a lane, the largest at the lowest place."""
    put(best, tirx.const(-math.inf, "float32"), row)
    put(partner, tirx.const(0, "int32"), row)
    with serial(isa.lanes) as lane:
        value, column = maxima[r, lane], places[r, lane]
        earlier = tirx.And(tirx.EQ(value, best[row]), column < partner[row])

        def take() -> None:
            put(partner, column, row)
            put(best, value, row)

        when(tirx.Or(value > best[row], earlier), take)
    if w.protected:

        def forbid() -> None:
            put(best, tirx.const(FORBIDDEN, "float32"), row)
            put(partner, tirx.const(0, "int32"), row)

        when(row < i64((w.protected + 1) // 2), forbid)


def _places(w: Workload, isa: Isa, best: Buffer, n: Expr, r: Expr) -> Buffer:
    """Where each of the N tokens goes; -1 for the r that are given away."""
    place, counter = workspace((n,), "int64"), local((1,), "int64")
    a, b = let((n + 1) // 2), let(n // 2)
    with serial(n) as token:
        put(place, i64(0), token)
    with serial(a) as row:
        rank = _rank(isa, best, row, a)
        given = tirx.And(rank < r, b > i64(0))
        put(place, tirx.Select(given, i64(-1), i64(0)), row * 2)
    put(counter, i64(0), 0)

    def number(count: Expr, position: Callable[[Expr], Expr]) -> None:
        with serial(tirx.max(count, i64(0))) as index:
            token = bind(position(index))

            def assign() -> None:
                put(place, counter[i64(0)], token)
                put(counter, counter[i64(0)] + 1, 0)

            when(place[token] >= i64(0), assign)

    protected_a, protected_b = (w.protected + 1) // 2, w.protected // 2
    number(tirx.min(i64(w.protected), n), lambda index: index)
    number(a - protected_a, lambda index: (index + protected_a) * 2)
    number(b - protected_b, lambda index: (index + protected_b) * 2 + 1)
    return place


def _rank(isa: Isa, best: Buffer, row: Expr, a: Expr) -> Expr:
    """How many tokens of A have a better score than ``row``, or the same one and a lower position."""
    lanes = isa.lanes
    better = local((lanes,))
    one, zero = splat(1.0, lanes), splat(0.0, lanes)
    score = keep(splat(best[row], lanes), lanes)
    store(better, zero, 0, lanes=lanes)
    with serial(ceil_div(a, lanes)) as v:
        others = keep(load(best, v * lanes, lanes=lanes), lanes)
        before = tirx.Select(lanes_at(v * lanes, lanes) < tirx.Broadcast(row, lanes), one, zero)
        ahead = tirx.Select(others > score, one, tirx.Select(tirx.EQ(others, score), before, zero))
        store(better, load(better, 0, lanes=lanes) + ahead, 0, lanes=lanes)
    store(better, reduce_lanes(load(better, 0, lanes=lanes), operator.add, lanes), 0, lanes=lanes)
    return better[i64(0)].astype("int64")


def _merge(
    isa: Isa, inputs: tuple[Buffer, Buffer], outputs: tuple[Buffer, Buffer], partner: Buffer, place: Buffer,
    item: Expr, n: Expr, kept: Expr, width: Expr,
) -> None:  # fmt: skip
    """Write sums weighted by size, then divide by the sums of sizes."""
    (x, size), (y, y_size) = inputs, outputs
    lanes, zero = isa.lanes, i64(0)

    with serial(n) as token:
        to = bind(place[token])

        def move() -> None:
            weight = size[item, token, zero]
            put(y_size, weight, item, to, 0)
            _fill_row(y, (item, to), width, lanes, lambda read, spread: read(x, item, token) * spread(weight))

        when(tirx.And(to >= zero, to < kept), move)
    with serial((n + 1) // 2) as row:
        token = bind(row * 2)

        def give() -> None:
            into, weight = bind(place[partner[row].astype("int64") * 2 + 1]), size[item, token, zero]

            def add() -> None:
                put(y_size, y_size[item, into, zero] + weight, item, into, 0)
                _fill_row(
                    y, (item, into), width, lanes,
                    lambda read, spread: read(y, item, into) + read(x, item, token) * spread(weight),
                )  # fmt: skip

            when(into < kept, add)

        when(place[token] < zero, give)
    with serial(kept) as token:
        _fill_row(
            y, (item, token), width, lanes,
            lambda read, spread: read(y, item, token) / spread(y_size[item, token, zero]),
        )  # fmt: skip


Read = Callable[..., Expr]
Spread = Callable[[Expr], Expr]


def _fill_row(y: Buffer, row: tuple[Expr, ...], width: Expr, lanes: int, value: Callable[[Read, Spread], Expr]) -> None:
    """Write ``value(read, spread)`` along a row: vectors, then the elements that are left.

    ``read(buffer, *row)`` is what another tensor has in the same columns, ``spread(scalar)`` one number for them all.
    """
    tail = width % lanes
    with serial(width // lanes) as v:
        column = v * lanes
        whole = value(lambda t, *i: load(t, *i, column, lanes=lanes), lambda scalar: splat(scalar, lanes))
        store(y, whole, *row, column, lanes=lanes)
    with serial(tail) as c:
        column = width - tail + c
        put(y, value(lambda t, *i: t[(*i, column)], lambda scalar: scalar), *row, column)
