"""RotaryEmbedding on the 3-D form: each head's features are rotated in pairs by an angle that grows with the position.

    for sequence, position:          in parallel
        for head, pair (i, j):       j = i + rotary / 2 (halves), or pairs (2i, 2i + 1) (interleaved)
            y_i = cos * x_i - sin * x_j
            y_j = sin * x_i + cos * x_j

Features past ``rotary`` are copied.  Source    Su et al., RoFormer (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    bind,
    dim,
    i64,
    keep,
    let,
    load,
    parallel,
    partial_load,
    partial_store,
    prim_func,
    put,
    serial,
    shuffle,
    store,
)
from xopt.kernels.fixed import Config as Config
from xopt.kernels.fixed import heuristic as heuristic
from xopt.kernels.fixed import space as space
from xopt.kernels.isa import Isa

VERSION = 2


@dataclass(frozen=True)
class Workload:
    """One rotation of X [batch, sequence, heads * head_dim]; None marks a dynamic dimension.

    Args:
        rotary: how many leading features of each head turn (even).
        interleaved: pairs are neighbours, not halves.
        positions: rows of the tables when int64 position_ids [batch, sequence] choose them (None: dynamic count);
            0 when the tables already are [batch, sequence, rotary / 2].
    """

    batch: int | None
    sequence: int | None
    heads: int
    head_dim: int
    rotary: int
    interleaved: bool = False
    positions: int | None = 0


def name(workload: Workload, config: Config, isa: Isa) -> str:
    w = workload
    shape = "x".join("any" if e is None else str(e) for e in (w.batch, w.sequence, w.heads, w.head_dim, w.rotary))
    table = "any" if w.positions is None else str(w.positions)
    return f"rotary_{'pairs' if w.interleaved else 'halves'}_{shape}_{table}_{isa.token}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (X, cos, sin, [position_ids], Y)."""
    w = workload

    def body() -> None:
        batch, sequence = dim(w.batch, "batch"), dim(w.sequence, "sequence")
        x = argument("x", (batch, sequence, w.heads * w.head_dim))
        looked_up = w.positions != 0
        lead = (dim(w.positions, "positions"),) if looked_up else (batch, sequence)
        cos, sin = argument("cos", (*lead, w.rotary // 2)), argument("sin", (*lead, w.rotary // 2))
        ids = argument("position_ids", (batch, sequence), "int64") if looked_up else None
        y = argument("y", (batch, sequence, w.heads * w.head_dim))
        with parallel(let(batch * sequence)) as task:
            b, s = bind(task // sequence), bind(task % sequence)
            angle = (_row(ids[b, s], lead[0]),) if ids is not None else (b, s)
            with serial(w.heads) as head:
                _rotate(w, isa.lanes, x, y, cos, sin, (b, s), angle, bind(head * w.head_dim))

    return prim_func(name(w, config, isa), body)


def _row(position: Expr, rows: Expr) -> Expr:
    """The row of the tables: negative positions count from the end, and none reads outside, whatever the data says."""
    position = bind(tirx.Select(position < i64(0), position + rows, position))
    return bind(tirx.max(tirx.min(position, rows - 1), i64(0)))


def _rotate(
    w: Workload, lanes: int, x: Buffer, y: Buffer, cos: Buffer, sin: Buffer,
    row: tuple[Expr, Expr], angle: tuple[Expr, ...], first: Expr,
) -> None:  # fmt: skip
    half = w.rotary // 2

    def turn(i: int | Expr, count: int) -> None:
        """Rotate ``count`` pairs from pair ``i`` on."""
        a, b = _pairs(w, x, row, first, i, count, lanes)
        c = keep(_load(cos, *angle, i, count=count, lanes=lanes), lanes)
        s = keep(_load(sin, *angle, i, count=count, lanes=lanes), lanes)
        _put_pairs(w, y, row, first, i, count, lanes, keep(c * a - s * b, lanes), keep(s * a + c * b, lanes))

    whole, tail = divmod(half, lanes)
    if whole:
        with serial(whole) as v:
            turn(v * lanes, lanes)
    if tail:
        turn(whole * lanes, tail)
    if w.rotary < w.head_dim:
        with serial(w.head_dim - w.rotary) as rest:
            column = first + w.rotary + rest
            put(y, x[(*row, column)], *row, column)


def _load(buffer: Buffer, *index: int | Expr, count: int, lanes: int) -> Expr:
    if count == lanes:
        return load(buffer, *index, lanes=lanes)
    return partial_load(buffer, *index, count=count, lanes=lanes)


def _store(buffer: Buffer, value: Expr, *index: int | Expr, count: int, lanes: int) -> None:
    if count == lanes:
        store(buffer, value, *index, lanes=lanes)
    else:
        partial_store(buffer, value, *index, count=count, lanes=lanes)


def _pairs(
    w: Workload, x: Buffer, row: tuple[Expr, Expr], first: Expr, i: int | Expr, count: int, lanes: int
) -> tuple[Expr, Expr]:
    """First and second members of ``count`` pairs."""
    if not w.interleaved:
        columns = (first + i, first + w.rotary // 2 + i)
        a, b = (keep(_load(x, *row, column, count=count, lanes=lanes), lanes) for column in columns)
        return a, b
    low, high = min(2 * count, lanes), max(2 * count - lanes, 0)
    one = keep(_load(x, *row, first + 2 * i64(i), count=low, lanes=lanes), lanes)
    two = one if not high else keep(_load(x, *row, first + 2 * i64(i) + lanes, count=high, lanes=lanes), lanes)
    even, odd = ([2 * lane + side for lane in range(lanes)] for side in (0, 1))
    return keep(shuffle([one, two], even), lanes), keep(shuffle([one, two], odd), lanes)


def _put_pairs(
    w: Workload, y: Buffer, row: tuple[Expr, Expr], first: Expr, i: int | Expr, count: int, lanes: int,
    a: Expr, b: Expr,
) -> None:  # fmt: skip
    if not w.interleaved:
        for column, value in ((first + i, a), (first + w.rotary // 2 + i, b)):
            _store(y, value, *row, column, count=count, lanes=lanes)
        return
    mixed = [lane // 2 + lanes * (lane % 2) for lane in range(2 * lanes)]
    low, high = min(2 * count, lanes), max(2 * count - lanes, 0)
    _store(y, shuffle([a, b], mixed[:lanes]), *row, first + 2 * i64(i), count=low, lanes=lanes)
    if high:
        _store(y, shuffle([a, b], mixed[lanes:]), *row, first + 2 * i64(i) + lanes, count=high, lanes=lanes)
