"""Building blocks of the templates: a finished loop nest is emitted statement by statement through TVM's IR builder.

Python loops unroll, builder loops stay loops; accumulators are local arrays with constant indices, which LLVM keeps in
registers.  All index arithmetic is int64, as the symbolic dimensions are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import tvm
from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from xopt.kernels import COMPILE_OPTIONS

TASKS = 128
"""Of a parallel loop: what the pool hands out to threads (`targets/pool.cc`), 8 to each of up to 16; an empty one costs
a nanosecond. (TVM cuts a loop into pieces of one size: 50 iterations in 32 tasks are 25 of two, and 7 without any.)"""

ALONE = 1 << 13
"""Numbers of a loop over rows that one thread is done with in two or three microseconds."""

# TVM ships no types: an expression, a buffer or a function is Any to mypy, and named for the reader.
Expr: TypeAlias = Any
Buffer: TypeAlias = Any
PrimFunc: TypeAlias = Any


def prim_func(name: str, body: Callable[[], None]) -> PrimFunc:
    """Run ``body`` (which declares arguments and emits statements) and wrap the result as relax wants it.

    Relax's analyses need a root block; the loop nest inside it is final and never scheduled.
    """
    _llvm_texts.clear()
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        body()
    func = builder.get()
    nest = func.body
    for text in _llvm_texts.values():
        nest = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", text, nest)
    root = s_tir.SBlock([], [], [], "root", nest)
    return func.with_body(s_tir.SBlockRealize([], True, root))


def compiled(function: PrimFunc, target: Any) -> Any:
    """A kernel by itself, callable with tensors."""
    with target, tvm.transform.PassContext(**COMPILE_OPTIONS):
        return tvm.compile(function, target)[function.attrs["global_symbol"]]


_llvm_texts: dict[str, str] = {}
"""LLVM functions that the kernel being emitted calls."""


def llvm_function(name: str, text: str, dtype: str, *arguments: Expr) -> Expr:
    """Call a function given as LLVM assembly, which is inlined: for what TVM's own types cannot say."""
    _llvm_texts[name] = text
    return tirx.call_pure_extern(dtype, name, *arguments)


def i64(value: int | Expr) -> Expr:
    """An int64 index from a Python int or an expression of any integer type."""
    return tirx.const(value, "int64") if isinstance(value, int) else value.astype("int64")


def dim(value: int | None, name: str) -> Expr:
    """A static dimension, or a fresh symbol when ``value`` is None."""
    return tirx.Var(name, "int64") if value is None else i64(value)


def dims(values: Sequence[int | None], prefix: str) -> list[Expr]:
    return [dim(value, f"{prefix}{axis}") for axis, value in enumerate(values)]


def argument(name: str, shape: Sequence[int | Expr], dtype: str = "float32") -> Buffer:
    """Declare the next tensor argument."""
    handle = T.arg(name, T.handle())
    return T.match_buffer(handle, tuple(i64(extent) for extent in shape), dtype, layout=None)


def flat(buffer: Buffer, shape: Sequence[int | Expr]) -> Buffer:
    """The same memory under another (dense) shape."""
    return T.decl_buffer(tuple(i64(e) for e in shape), buffer.dtype, data=buffer.data, layout=None)


def local(shape: Sequence[int], dtype: str = "float32") -> Buffer:
    """A small array on the stack (see `xopt.kernels.COMPILE_OPTIONS`); in registers when every index is constant."""
    on_stack = {"disable_lower_builtin": True}
    return T.alloc_buffer(tuple(shape), dtype, scope="local", layout=None, annotations=on_stack)


def workspace(shape: Sequence[int | Expr], dtype: str = "float32") -> Buffer:
    """A heap array whose size may be symbolic."""
    return T.alloc_buffer(tuple(i64(e) for e in shape), dtype, layout=None)


def serial(extent: int | Expr) -> Any:
    return T.serial(i64(0), i64(extent))


@contextmanager
def parallel(extent: int | Expr) -> Iterator[Expr]:
    """A loop whose iterations threads share: `TASKS` tasks of nearly the same length.

    for i in range(extent)  ->  for task in parallel(TASKS):
                                    for i in range(task * extent // TASKS, (task + 1) * extent // TASKS)
    """
    with T.parallel(i64(0), i64(TASKS)) as task:
        first, end = (let(tirx.floordiv(index * i64(extent), i64(TASKS))) for index in (task, task + 1))
        with serial(end - first) as index:
            yield bind(first + index)


