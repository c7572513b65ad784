"""Fused softmax attention: ``softmax(scale * Q K^T + mask) V`` per head, without ever holding a full score matrix.

    for sequence, head, block of queries:              in parallel; queries lie in the vector lanes
        QT [d, queries] = scale * log2(e) * Q^T         shuffled transpose, stays in the first-level cache
        for block of keys:                              online softmax: memory does not grow with T
            P [keys, queries]  = K . QT                 register tile: rows of K broadcast, read in place
            P, maximum, sum    = 2 ** (P - maximum)     lane by lane, no reduction across lanes
            OT [dv, queries]   = OT * rescale + V^T P   register tile: columns of V broadcast, read in place
        O = (OT / sum)^T

Because K and V are only ever broadcast, any head_dim, key count, row stride and column offset runs at full speed, and a
fused QKV projection is read where it lies.  Causal attention ends the key loop at the last visible key.
Source    Milakov, Gimelshein (2018), online softmax; Dao et al. (NeurIPS 2022), FlashAttention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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
    prim_func,
    put,
    serial,
    splat,
    store,
    switch,
    transpose,
    when,
)
from xopt.kernels.isa import Isa

VERSION = 1


@dataclass(frozen=True)
class Operand:
    """Where Q, K or V lies: columns from ``offset`` on of input number ``buffer``, which is ``width`` wide."""

    buffer: int
    width: int
    offset: int = 0


@dataclass(frozen=True)
class Workload:
    """One attention; None marks a dynamic dimension.

    Args:
        batch, queries, keys: B, S, T.
        heads, kv_heads: query heads, and key/value heads that groups of them share.
        head_dim, v_head_dim: d of Q and K, dv of V and the output.
        scale: the factor on Q K^T.
        causal: query i sees keys 0..i.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask; 0 for none.
        mask: "none", "bool" (True attends; a row without any gives zeros) or "float" (added).
        mask_shape: its four dimensions: 1 where it broadcasts, anything else where it is B, heads, S, T.
        q, k, v: where the operands lie.
        heads_first: the 4-D form [B, heads, S, d], each operand a tensor of its own.
    """

    batch: int | None
    queries: int | None
    keys: int | None
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    q: Operand
    k: Operand
    v: Operand
    causal: bool = False
    softcap: float = 0.0
    mask: str = "none"
    mask_shape: tuple[int | None, int | None, int | None, int | None] = (1, 1, 1, 1)
    heads_first: bool = False

    @property
    def mask_per_query(self) -> bool:
        """The mask differs from query to query."""
        return self.mask != "none" and self.mask_shape[2] != 1

    @property
    def mask_per_key(self) -> bool:
        """One mask row for all queries."""
        return self.mask != "none" and self.mask_shape[2] == 1


def separate(heads: int, kv_heads: int, head_dim: int, v_head_dim: int) -> dict[str, Operand]:
    """The operands of attention over three tensors Q, K, V: keyword arguments of `Workload`."""
    return {
        "q": Operand(0, heads * head_dim),
        "k": Operand(1, kv_heads * head_dim),
        "v": Operand(2, kv_heads * v_head_dim),
    }


def fused(heads: int, kv_heads: int, head_dim: int, v_head_dim: int) -> dict[str, Operand]:
    """The operands of attention over one QKV projection: keyword arguments of `Workload`."""
    q, k, v = heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim
    return {"q": Operand(0, q + k + v), "k": Operand(0, q + k + v, q), "v": Operand(0, q + k + v, q + k)}


@dataclass(frozen=True)
class Config:
    """``vectors`` of queries by ``block`` keys at a time, in tiles of ``key_rows`` keys or ``value_rows`` columns."""

    vectors: int
    block: int
    key_rows: int
    value_rows: int

    @property
    def key_step(self) -> int:
        """Row counts of the last tile of a block of keys: multiples of this."""
        return 4 if self.key_rows % 4 == 0 else 2 if self.key_rows % 2 == 0 else 1


def space(workload: Workload, isa: Isa) -> Iterator[Config]:
    for vectors in range(1, _most_vectors(workload, isa, 4) + 1):
        most = isa.tile_rows(vectors)
        for key_rows in sorted({rows for rows in (most // 4 * 4, most // 2 * 2) if rows}):
            for keys in (64, 128, 192, 256, 384):
                config = Config(vectors, keys // key_rows * key_rows, key_rows, _value_rows(workload.v_head_dim, most))
                if config.block:
                    yield config


def heuristic(workload: Workload, isa: Isa) -> Config:
    vectors = _most_vectors(workload, isa, 2)
    most = isa.tile_rows(vectors)
    key_rows = min(12, most // 4 * 4 or most // 2 * 2)
    return Config(vectors, 256 // key_rows * key_rows, key_rows, _value_rows(workload.v_head_dim, most))


def _most_vectors(workload: Workload, isa: Isa, limit: int) -> int:
    """No more vectors of queries than there are queries."""
    return limit if workload.queries is None else min(limit, -(-workload.queries // isa.lanes))


def _value_rows(v_head_dim: int, most: int) -> int:
    """Split the columns of V into equal tiles, as few as the registers allow."""
    return -(-v_head_dim // -(-v_head_dim // most))


def name(workload: Workload, config: Config, isa: Isa) -> str:
    w = workload
    shape = "x".join("any" if extent is None else str(extent) for extent in (w.batch, w.queries, w.keys))
    parts = [f"attention_{shape}_{w.heads}x{w.head_dim}_{w.kv_heads}x{w.v_head_dim}"]
    parts += [f"{o.buffer}at{o.offset}of{o.width}" for o in (w.q, w.k, w.v) if not w.heads_first]
    parts += ["bhsd"] * w.heads_first + ["causal"] * w.causal
    parts += [f"scale{_token(w.scale)}"] + [f"softcap{_token(w.softcap)}"] * (w.softcap > 0)
    if w.mask != "none":
        parts.append(w.mask + "".join("1" if extent == 1 else "n" for extent in w.mask_shape))
    parts += [isa.token, f"{config.vectors}x{config.block}x{config.key_rows}x{config.value_rows}"]
    return "_".join(parts)


def _token(value: float) -> str:
    return f"{value:.9g}".replace("-", "m").replace("+", "").replace(".", "p")


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (inputs by number, [mask], O), float32; a bool mask has dtype bool."""
    return prim_func(name(workload, config, isa), lambda: _Attention(workload, config, isa).emit())


