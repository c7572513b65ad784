"""Recurrences over time whose steps treat every element of the state alone: selective scans, decays, gates.

    h_t = f(h_{t-1}, x_t ...)           element by element over the state [..., K, N]: a_t * h + b_t, and the like
    y_t = g(sum over an axis of ...)    c_t . h_t, or an element of the state itself

    for each row and block of the last axis:        in parallel
        h in registers
        for t = 0 .. T - 1:                         in order
            h = f(h, x_t ...);  y_t = g(...)
What is read at a step is computed with while it is there: no tensor over all times is made but Y.

Source: Gu & Dao (2023), Mamba, section 3.3: the state stays in fast memory; the operator Scan of ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from tvm import tirx

from xopt.kernels import vector
from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    bind,
    dims,
    i64,
    keep,
    load,
    local,
    parallel,
    prim_func,
    product,
    put,
    reduce_lanes,
    serial,
    splat,
    store,
    workspace,
)
from xopt.kernels.fixed import Config as Config
from xopt.kernels.fixed import heuristic as heuristic
from xopt.kernels.fixed import space as space
from xopt.kernels.isa import Isa

VERSION = 1

TIME = -1
"""In the place of an axis: the step."""
UNROLL = 4
"""Vectors of the last axis that one task works on, where the axis is not summed over."""
WIDEST = 256
"""Of a last axis that is summed over: its state is held in registers, or on the stack."""


@dataclass(frozen=True)
class Term:
    """An element of what a step computes.

    Args:
        op: ``"read"`` of an operand, ``"state"`` and ``"new"`` (before and after the step), ``"number"``, ``"sum"``
            over the reduced axis, or one of `FUNCTIONS`.
        args: what it is computed from.
        place: number of the operand or of the state.
        at: for each axis of the operand the axis of the state that indexes it, `TIME`, or None for its only place.
        value: of a number.
    """

    op: str
    args: tuple[Term, ...] = ()
    place: int = 0
    at: tuple[int | None, ...] = ()
    value: float = 0.0


@dataclass(frozen=True)
class Workload:
    """One scan.

    Args:
        operands: shapes of what is read, None for sizes that are not known; a `Term` reads them.
        backwards: for each operand, whether its times are read from the last to the first.
        state: shape of every state; the last size is known.
        new: for each state what it becomes.
        outputs: for each output its term, and the axes of the state that it has (None for an axis of size 1).
        reduced: the axis of the state that sums go over: its last, the one before, or None.
        clock: an operand and its axis of times.
    """

    operands: tuple[tuple[int | None, ...], ...]
    backwards: tuple[bool, ...]
    state: tuple[int | None, ...]
    new: tuple[Term, ...]
    outputs: tuple[tuple[Term, tuple[int | None, ...]], ...]
    reduced: int | None
    clock: tuple[int, int]

    def lanes(self, isa: Isa) -> int:
        """How many neighbours of the last axis are computed together; 1 when it does not divide."""
        lanes, width = isa.lanes, self.state[-1] or 1
        while lanes > 1 and width % lanes:
            lanes //= 2
        return lanes


def name(workload: Workload, config: Config, isa: Isa) -> str:
    return f"scan_{sha256(repr(workload).encode()).hexdigest()[:16]}_{isa.token}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (operands ..., first states ..., outputs [T, ...] ..., last states ...), float32."""
    return prim_func(name(workload, config, isa), lambda: _Scan(workload, isa).emit())


