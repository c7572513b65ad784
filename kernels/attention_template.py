"""The code of fused attention; what it computes, and the loop structure, are in `xopt.kernels.attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tvm import tirx

from xopt.kernels import precision, vector
from xopt.kernels.attention import Config, Operand, Workload
from xopt.kernels.emit import (
    Buffer,
    Expr,
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
    put,
    serial,
    splat,
    store,
    switch,
    transpose,
    when,
)
from xopt.kernels.isa import Isa
from xopt.kernels.precision import FLOAT32, INT8, Result

SIGNS = -0x7F7F7F80  # 0x80808080: what turns four uint8 into int8, 128 less each
GRIDS = 4
SCORE_SCALE, KEY_ZERO, VALUE_SCALE, VALUE_ZERO = range(GRIDS)
"""Columns of the input that says how integers stand for numbers, one row a head: see `xopt.kernels.attention.grids`."""
LOWEST = -2e38
"""Exporters hide keys by the lowest float32, which has no finite multiple in units of log2(e)."""


class Template:
    """Emits one attention kernel; the methods follow the loop structure in the module's docstring."""

    def __init__(self, workload: Workload, config: Config, isa: Isa) -> None:
        w = self.w = workload
        self.config = config
        self.isa = isa
        self.lanes = isa.lanes
        self.chains = isa.chains
        self.form = precision.BY_NAME[w.operands]
        self.pack = self.form.pack
        self.lane_type = "float32" if self.form is FLOAT32 else "int32"
        self.dot = self.value_dot = precision.dot(self.form, isa)
        if self.form is INT8:  # weights are the unsigned ones of the second product, values the signed
            self.value_dot = replace(self.dot, step=lambda acc, value, weight: self.dot.step(acc, weight, value))
        self.batch, self.queries = dim(w.batch, "batch"), dim(w.queries, "queries")
        shared = w.packed or (w.q.buffer == w.k.buffer and not w.heads_first)
        self.keys = self.queries if shared else dim(w.keys, "keys")
        self.inputs = self._declare()
        self.grids = argument("grids", (w.heads, GRIDS)) if self.form is INT8 else None
        self.mask = self._declare_mask() if w.mask != "none" else None
        self.starts = None
        if w.packed:
            entries = dim(None, "entries")
            self.starts, self.batch = argument("starts", (entries,), "int64"), entries - 2
        out = (w.heads, self.queries, w.v_head_dim) if w.heads_first else (self.queries, w.heads * w.v_head_dim)
        quantization = precision.quantization_argument(w.results)
        self.out = Result(precision.result_arguments("o", w.results, (*self._batched, *out)), quantization, isa)
        # Scores are kept in units of log2(e), so that 2**x serves for e**x; a soft cap works on plain scores.
        self.q_factor = w.scale / w.softcap if w.softcap else w.scale * vector.LOG2_E

    @property
    def _batched(self) -> tuple[Expr, ...]:
        """The leading dimension of the operands; packed sequences have none."""
        return () if self.w.packed else (self.batch,)

    def _declare(self) -> list[Buffer]:
        w, dtype = self.w, self.form.activation
        if w.heads_first:
            q = argument("q", (self.batch, w.heads, self.queries, w.head_dim), dtype)
            k = argument("k", (self.batch, w.kv_heads, self.keys, w.head_dim), dtype)
            return [q, k, argument("v", (self.batch, w.kv_heads, self.keys, w.v_head_dim), dtype)]
        shapes = {w.v.buffer: (self.keys, w.v.width), w.k.buffer: (self.keys, w.k.width)}
        shapes[w.q.buffer] = (self.queries, w.q.width)
        return [argument(f"x{i}", (*self._batched, *shapes[i]), dtype) for i in sorted(shapes)]

    def _declare_mask(self) -> Buffer:
        full = (self.batch, self.w.heads, self.queries, self.keys)
        shape = [1 if extent == 1 else full[axis] for axis, extent in enumerate(self.w.mask_shape)]
        return argument("mask", shape, "bool" if self.w.mask == "bool" else "float32")

    def _index(self, operand: Operand, head: Expr, width: int, row: Expr, column: int | Expr) -> tuple[Expr, ...]:
        if self.w.heads_first:
            return (self.b, head, i64(row), i64(column))
        last = i64(operand.offset + column) + head * width
        return (self.start + row, last) if self.w.packed else (self.b, i64(row), last)

    def q(self, row: Expr, column: int | Expr) -> tuple[Expr, ...]:
        return self._index(self.w.q, self.head, self.w.head_dim, row, column)

    def k(self, row: Expr, lane: Expr) -> Expr:
        index = self._index(self.w.k, self.kv_head, self.w.head_dim, row, lane * self.form.pack)
        return precision.scalar_lane(self.inputs[1 if self.w.heads_first else self.w.k.buffer], self.form, *index)

    def v(self, row: Expr, column: int | Expr) -> tuple[Buffer, tuple[Expr, ...]]:
        index = self._index(self.w.v, self.kv_head, self.w.v_head_dim, row, column)
        return self.inputs[2 if self.w.heads_first else self.w.v.buffer], index

    def o(self, row: Expr, column: int | Expr) -> tuple[Expr, ...]:
        return self._index(Operand(0, 0), self.head, self.w.v_head_dim, row, column)

    def emit(self) -> None:
        if self.starts is not None:
            self._emit_packed(self.starts)
            return
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

    def _emit_packed(self, starts: Buffer) -> None:
        """Tasks for the longest sequence, of which shorter ones take as many as they need.

        Sequences are the fastest index, so that an even split over threads gives each a share of every one.
        """
        w, most = self.w, self.config.vectors
        longest = let(starts[self.batch + 1])
        blocks = let(at_least_one(ceil_div(ceil_div(longest, self.lanes), most)))
        with parallel(self.batch * w.heads * blocks) as task:
            self.b = bind(task % self.batch)
            block = bind(task // self.batch % blocks)
            self.head = bind(task // (self.batch * blocks))
            self.kv_head = bind(self.head // (w.heads // w.kv_heads))
            self.start = bind(starts[self.b])
            self.queries = self.keys = bind(starts[self.b + 1] - self.start)
            vectors = bind(ceil_div(self.queries, self.lanes))
            own = bind(at_least_one(ceil_div(vectors, most)))
            first = bind(block * vectors // own)
            count = bind(tirx.Select(block < own, (block + 1) * vectors // own - first, i64(0)))
            self.q0 = bind(first * self.lanes)
            switch(count, range(most, 0, -1), self._queries)

    def _queries(self, vectors: int) -> None:
        w, lanes, width = self.w, self.lanes, vectors * self.lanes
        self.vectors = vectors
        self.qt = local((w.head_dim // self.form.pack, width), self.lane_type)
        self.ot = local((w.v_head_dim, width))
        self.p = local((-(-self.config.block // self.pack) * self.pack, width))
        self.maximum, self.total, self.rescale = (local((vectors, lanes)) for _ in range(3))
        self._transpose_queries()
        if self.form is INT8:
            self._start_scores()
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
            self.groups = bind(ceil_div(self.count, self.pack))
            self._scores()
            if self.pack > 1:
                self._complete_group()
                self._interleave_values()
            for v in range(vectors):
                self._softmax(v)
            self._values()
        self._finish()

    def _query_rows(self, v: int) -> list[Expr]:
        """The query of each lane; lanes past the last repeat it, and are dropped when the result is stored."""
        return [bind(tirx.min(self.q0 + (v * self.lanes + i), self.queries - 1)) for i in range(self.lanes)]

    def _transpose_queries(self) -> None:
        w, lanes, pack = self.w, self.lanes, self.form.pack
        x = self.inputs[0 if w.heads_first else w.q.buffer]
        whole, tail = divmod(w.head_dim // pack, lanes)
        for v in range(self.vectors):
            rows = self._query_rows(v)
            if whole:
                with serial(whole) as chunk:
                    first = chunk * (lanes * pack)
                    square = [precision.vector_lanes(x, self.form, *self.q(row, first), lanes=lanes) for row in rows]
                    square = transpose([keep(line, lanes, self.lane_type) for line in square], self.lane_type)
                    for i, column in enumerate(square):
                        store(self.qt, self._scaled(column), chunk * lanes + i, v * lanes, lanes=lanes)
            if tail:
                with serial(tail) as rest:
                    c = bind(whole * lanes + rest)
                    for i, row in enumerate(rows):
                        value = precision.scalar_lane(x, self.form, *self.q(row, c * pack))
                        put(self.qt, self._scaled(value, lanes=1), c, v * lanes + i)

    def _scaled(self, query: Expr, lanes: int | None = None) -> Expr:
        """A query times the factor of the scores, unless the product would have to be rounded; bytes become signed."""
        if self.form is not FLOAT32:
            return self._signed(query, lanes or self.lanes)
        return query * (tirx.const(self.q_factor, "float32") if lanes == 1 else splat(self.q_factor, self.lanes))

    def _signed(self, lane: Expr, lanes: int) -> Expr:
        """Lanes of uint8 as lanes of int8, 128 less each; others as they are."""
        if self.form is not INT8:
            return lane
        return lane ^ (tirx.const(SIGNS, "int32") if lanes == 1 else splat(SIGNS, lanes, "int32"))

    def _start_scores(self) -> None:
        """Where integer scores start: they are too large by the keys' zero point times the sum of the query."""
        lanes = self.lanes
        self.start_score = local((self.vectors, lanes), "int32")
        zero, ones = splat(0, lanes, "int32"), splat(0x01010101, lanes, "int32")
        excess = splat(self._grid(KEY_ZERO).astype("int32"), lanes)
        for v in range(self.vectors):
            sum_of_query = partial(load, self.start_score, v, 0, lanes=lanes)
            store(self.start_score, zero, v, 0, lanes=lanes)
            with serial(self.w.head_dim // self.pack) as c:
                total = self.dot.step(sum_of_query(), ones, load(self.qt, c, v * lanes, lanes=lanes))
                store(self.start_score, total, v, 0, lanes=lanes)
            store(self.start_score, zero - excess * sum_of_query(), v, 0, lanes=lanes)

    def _grid(self, which: int) -> Expr:
        """A number of the current head."""
        assert self.grids is not None
        return self.grids[self.head, i64(which)]

    def _score(self, acc: Expr) -> Expr:
        """A sum of products as a score in units of log2(e), or of the soft cap."""
        lanes = self.lanes
        if self.form is INT8:
            return acc.astype(f"float32x{lanes}") * splat(
                self._grid(SCORE_SCALE) * tirx.const(self.q_factor, "float32"), lanes
            )
        return acc if self.form is FLOAT32 else acc * splat(self.q_factor, lanes)

    def _scores(self) -> None:
        """P = K . QT for the current keys, masked."""
        w, lanes, rows = self.w, self.lanes, self.config.key_rows
        mask = self._stage_mask()

        def tile(first: Expr, count: int, row: Callable[[int], Expr]) -> None:
            def finish(r: int, v: int, acc: Expr) -> None:
                score = self._masked(self._score(acc), first + r, v, mask)
                store(self.p, score, first + r, v * lanes, lanes=lanes)

            outer_product(
                count,
                self.vectors,
                w.head_dim // self.form.pack,
                lambda r, c: self.k(self.low + row(r), c),
                lambda v, c: load(self.qt, c, v * lanes, lanes=lanes),
                finish,
                lanes=lanes,
                chains=self.chains,
                start=None if self.form is not INT8 else lambda r, v: load(self.start_score, v, 0, lanes=lanes),
                dot=self.dot,
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
            finite = tirx.max(value, tirx.const(LOWEST, "float32")) * tirx.const(vector.LOG2_E, "float32")
            return tirx.Select(value == tirx.const(-math.inf, "float32"), value, finite)

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

        def reduce(
            count: Expr, start: Expr, step: Callable[[Expr, Expr], Expr], merge: Callable[[Expr, Expr], Expr]
        ) -> Expr:
            for chain in range(chains):
                store(part, start, chain, 0, lanes=lanes)
            with serial(count // chains) as k:
                for chain in range(chains):
                    store(part, step(load(part, chain, 0, lanes=lanes), k * chains + chain), chain, 0, lanes=lanes)
            with serial(count % chains) as k:
                key = count // chains * chains + k
                store(part, step(load(part, 0, 0, lanes=lanes), key), 0, 0, lanes=lanes)
            result = load(part, 0, 0, lanes=lanes)
            for chain in range(1, chains):
                result = keep(merge(result, load(part, chain, 0, lanes=lanes)), lanes)
            return result

        def larger(best: Expr, key: Expr) -> Expr:
            return vector.maximum(best, load(self.p, key, column, lanes=lanes))

        def weight(key: Expr) -> Expr:
            return keep(vector.exp2_nonpositive(load(self.p, key, column, lanes=lanes) - origin, lanes), lanes)

        def exponential(total: Expr, key: Expr) -> Expr:
            value = weight(key)
            store(self.p, value, key, column, lanes=lanes)
            return total + value

        def exponentials_of_a_group(total: Expr, group: Expr) -> Expr:
            """Group number n takes row n: rows are read before they are overwritten."""
            weights = [weight(group * self.pack + i) for i in range(self.pack)]
            if self.form is INT8:
                weights = [keep(tirx.nearbyint(one * splat(255.0, lanes)), lanes) for one in weights]
                rounded = [one.astype(f"int32x{lanes}") for one in weights]
            else:
                rounded = [precision.bfloat16(one, self.isa) for one in weights]
            whole = precision.side_by_side(rounded, self.pack, lanes)
            store(self.p, tirx.reinterpret(f"float32x{lanes}", whole), group, column, lanes=lanes)
            return total + sum(weights[1:], weights[0])

        before = keep(load(self.maximum, v, 0, lanes=lanes), lanes)
        best = reduce(self.count, before, larger, vector.maximum)
        nothing = splat(-math.inf, lanes)
        # While every key so far is masked there is no finite maximum to subtract.
        origin = keep(tirx.Select(best == nothing, splat(0.0, lanes), best), lanes)
        factor = keep(vector.exp2_nonpositive(before - origin, lanes), lanes)
        store(self.maximum, best, v, 0, lanes=lanes)
        store(self.rescale, factor, v, 0, lanes=lanes)
        count, step = (self.count, exponential) if self.pack == 1 else (self.groups, exponentials_of_a_group)
        added = reduce(count, splat(0.0, lanes), step, lambda a, b: a + b)
        store(self.total, load(self.total, v, 0, lanes=lanes) * factor + added, v, 0, lanes=lanes)

    def _complete_group(self) -> None:
        """Behind the last key, hidden ones until all groups are whole."""
        with serial(self.groups * self.pack - self.count) as extra:
            for v in range(self.vectors):
                store(self.p, splat(-math.inf, self.lanes), self.count + extra, v * self.lanes, lanes=self.lanes)

    def _interleave_values(self) -> None:
        """VT [groups of keys, dv]: the values of a column side by side; zero beside the last of an incomplete group."""
        lanes, width = self.lanes, self.w.v_head_dim
        self.vt = local((-(-self.config.block // self.pack), width), "int32")

        def interleave(group: Expr, keys: int) -> None:
            rows = [self.low + group * self.pack + i for i in range(keys)]
            for column in range(0, width - width % lanes, lanes):
                vectors = [self._row_of_v(row, column) for row in rows]
                whole = precision.side_by_side(vectors, self.pack, lanes)
                store(self.vt, self._signed(whole, lanes), group, column, lanes=lanes)
            for column in range(width - width % lanes, width):
                values = [buffer[index] for buffer, index in (self.v(row, column) for row in rows)]
                put(self.vt, self._signed(precision.side_by_side(values, self.pack, 1), 1), group, column)

        with serial(self.count // self.pack) as group:
            interleave(group, self.pack)
        switch(self.count % self.pack, range(1, self.pack), lambda keys: interleave(self.count // self.pack, keys))

    def _row_of_v(self, row: Expr, column: int) -> Expr:
        buffer, index = self.v(row, column)
        return load(buffer, *index, lanes=self.lanes)

    def _values(self) -> None:
        """OT = OT * rescale + V^T P over the current keys."""
        w, lanes, rows = self.w, self.lanes, self.config.value_rows
        scales = [keep(load(self.rescale, v, 0, lanes=lanes), lanes) for v in range(self.vectors)]

        def value(column: Expr, k: Expr) -> Expr:
            if self.pack > 1:
                return self.vt[k, column]
            buffer, index = self.v(self.low + k, column)
            return buffer[index]

        def before(row: Expr, v: int) -> Expr:
            return load(self.ot, row, v * lanes, lanes=lanes) * scales[v]

        def finish(row: Expr, v: int, acc: Expr) -> None:
            total = before(row, v) + acc.astype(f"float32x{lanes}") if self.form is INT8 else acc
            store(self.ot, total, row, v * lanes, lanes=lanes)

        def tile(first: Expr, rows: int) -> None:
            outer_product(
                rows,
                self.vectors,
                self.groups,
                lambda r, k: value(first + r, k),
                lambda v, k: tirx.reinterpret(f"{self.lane_type}x{lanes}", load(self.p, k, v * lanes, lanes=lanes)),
                lambda r, v, acc: finish(first + r, v, acc),
                lanes=lanes,
                chains=self.chains,
                # Integers start at zero: what was summed before must be rescaled.
                start=None if self.form is INT8 else lambda r, v: before(first + r, v),
                dot=self.value_dot,
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
            if w.mask != "none":  # a row that sees no key
                inverse = tirx.Select(total == zero, zero, inverse)
            inverse = keep(inverse, lanes)
            row = self.q0 + v * lanes
            whole, tail = divmod(w.v_head_dim, lanes)
            if whole:
                with serial(whole) as chunk:
                    self._store_square(v, chunk * lanes, row, inverse)
            for c in range(whole * lanes, whole * lanes + tail):
                self._store_column(v, c, row, inverse)

    def _mean(self, column: Expr, v: int, inverse: Expr) -> Expr:
        """A column of O: a mean of values; of integers, less their zero point, at their scale."""
        lanes = self.lanes
        mean = load(self.ot, column, v * lanes, lanes=lanes) * inverse
        if self.form is not INT8:
            return mean
        zero = splat(self._grid(VALUE_ZERO), lanes)
        mean = (keep(mean, lanes) - zero) * splat(self._grid(VALUE_SCALE), lanes)
        return mean if self.w.mask == "none" else tirx.Select(inverse == splat(0.0, lanes), inverse, keep(mean, lanes))

    def _store_square(self, v: int, column: Expr, row: Expr, inverse: Expr) -> None:
        lanes = self.lanes
        square = [self._mean(column + i, v, inverse) for i in range(lanes)]
        lines = transpose([keep(line, lanes) for line in square])
        for i, line in enumerate(lines):
            index = self.o(row + i, column)
            when(row + i < self.queries, partial(self.out.store, line, *index))

    def _store_column(self, v: int, column: int, row: Expr, inverse: Expr) -> None:
        lanes = self.lanes
        value = self._mean(i64(column), v, inverse)
        self.out.scatter(value, tirx.min(i64(lanes), self.queries - row), lambda i: self.o(row + i, column))