def each_row(m: Expr, rows: Sequence[int | None], width: int) -> Any:
    """A loop over all ``m`` rows, the product of ``rows``, that threads share unless it is over before others begin."""
    few = None not in rows and prod(extent for extent in rows if extent is not None) * width <= ALONE
    return serial(m) if few else parallel(m)


def let(value: Expr) -> Expr:
    """Name a value, so that it is computed once; TVM's simplifier still sees through the name."""
    return T.bind(value)


def bind(value: Expr) -> Expr:
    """Hold an index in a register of its own, where TVM's simplifier does not follow it.

    Substituted into every address of an unrolled tile, a few nested divisions take the simplifier minutes.
    """
    register = local((1,), "int64")
    put(register, value, 0)
    return register[i64(0)]


def keep(value: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """Hold a vector in a register of its own.

    Unlike `bind` it stops TVM's simplifier, which would substitute a long expression into each of its uses.
    """
    register = local((lanes,), dtype)
    store(register, value, 0, lanes=lanes)
    return load(register, 0, lanes=lanes)


def when(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    with T.If(condition):
        with T.Then():
            then()
        if otherwise is not None:
            with T.Else():
                otherwise()


def switch(value: Expr, cases: Iterable[int], emit: Callable[[int], None]) -> None:
    """Emit one specialized copy per case, chosen at run time; a constant value takes its copy alone."""
    if isinstance(value, tirx.IntImm):
        emit(int(value.value))
        return
    for case in cases:
        when(value == i64(case), lambda case=case: emit(case))  # type: ignore[misc]


def product(values: Iterable[Expr]) -> Expr:
    total: Expr = i64(1)
    for value in values:
        total = total * value
    return total


def ceil_div(a: Expr, b: int | Expr) -> Expr:
    return (a + (b - 1)) // b


def at_least_one(value: Expr) -> Expr:
    """Zero rows are legal; a division by zero blocks is not."""
    return tirx.max(value, i64(1))


def lanes_at(base: int | Expr, lanes: int) -> Expr:
    """The index of ``lanes`` neighbours from ``base`` on."""
    return tirx.Ramp(i64(base), i64(1), lanes)


def splat(value: float | Expr, lanes: int, dtype: str = "float32") -> Expr:
    """A vector with the same value in every lane."""
    scalar = tirx.const(value, dtype) if isinstance(value, float | int) else value
    return tirx.Broadcast(scalar, lanes)


def load(buffer: Buffer, *index: int | Expr, lanes: int) -> Expr:
    """``lanes`` neighbours along the last axis."""
    *outer, last = index
    return buffer[(*(i64(i) for i in outer), lanes_at(last, lanes))]


def store(buffer: Buffer, value: Expr, *index: int | Expr, lanes: int) -> None:
    *outer, last = index
    T.buffer_store(buffer, value, [*(i64(i) for i in outer), lanes_at(last, lanes)])


def put(buffer: Buffer, value: Expr, *index: int | Expr) -> None:
    """Store one element."""
    T.buffer_store(buffer, value, [i64(i) for i in index])


def partial_load(buffer: Buffer, *index: int | Expr, count: int | Expr, lanes: int, fill: Expr | None = None) -> Expr:
    """The first ``count`` neighbours, then ``fill`` (zeros), without reading past them."""
    *outer, last = index
    spill = local((lanes,), buffer.dtype)
    store(spill, splat(0, lanes, buffer.dtype) if fill is None else fill, 0, lanes=lanes)
    with serial(count) as lane:
        put(spill, buffer[(*(i64(i) for i in outer), i64(last) + lane)], lane)
    return load(spill, 0, lanes=lanes)


def partial_store(buffer: Buffer, value: Expr, *index: int | Expr, count: int | Expr, lanes: int) -> None:
    """Store the first ``count`` lanes."""
    *outer, last = index
    spill = local((lanes,), buffer.dtype)
    store(spill, value, 0, lanes=lanes)
    with serial(count) as lane:
        put(buffer, spill[lane], *outer, i64(last) + lane)


def prefetch(buffer: Buffer, *index: int | Expr) -> None:
    """Ask for the line of an element, which need not exist, to be brought into the second-level cache."""
    address = tirx.address_of(buffer[tuple(i64(i) for i in index)])
    read, level, data = (tirx.const(flag, "int32") for flag in (0, 2, 1))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, read, level, data))