class _Scan:
    """The body of one kernel."""

    def __init__(self, workload: Workload, isa: Isa) -> None:
        self.w, self.lanes = workload, workload.lanes(isa)
        self.rank, self.width = len(workload.state), workload.state[-1] or 1
        self.last_is_summed = workload.reduced == self.rank - 1
        self.deep = workload.reduced is not None and not self.last_is_summed
        vectors = self.width // self.lanes
        together = vectors if self.last_is_summed else next(n for n in (UNROLL, 2, 1) if vectors % n == 0)
        self.offsets = [place * self.lanes for place in range(together)]
        self.block = together * self.lanes

    def emit(self) -> None:
        w = self.w
        self.operands = [argument(f"x{i}", dims(shape, f"x{i}_")) for i, shape in enumerate(w.operands)]
        first = [argument(f"first{k}", dims(w.state, f"first{k}_")) for k in range(len(w.new))]
        self.frame = list(first[0].shape)
        self.steps = self.operands[w.clock[0]].shape[w.clock[1]]
        self.outputs = [
            argument(f"y{i}", [self.steps, *(1 if axis is None else self.frame[axis] for axis in axes)])
            for i, (_, axes) in enumerate(w.outputs)
        ]
        last = [argument(f"last{k}", self.frame) for k in range(len(w.new))]
        outer = self.frame[: self.rank - 1 - self.deep]
        blocks = self.width // self.block
        with parallel(product(outer) * blocks) as task:
            self.base = bind(tirx.floormod(task, i64(blocks)) * self.block)
            self.row = self._unravelled(bind(tirx.floordiv(task, i64(blocks))), outer)
            depth = self.frame[-2] if self.deep else i64(1)
            self.states = [workspace((depth, self.block)) if self.deep else local((1, self.block)) for _ in w.new]
            for k, j, index in self._elements(depth):
                for state, start in zip(self.states, first):
                    store(state, load(start, *index, lanes=self.lanes), k, j, lanes=self.lanes)
            with serial(self.steps) as step:
                self.step = bind(step)
                self._step(depth)
            for k, j, index in self._elements(depth):
                for state, end in zip(self.states, last):
                    store(end, load(state, k, j, lanes=self.lanes), *index, lanes=self.lanes)

    def _unravelled(self, row: Expr, outer: Sequence[Expr]) -> list[Expr]:
        """The place of a row on each axis."""
        places: list[Expr] = []
        for extent in reversed(outer):
            places.insert(0, bind(tirx.floormod(row, tirx.max(extent, i64(1)))))
            row = bind(tirx.floordiv(row, tirx.max(extent, i64(1))))
        return places

    def _elements(self, depth: Expr) -> Iterator[tuple[Expr, int, list[Expr]]]:
        """(place on the axis before the last, offset in the block, index of the first lane) of every vector."""
        with serial(depth) as k:
            for offset in self.offsets:
                yield k, offset, [*self.row, *([k] if self.deep else []), self.base + offset]

    # -- a step ----------------------------------------------------------------------------------------------------
    def _step(self, depth: Expr) -> None:
        sums = list(dict.fromkeys(t for term, _ in self.w.outputs for t in nodes(term) if t.op == "sum"))
        totals = {term: local((self.block if self.deep else self.lanes,)) for term in sums}
        for total in totals.values():
            for offset in self.offsets if self.deep else [0]:
                store(total, splat(0.0, self.lanes), offset, lanes=self.lanes)
        for k, offset, index in self._elements(depth):
            known: dict[Term, Expr] = {}
            old = [keep(load(state, k, offset, lanes=self.lanes), self.lanes) for state in self.states]
            known.update({Term("state", place=place): value for place, value in enumerate(old)})
            new = [self._value(term, index, known) for term in self.w.new]
            known.update({Term("new", place=place): value for place, value in enumerate(new)})
            for state, value in zip(self.states, new):
                store(state, value, k, offset, lanes=self.lanes)
            for term, total in totals.items():
                at = offset if self.deep else 0
                part = self._value(term.args[0], index, known)
                store(total, load(total, at, lanes=self.lanes) + part, at, lanes=self.lanes)
            if not sums:
                self._give(index, known)
        if sums:
            self._give_sums(totals)

    def _give(self, index: list[Expr], known: dict[Term, Expr]) -> None:
        for (term, axes), output in zip(self.w.outputs, self.outputs):
            value = self._value(term, index, known)
            store(output, value, self.step, *self._index(axes, index), lanes=self.lanes)

    def _give_sums(self, totals: dict[Term, Buffer]) -> None:
        """The outputs of a step, of what was summed."""
        for offset in self.offsets if self.deep else [0]:
            index = [*self.row, *([i64(0)] if self.deep else []), self.base + offset]
            known: dict[Term, Expr] = {}
            for term, total in totals.items():
                value = load(total, offset if self.deep else 0, lanes=self.lanes)
                known[term] = value if self.deep else reduce_lanes(value, lambda a, b: a + b, self.lanes)
            for (term, axes), output in zip(self.w.outputs, self.outputs):
                value = self._value(term, index, known)
                if self.deep:
                    store(output, value, self.step, *self._index(axes, index), lanes=self.lanes)
                    continue
                one = local((self.lanes,))
                store(one, value, 0, lanes=self.lanes)
                put(output, one[i64(0)], self.step, *self._index(axes, index))

    def _index(self, axes: Sequence[int | None], index: Sequence[Expr]) -> list[Expr]:
        return [i64(0) if axis is None else index[axis] for axis in axes]

    def _value(self, term: Term, index: list[Expr], known: dict[Term, Expr]) -> Expr:
        """A vector: the term at ``index`` and its neighbours on the last axis."""
        if term not in known:
            if term.op == "number":
                known[term] = splat(term.value, self.lanes)
            elif term.op == "read":
                known[term] = keep(self._read(term, index), self.lanes)
            else:
                args = [self._value(arg, index, known) for arg in term.args]
                known[term] = keep(FUNCTIONS[term.op](self.lanes, *args), self.lanes)
        return known[term]

    def _read(self, term: Term, index: list[Expr]) -> Expr:
        time = self.steps - 1 - self.step if self.w.backwards[term.place] else self.step
        places = [i64(0) if axis is None else time if axis == TIME else index[axis] for axis in term.at]
        operand = self.operands[term.place]
        if term.at and term.at[-1] == self.rank - 1:
            return load(operand, *places, lanes=self.lanes)
        return splat(operand[tuple(places)], self.lanes)


def nodes(term: Term) -> Iterator[Term]:
    """A term and all that it is computed from."""
    yield term
    for arg in term.args:
        yield from nodes(arg)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "Add": lambda lanes, a, b: a + b,
    "Sub": lambda lanes, a, b: a - b,
    "Mul": lambda lanes, a, b: a * b,
    "Div": lambda lanes, a, b: a / b,
    "Neg": lambda lanes, a: splat(0.0, lanes) - a,
    "Exp": lambda lanes, a: vector.exp(a, lanes),
    "Sigmoid": lambda lanes, a: vector.sigmoid(a, lanes),
    "Tanh": lambda lanes, a: vector.tanh(a, lanes),
    "Relu": lambda lanes, a: vector.relu(a, lanes),
    "Sqrt": lambda lanes, a: tirx.sqrt(a),
}
"""Functions of vectors, by ONNX's names."""
