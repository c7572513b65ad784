"""Scans and loops whose steps treat every element of the state alone, as one kernel that goes through time.

    h_t = exp(d_t * A) * h_{t-1} + d_t * B_t * x_t;  y_t = C_t . h_t        (Mamba)
    S_t = decay * S_{t-1} + k_t^T v_t;  y_t = q_t S_t                       (retention, linear attention with decay)
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * x_t                             (gated linear recurrences)
The body may be any such arithmetic: it is read back from its results to the states, to what it scans and to what it
takes from around. A body that does anything else (gates that see the whole state) stays a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import relax

from xopt.ir.edit import attribute, constant, input_at, scalar
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import permutation
from xopt.kernels import scan
from xopt.kernels.scan import FUNCTIONS, TIME, Term, Workload
from xopt.targets.ops.call import Call
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

At = tuple[int | None, ...]
"""For each axis of a value the axis of the state that indexes it, or None for its only place."""
SAME = ("Identity", "Dropout")
MOST_NODES = 200
"""Of a body that is looked at."""
MOST_TERMS = 1000
"""That a step is written out in; a value that is read twice is written twice."""


class _OtherError(Exception):
    """The body is no such recurrence."""


@dataclass(frozen=True)
class Scanned:
    """What a body sees one place of at a step: ``value``, along ``axis``."""

    value: ir.Value
    axis: int
    backwards: bool = False


@dataclass
class _Body:
    """Reads the graph of a body; ``frame`` is the shape of its states."""

    call: Call
    graph: ir.Graph
    states: Sequence[ir.Value]
    scanned: Mapping[ir.Value, Scanned]
    frame: list[Dim]
    results: Sequence[ir.Value]
    operands: dict[tuple[ir.Value, bool], int] = field(default_factory=dict)
    reduced: set[int] = field(default_factory=set)
    equal: list[tuple[Dim, Dim]] = field(default_factory=list)
    _sums: bool = False
    _terms: int = 0
    _shapes: dict[ir.Value, list[Dim]] = field(default_factory=dict)
    _axes_of: dict[ir.Value, At | None] = field(default_factory=dict)

    # -- what is known of a value ----------------------------------------------------------------------------------
    def shape(self, value: ir.Value | None) -> list[Dim]:
        """Its shape, by the operators that are understood."""
        if value is None:
            raise _OtherError
        if value not in self._shapes:
            self._shapes[value] = self._shape(value)
        return self._shapes[value]

    def _shape(self, value: ir.Value) -> list[Dim]:
        if value in self.states:
            return self.frame
        if value in self.scanned:
            whole = self.call.lowering.shape(self.scanned[value].value)
            return [dim for axis, dim in enumerate(whole) if axis != self.scanned[value].axis]
        node = value.producer()
        if node is None or node.graph is not self.graph:
            return list(self.call.lowering.shape(value))
        op = op_of(node)
        if op in FUNCTIONS or op in SAME:
            return self.call.dims.broadcast(*(self.shape(x) for x in node.inputs[: 1 if op in SAME else None]))
        if op == "Transpose":
            source = self.shape(node.inputs[0])
            return [source[axis] for axis in permutation(node, len(source))]
        if op in ("Unsqueeze", "Squeeze"):
            source, axes = self.shape(node.inputs[0]), self._axes(node)
            if op == "Squeeze":
                return [dim for axis, dim in enumerate(source) if axis not in axes]
            rest = iter(source)
            return [1 if axis in axes else next(rest) for axis in range(len(source) + len(axes))]
        if op == "ReduceSum":
            return [d for d in self._kept(node, self.shape(node.inputs[0]), 1) if d is not None]
        if op == "MatMul":
            a, b = (self.shape(x) for x in node.inputs)
            if min(len(a), len(b)) < 2:
                raise _OtherError
            return (
                [*self.call.dims.broadcast(a[:-2], b[:-2]), a[-2], b[-1]] if max(len(a), len(b)) > 2 else [a[0], b[1]]
            )
        if op == "Einsum":
            operands, result = self._letters(node)
            sizes = {x: d for letters, y in zip(operands, node.inputs) for x, d in zip(letters, self.shape(y))}
            return [sizes[letter] for letter in result]
        raise _OtherError

    def axes(self, value: ir.Value | None) -> At | None:
        """The axes of the state that a value has which depends on it; None for one that does not."""
        if value is None:
            raise _OtherError
        if value not in self._axes_of:
            self._axes_of[value] = self._found_axes(value)
        return self._axes_of[value]

    def _found_axes(self, value: ir.Value) -> At | None:
        if value in self.states:
            return tuple(range(len(self.frame)))
        node = value.producer()
        if value in self.scanned or node is None or node.graph is not self.graph:
            return None
        found = [self.axes(x) for x in node.inputs if x is not None]
        if all(one is None for one in found):
            return None
        op = op_of(node)
        if op in FUNCTIONS:
            return self._joined([self._right(one, len(self.shape(value))) for one in found], self.shape(value))
        first = found[0]
        if op == "MatMul":
            a, b = found
            sides = [None if a is None else (*a[:-1], None), None if b is None else (*b[:-2], None, b[-1])]
            return self._joined([self._right(one, len(self.shape(value))) for one in sides], self.shape(value))
        if op == "Einsum":
            operands, result = self._letters(node)
            known = {x: axis for letters, one in zip(operands, found) for x, axis in zip(letters, one or ())}
            return self._joined([tuple(known.get(letter) for letter in result)], self.shape(value))
        if first is None:
            raise _OtherError
        if op in SAME:
            return first
        if op == "Transpose":
            return tuple(first[axis] for axis in permutation(node, len(first)))
        if op == "ReduceSum":
            return tuple(axis for axis in self._kept(node, first, None) if axis != -1)
        if op == "Squeeze":
            gone = self._axes(node)
            return tuple(axis for place, axis in enumerate(first) if place not in gone)
        if op == "Unsqueeze":
            new, rest = self._axes(node), iter(first)
            return tuple(None if place in new else next(rest) for place in range(len(first) + len(new)))
        raise _OtherError

    def _right(self, one: At | None, rank: int) -> At:
        one = one or ()
        return (*[None] * (rank - len(one)), *one)

    def _joined(self, found: Sequence[At], shape: Sequence[Dim]) -> At:
        """The axes of what broadcasts; each of more than one place must be an axis of the state."""
        result: list[int | None] = []
        for column, dim in zip(zip(*found), shape):
            axes = {axis for axis in column if axis is not None}
            if len(axes) > 1 or (not axes and not self.call.dims.equal(dim, 1)):
                raise _OtherError
            result.append(next(iter(axes), None))
        return tuple(result)

    def _axes(self, node: ir.Node) -> set[int]:
        array = constant(input_at(node, 1))
        if array is None:
            raise _OtherError
        rank = len(self.shape(node.inputs[0])) + (array.size if node.op_type == "Unsqueeze" else 0)
        return {int(axis) % rank for axis in array.reshape(-1)}

    def _kept(self, node: ir.Node, items: Sequence[Any], one: Any) -> list[Any]:
        """What a ReduceSum leaves of something per axis: ``one`` in the place of an axis that it keeps at size 1."""
        (axis,) = self._axes(node) if input_at(node, 1) is not None else {-1}
        keeps = bool(attribute(node, "keepdims", 1))
        return [one if place == axis else x for place, x in enumerate(items) if place != axis or keeps]

    def _letters(self, node: ir.Node) -> tuple[list[str], str]:
        equation = str(attribute(node, "equation", "")).replace(" ", "")
        operands, arrow, result = equation.partition("->")
        parts = operands.split(",")
        if not arrow or "." in equation or any(len({*part}) != len(part) for part in parts):
            raise _OtherError
        return parts, result

    # -- terms -----------------------------------------------------------------------------------------------------
    def term(self, value: ir.Value | None, at: At, *, new: bool) -> Term:
        """``value`` at the place that ``at`` says; ``new`` when states that a step has made may be read."""
        self._terms += 1
        if value is None or self._terms > MOST_TERMS:
            raise _OtherError
        identity = tuple(range(len(self.frame)))
        if value in self.states or (new and value in self.results):
            if at != identity:
                raise _OtherError
            kind = "state" if value in self.states else "new"
            return Term(kind, place=(self.states if kind == "state" else self.results).index(value))
        node = value.producer()
        if value in self.scanned:
            one = self.scanned[value]
            return self._read(one.value, (*at[: one.axis], TIME, *at[one.axis :]), one.backwards)
        if node is None or node.graph is not self.graph:
            number = scalar(value)
            return Term("number", value=number) if number is not None else self._read(value, at, False)
        op = op_of(node)
        if op in FUNCTIONS:
            return Term(op, tuple(self.term(x, self._broadcast(x, at), new=new) for x in node.inputs))
        if op in SAME:
            return self.term(node.inputs[0], at, new=new)
        if op == "Transpose":
            order = permutation(node, len(at))
            return self.term(node.inputs[0], tuple(at[order.index(axis)] for axis in range(len(at))), new=new)
        if op == "Unsqueeze":
            gone = self._axes(node)
            return self.term(node.inputs[0], tuple(x for place, x in enumerate(at) if place not in gone), new=new)
        if op == "Squeeze":
            ones, rest, rank = self._axes(node), iter(at), len(self.shape(node.inputs[0]))
            full = tuple(None if place in ones else next(rest) for place in range(rank))
            return self.term(node.inputs[0], full, new=new)
        if op == "ReduceSum":
            return self._sum_of(node, at, new)
        if op == "MatMul":
            return self._product(node, at, new)
        if op == "Einsum":
            operands, result = self._letters(node)
            return self._contracted(node, operands, dict(zip(result, at)), new)
        raise _OtherError

    def _broadcast(self, value: ir.Value | None, at: At) -> At:
        shape = self.shape(value)
        kept = at[len(at) - len(shape) :]
        return tuple(None if self.call.dims.equal(dim, 1) else axis for dim, axis in zip(shape, kept))

    def _read(self, value: ir.Value, at: At, backwards: bool) -> Term:
        """An element of a tensor from around; neighbours of the last axis of the state must be neighbours there."""
        shape, last = self.call.lowering.shape(value), len(self.frame) - 1
        if len(at) != len(shape) or last in at[:-1] or str(self.call.lowering.tensor(value).ty.dtype) != "float32":
            raise _OtherError
        for axis, dim in zip(at, shape):
            if axis != TIME:
                self.equal.append((dim, 1 if axis is None else self.frame[axis]))
        place = self.operands.setdefault((value, backwards), len(self.operands))
        return Term("read", place=place, at=at)

    def _sum_of(self, node: ir.Node, at: At, new: bool) -> Term:
        source = node.inputs[0]
        (gone,) = self._axes(node) if input_at(node, 1) is not None else {-1}
        axes, keeps = self.axes(source), bool(attribute(node, "keepdims", 1))
        if axes is None or axes[gone] is None:
            raise _OtherError
        inner = (*at[:gone], axes[gone], *at[gone + keeps :])
        return self._sum(axes[gone], self.term(source, inner, new=new))

    def _sum(self, axis: int | None, term: Term) -> Term:
        if axis is None or not self._sums:
            raise _OtherError
        self.reduced.add(axis)
        return Term("sum", (term,))

    def _product(self, node: ir.Node, at: At, new: bool) -> Term:
        letters = "abcdefghijklmnop"
        a, b = (len(self.shape(x)) for x in node.inputs)
        rank = max(a, b)
        if min(a, b) < 2 or rank > len(letters):
            raise _OtherError
        outer, row, column, inner = letters[: rank - 2], "x", "y", "z"
        operands = [outer[rank - a :] + row + inner, outer[rank - b :] + inner + column]
        return self._contracted(node, operands, dict(zip(outer + row + column, at)), new)

    def _contracted(self, node: ir.Node, operands: Sequence[str], known: dict[str, int | None], new: bool) -> Term:
        """The sum of products over the letter that ``known``, which has the axes of the result, lacks."""
        shapes = [self.shape(x) for x in node.inputs]
        sizes = {x: d for letters, shape in zip(operands, shapes) for x, d in zip(letters, shape)}
        missing = [x for x in dict.fromkeys("".join(operands)) if x not in known]
        summed = [x for x in missing if not self.call.dims.equal(sizes[x], 1)]
        known = known | dict.fromkeys(missing)
        for letters, value in zip(operands, node.inputs):
            known |= {x: a for x, a in zip(letters, self.axes(value) or ()) if x in summed and a is not None}
        if len(summed) > 1 or len(node.inputs) > 2 or any(known[x] is None for x in summed):
            raise _OtherError
        parts = []
        for letters, value, shape in zip(operands, node.inputs, shapes):
            at = tuple(None if self.call.dims.equal(d, 1) else known[x] for x, d in zip(letters, shape))
            parts.append(self.term(value, at, new=new))
        term = parts[0] if len(parts) == 1 else Term("Mul", tuple(parts))
        return self._sum(known[summed[0]], term) if summed else term

    # -- the whole -------------------------------------------------------------------------------------------------
    def workload(self, stacked: Sequence[ir.Value]) -> Workload:
        """The scan that the body is. Raises _OtherError."""
        identity = tuple(range(len(self.frame)))
        if any(self.axes(value) != identity for value in self.results):
            raise _OtherError
        new = tuple(self.term(value, identity, new=False) for value in self.results)
        self._sums = True
        outputs = []
        for value in stacked:
            axes = self.axes(value)
            if axes is None or len({*axes} - {None}) != sum(axis is not None for axis in axes):
                raise _OtherError
            outputs.append((self.term(value, axes, new=True), axes))
        return self._checked(new, tuple(outputs))

    def _checked(self, new: tuple[Term, ...], outputs: tuple[tuple[Term, At], ...]) -> Workload:
        rank, summing = len(self.frame), [any(t.op == "sum" for t in scan.nodes(term)) for term, _ in outputs]
        reduced = next(iter(self.reduced), None)
        if len(self.reduced) > 1 or (reduced is not None and not all(summing)):
            raise _OtherError
        deep = reduced == rank - 2
        if reduced not in (None, rank - 1) and not deep:
            raise _OtherError
        own = {*range(rank)} - ({reduced} if reduced is not None else set())
        if any({*axes} - {None} != own or (reduced != rank - 1 and axes[-1] != rank - 1) for _, axes in outputs):
            raise _OtherError
        if any(not _outside_is_whole(term, reduced) for term, _ in outputs):
            raise _OtherError
        shapes = [self.call.lowering.shape(value) for value, _ in self.operands]
        sizes = tuple(tuple(dim if isinstance(dim, int) else None for dim in shape) for shape in shapes)
        frame = tuple(dim if isinstance(dim, int) else None for dim in self.frame)
        clock = next(
            (
                (t.place, t.at.index(TIME))
                for one in (*new, *(o for o, _ in outputs))
                for t in scan.nodes(one)
                if TIME in t.at
            ),
            None,
        )
        if clock is None:
            raise _OtherError
        return Workload(sizes, tuple(back for _, back in self.operands), frame, new, outputs, reduced, clock)


def _outside_is_whole(term: Term, reduced: int | None) -> bool:
    """Whether what is not inside of a sum reads nothing of the axis that sums go over, nor the state."""
    if term.op == "sum" or reduced is None:
        return True
    if term.op in ("state", "new") or reduced in term.at:
        return False
    return all(_outside_is_whole(arg, reduced) for arg in term.args)


def emit(
    call: Call,
    graph: ir.Graph,
    states: Mapping[ir.Value, relax.Expr],
    results: Sequence[ir.Value],
    stacked: Sequence[ir.Value],
    scanned: Mapping[ir.Value, Scanned],
) -> list[Value] | None:
    """The last states and the stacked outputs, times first; None when the body is no such recurrence.

    Args:
        call: the Scan or Loop.
        graph: its body.
        states: what each state of the body is at the start.
        results: what each becomes.
        stacked: what is stacked.
        scanned: what the body sees one place of at a step; all of the same length.
    """
    isa = call.lowering.target.isa()
    shapes = [call.lowering.shape_of(first) for first in states.values()]
    if isa is None or not states or not shapes[0] or len(graph) > MOST_NODES:
        return None
    if any(str(x.ty.dtype) != "float32" for x in states.values()):
        return None
    if not all(call.dims.same_shape(shapes[0], shape) for shape in shapes):
        return None
    body = _Body(call, graph, list(states), scanned, shapes[0], results)
    try:
        workload = body.workload(stacked)
    except _OtherError:
        return None
    given = [call.lowering.tensor(value) for value, _ in body.operands]
    width = workload.state[-1]
    if width is None or workload.lanes(isa) < 2:
        return None
    if workload.reduced == len(workload.state) - 1 and width > scan.WIDEST:
        return None
    for mine, its in body.equal:
        call.require(call.dims.same(mine, its), "sizes of what a step reads differ")
    steps = call.lowering.shape_of(given[workload.clock[0]])[workload.clock[1]]
    config = call.lowering.config(scan, workload)
    outputs = [[steps, *(1 if axis is None else shapes[0][axis] for axis in axes)] for _, axes in workload.outputs]
    made = call.lowering.call_for_all(
        scan.name(workload, config, isa), lambda: scan.build(workload, config, isa), [*given, *states.values()],
        [*outputs, *shapes],
    )  # fmt: skip
    return [*made[len(outputs) :], *made[: len(outputs)]]