def shuffle(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    """Pick lanes, by number, out of the concatenation of ``vectors``."""
    return tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in indices])


def reduce_lanes(vector: Expr, combine: Callable[[Expr, Expr], Expr], lanes: int) -> Expr:
    """Combine all lanes pairwise, in log2(lanes) steps, into a vector that holds the result in every lane."""
    step = lanes // 2
    while step:
        vector = keep(vector, lanes)
        vector = combine(vector, shuffle([vector], [lane ^ step for lane in range(lanes)]))
        step //= 2
    return keep(vector, lanes)


def transpose(vectors: Sequence[Expr], dtype: str = "float32") -> list[Expr]:
    """Transpose a square of as many vectors as they have lanes, by log2(lanes) rounds of shuffles."""
    lanes = len(vectors)
    square = list(vectors)
    step = 1
    while step < lanes:
        upper = [i for i in range(lanes) if not i & step]
        for i in upper:
            a, b = square[i], square[i + step]
            low = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
            high = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
            square[i], square[i + step] = (keep(shuffle([a, b], order), lanes, dtype) for order in (low, high))
        step *= 2
    return square


@dataclass(frozen=True)
class Dot:
    """One step of a sum of products: ``step(acc, factor, operand)`` on vectors; ``dtype`` is that of the sums."""

    dtype: str
    step: Callable[[Expr, Expr, Expr], Expr]


FLOAT32_FMA = Dot("float32", lambda acc, factor, operand: acc + factor * operand)


def outer_product(
    rows: int,
    vectors: int,
    depth: int | Expr,
    row_value: Callable[[int, Expr], Expr],
    vector_value: Callable[[int, Expr], Expr],
    finish: Callable[[int, int, Expr], None],
    *,
    lanes: int,
    chains: int,
    start: Callable[[int, int], Expr] | None = None,
    ahead: Callable[[Expr], None] | None = None,
    dot: Dot = FLOAT32_FMA,
) -> None:
    """The register tile: ``acc[r, v] = start(r, v) + sum_k row_value(r, k) * vector_value(v, k)``.

    Each sum then goes through ``finish(r, v, acc)``.  ``row_value`` is a scalar that is broadcast, ``vector_value`` a
    vector; ``dot`` says what multiplying and adding them means.  A tile with too few accumulators to hide the latency
    sums several k at once in separate chains.  ``ahead(k)``, if given, is emitted once for each step: a place for
    prefetches.
    """
    split = 1
    while 2 * split * rows * vectors <= 2 * chains and split < 8:
        split *= 2
    acc = local((split, rows, vectors, lanes), dot.dtype)
    zero = splat(0, lanes, dot.dtype)
    for s in range(split):
        for r in range(rows):
            for v in range(vectors):
                first = start(r, v) if start is not None and s == 0 else zero
                store(acc, first, s, r, v, 0, lanes=lanes)

    def step(s: int, k: Expr) -> None:
        if ahead is not None:
            ahead(k)
        operands = [let(vector_value(v, k)) for v in range(vectors)]
        for r in range(rows):
            factor = let(splat(row_value(r, k), lanes))
            for v in range(vectors):
                store(acc, dot.step(load(acc, s, r, v, 0, lanes=lanes), factor, operands[v]), s, r, v, 0, lanes=lanes)

    trips = depth // split
    with serial(trips) as k:
        for s in range(split):
            step(s, k * split + s)
    if split > 1 and not (isinstance(depth, int) and depth % split == 0):
        with serial(depth - trips * split) as k:
            step(0, i64(trips) * split + k)
    for r in range(rows):
        for v in range(vectors):
            total = load(acc, 0, r, v, 0, lanes=lanes)
            for s in range(1, split):
                total = total + load(acc, s, r, v, 0, lanes=lanes)
            finish(r, v, total)