class _Attention:
    """Emits one attention kernel; the methods follow the loop structure in the module's docstring."""

    def __init__(self, workload: Workload, config: Config, isa: Isa) -> None:
        w = self.w = workload
        self.config = config
        self.lanes = isa.lanes
        self.chains = isa.chains
        self.batch, self.queries = dim(w.batch, "batch"), dim(w.queries, "queries")
        shared = w.q.buffer == w.k.buffer and not w.heads_first
        self.keys = self.queries if shared else dim(w.keys, "keys")
        self.inputs = self._declare()
        self.mask = self._declare_mask() if w.mask != "none" else None
        out = (w.heads, self.queries, w.v_head_dim) if w.heads_first else (self.queries, w.heads * w.v_head_dim)
        self.out = argument("o", (self.batch, *out))
        # Scores are kept in units of log2(e), so that 2**x serves for e**x; a soft cap works on plain scores.
        self.q_factor = w.scale / w.softcap if w.softcap else w.scale * vector.LOG2_E

    def _declare(self) -> list[Buffer]:
        w = self.w
        if w.heads_first:
            q = argument("q", (self.batch, w.heads, self.queries, w.head_dim))
            k = argument("k", (self.batch, w.kv_heads, self.keys, w.head_dim))
            return [q, k, argument("v", (self.batch, w.kv_heads, self.keys, w.v_head_dim))]
        shapes = {w.v.buffer: (self.keys, w.v.width), w.k.buffer: (self.keys, w.k.width)}
        shapes[w.q.buffer] = (self.queries, w.q.width)
        return [argument(f"x{i}", (self.batch, *shapes[i])) for i in sorted(shapes)]

    def _declare_mask(self) -> Buffer:
        full = (self.batch, self.w.heads, self.queries, self.keys)
        shape = [1 if extent == 1 else full[axis] for axis, extent in enumerate(self.w.mask_shape)]
        return argument("mask", shape, "bool" if self.w.mask == "bool" else "float32")

    def _index(self, operand: Operand, head: Expr, width: int, row: Expr, column: int | Expr) -> tuple[Expr, ...]:
        if self.w.heads_first:
            return (self.b, head, i64(row), i64(column))
        return (self.b, i64(row), i64(operand.offset + column) + head * width)

    def q(self, row: Expr, column: int | Expr) -> tuple[Expr, ...]:
        return self._index(self.w.q, self.head, self.w.head_dim, row, column)

    def k(self, row: Expr, column: Expr) -> Expr:
        return self.inputs[1 if self.w.heads_first else self.w.k.buffer][
            self._index(self.w.k, self.kv_head, self.w.head_dim, row, column)
        ]

    def v(self, row: Expr, column: Expr) -> Expr:
        return self.inputs[2 if self.w.heads_first else self.w.v.buffer][
            self._index(self.w.v, self.kv_head, self.w.v_head_dim, row, column)
        ]

    def o(self, row: Expr, column: int | Expr) -> tuple[Expr, ...]:
        return self._index(Operand(0, 0), self.head, self.w.v_head_dim, row, column)

    def emit(self) -> None:
        w, most = self.w, self.config.vectors
        vectors = let(at_least_one(ceil_div(self.queries, self.lanes)))
        blocks = let(ceil_div(vectors, most))
        with parallel(self.batch * w.heads * blocks) as task:
            block = bind(task % blocks)
            self.head = bind(task // blocks % w.heads)
            self.kv_head = bind(self.head // (w.heads // w.kv_heads))
            self.b = bind(task // (blocks * w.heads))
            first = bind(block * vectors // blocks)
            count = bind((block + 1) * vectors // blocks - first)
            self.q0 = bind(first * self.lanes)
            # An even split gives blocks of at least half the size, and a single block of any size.
            switch(count, range(most, 0, -1), self._queries)

    def _queries(self, vectors: int) -> None:
        w, lanes, width = self.w, self.lanes, vectors * self.lanes
        self.vectors = vectors
        self.qt = local((w.head_dim, width))
        self.ot = local((w.v_head_dim, width))
        self.p = local((self.config.block, width))
        self.maximum, self.total, self.rescale = (local((vectors, lanes)) for _ in range(3))
        self._transpose_queries()
        for v in range(vectors):
            store(self.maximum, splat(-math.inf, lanes), v, 0, lanes=lanes)
            store(self.total, splat(0.0, lanes), v, 0, lanes=lanes)
        with serial(w.v_head_dim) as c:
            for v in range(vectors):
                store(self.ot, splat(0.0, lanes), c, v * lanes, lanes=lanes)
        end = bind(tirx.min(self.keys, self.q0 + width) if w.causal else self.keys)
        blocks = bind(ceil_div(end, self.config.block))
        with serial(blocks) as block:
            self.low = bind(block * self.config.block)
            self.count = bind(tirx.min(end - self.low, i64(self.config.block)))
            self._scores()
            for v in range(vectors):
                self._softmax(v)
            self._values()
        self._finish()

    def _query_rows(self, v: int) -> list[Expr]:
        """The query of each lane; lanes past the last repeat it, and are dropped when the result is stored."""
        return [bind(tirx.min(self.q0 + (v * self.lanes + i), self.queries - 1)) for i in range(self.lanes)]

    def _transpose_queries(self) -> None:
        w, lanes = self.w, self.lanes
        x = self.inputs[0 if w.heads_first else w.q.buffer]
        factor = splat(self.q_factor, lanes)
        whole, tail = divmod(w.head_dim, lanes)
        for v in range(self.vectors):
            rows = self._query_rows(v)
            if whole:
                with serial(whole) as chunk:
                    square = [load(x, *self.q(row, chunk * lanes), lanes=lanes) for row in rows]
                    for i, column in enumerate(transpose([keep(line, lanes) for line in square])):
                        store(self.qt, column * factor, chunk * lanes + i, v * lanes, lanes=lanes)
            if tail:
                with serial(tail) as rest:
                    c = bind(whole * lanes + rest)
                    for i, row in enumerate(rows):
                        put(self.qt, x[self.q(row, c)] * tirx.const(self.q_factor, "float32"), c, v * lanes + i)

    def _scores(self) -> None:
        """P = K . QT for the current keys, masked."""
        w, lanes, rows = self.w, self.lanes, self.config.key_rows
        mask = self._stage_mask()

        def tile(first: Expr, count: int, row: Callable[[int], Expr]) -> None:
            def finish(r: int, v: int, acc: Expr) -> None:
                store(self.p, self._masked(acc, first + r, v, mask), first + r, v * lanes, lanes=lanes)

            outer_product(
                count,
                self.vectors,
                w.head_dim,
                lambda r, c: self.k(self.low + row(r), c),
                lambda v, c: load(self.qt, c, v * lanes, lanes=lanes),
                finish,
                lanes=lanes,
                chains=self.chains,
            )

        with serial(self.count // rows) as full:
            tile(full * rows, rows, lambda r: full * rows + r)
        # The last tile comes in a few sizes; its rows beyond the last key repeat that key and are never used.
        step = self.config.key_step
        first = bind(self.count // rows * rows)
        size = bind(ceil_div(self.count - first, step) * step)
        switch(
            size,
            range(step, rows + 1, step),
            lambda count: tile(first, count, lambda r: tirx.min(first + r, self.count - 1)),
        )

    def _stage_mask(self) -> Buffer | None:
        """The mask of the current keys as addends in score units: [keys, queries], or [keys, 1] if the same for all."""
        w, lanes, mask = self.w, self.lanes, self.mask
        if mask is None:
            return None
        wide = w.mask_per_query
        staged = local((self.config.block, self.vectors * lanes if wide else 1))

        def addend(row: Expr, key: Expr) -> Expr:
            full = (self.b, self.head, row, key)
            value = mask[tuple(i64(0) if e == 1 else full[axis] for axis, e in enumerate(w.mask_shape))]
            if w.mask == "bool":
                return tirx.Select(value, tirx.const(0.0, "float32"), tirx.const(-math.inf, "float32"))
            return value * tirx.const(vector.LOG2_E, "float32")

        with serial(self.count) as key:
            if not wide:
                put(staged, addend(i64(0), self.low + key), key, 0)
            for v in range(self.vectors if wide else 0):
                for i, row in enumerate(self._query_rows(v)):
                    put(staged, addend(row, self.low + key), key, v * lanes + i)
        return staged

    def _masked(self, score: Expr, key: Expr, v: int, mask: Buffer | None) -> Expr:
        w, lanes = self.w, self.lanes
        nothing = splat(-math.inf, lanes)
        if w.softcap:
            capped = vector.tanh(keep(score, lanes), lanes)
            score = capped * splat(w.softcap * vector.LOG2_E, lanes)
        if mask is not None:
            wide = w.mask_per_query
            addend = load(mask, key, v * lanes, lanes=lanes) if wide else splat(mask[key, i64(0)], lanes)
            score, addend = keep(score, lanes), keep(addend, lanes)
            # A key hidden by a bool mask may hold anything, NaN included.
            score = tirx.Select(addend == nothing, nothing, score) if w.mask == "bool" else score + addend
        if w.causal:
            query = lanes_at(self.q0 + v * lanes, lanes)
            score = tirx.Select(splat(self.low + key, lanes) <= query, keep(score, lanes), nothing)
        return score

    def _softmax(self, v: int) -> None:
        """Exponentials of the current keys for one vector of queries, with the running maximum and sum."""
        lanes, chains = self.lanes, 4
        column = v * lanes
        part = local((chains, lanes))

        def reduce(start: Expr, step: Callable[[Expr, Expr], Expr], merge: Callable[[Expr, Expr], Expr]) -> Expr:
            for chain in range(chains):
                store(part, start, chain, 0, lanes=lanes)
            with serial(self.count // chains) as k:
                for chain in range(chains):
                    store(part, step(load(part, chain, 0, lanes=lanes), k * chains + chain), chain, 0, lanes=lanes)
            with serial(self.count % chains) as k:
                key = self.count // chains * chains + k
                store(part, step(load(part, 0, 0, lanes=lanes), key), 0, 0, lanes=lanes)
            result = load(part, 0, 0, lanes=lanes)
            for chain in range(1, chains):
                result = keep(merge(result, load(part, chain, 0, lanes=lanes)), lanes)
            return result

        def larger(best: Expr, key: Expr) -> Expr:
            return vector.maximum(best, load(self.p, key, column, lanes=lanes))

        def exponential(total: Expr, key: Expr) -> Expr:
            value = vector.exp2_nonpositive(load(self.p, key, column, lanes=lanes) - origin, lanes)
            value = keep(value, lanes)
            store(self.p, value, key, column, lanes=lanes)
            return total + value

        before = keep(load(self.maximum, v, 0, lanes=lanes), lanes)
        best = reduce(before, larger, vector.maximum)
        nothing = splat(-math.inf, lanes)
        # While every key so far is masked there is no finite maximum to subtract.
        origin = keep(tirx.Select(best == nothing, splat(0.0, lanes), best), lanes)
        factor = keep(vector.exp2_nonpositive(before - origin, lanes), lanes)
        store(self.maximum, best, v, 0, lanes=lanes)
        store(self.rescale, factor, v, 0, lanes=lanes)
        added = reduce(splat(0.0, lanes), exponential, lambda a, b: a + b)
        store(self.total, load(self.total, v, 0, lanes=lanes) * factor + added, v, 0, lanes=lanes)

    def _values(self) -> None:
        """OT = OT * rescale + V^T P over the current keys."""
        w, lanes, rows = self.w, self.lanes, self.config.value_rows
        scales = [keep(load(self.rescale, v, 0, lanes=lanes), lanes) for v in range(self.vectors)]

        def tile(first: Expr, rows: int) -> None:
            outer_product(
                rows,
                self.vectors,
                self.count,
                lambda r, k: self.v(self.low + k, first + r),
                lambda v, k: load(self.p, k, v * lanes, lanes=lanes),
                lambda r, v, acc: store(self.ot, acc, first + r, v * lanes, lanes=lanes),
                lanes=lanes,
                chains=self.chains,
                start=lambda r, v: load(self.ot, first + r, v * lanes, lanes=lanes) * scales[v],
            )

        whole, tail = divmod(w.v_head_dim, rows)
        with serial(whole) as t:
            tile(t * rows, rows)
        if tail:
            tile(i64(whole * rows), tail)

    def _finish(self) -> None:
        """O = (OT / total)^T, for the queries that exist."""
        w, lanes = self.w, self.lanes
        for v in range(self.vectors):
            total = keep(load(self.total, v, 0, lanes=lanes), lanes)
            zero = splat(0.0, lanes)
            inverse = splat(1.0, lanes) / total
            if w.mask == "bool":
                inverse = tirx.Select(total == zero, zero, inverse)
            inverse = keep(inverse, lanes)
            row = self.q0 + v * lanes
            whole, tail = divmod(w.v_head_dim, lanes)
            if whole:
                with serial(whole) as chunk:
                    self._store_square(v, chunk * lanes, row, inverse)
            for c in range(whole * lanes, whole * lanes + tail):
                self._store_column(v, c, row, inverse)

    def _store_square(self, v: int, column: Expr, row: Expr, inverse: Expr) -> None:
        lanes = self.lanes
        square = [load(self.ot, column + i, v * lanes, lanes=lanes) * inverse for i in range(lanes)]
        lines = transpose([keep(line, lanes) for line in square])
        for i, line in enumerate(lines):
            index = self.o(row + i, column)
            when(row + i < self.queries, partial(store, self.out, line, *index, lanes=lanes))

    def _store_column(self, v: int, column: int, row: Expr, inverse: Expr) -> None:
        lanes = self.lanes
        spill = local((lanes,))
        store(spill, load(self.ot, column, v * lanes, lanes=lanes) * inverse, 0, lanes=lanes)
        with serial(tirx.min(i64(lanes), self.queries - row)) as i:
            put(self.out, spill[i], *self.o(row + i, column))
