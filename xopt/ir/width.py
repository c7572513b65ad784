"""The width of the residual stream: every axis of every weight that has to shrink with it.

From one value of the stream the axis is followed through all producers and consumers until it ends in weights:

    embeddings [V, *D*] ─▶ + ─▶ norm [*D*] ─▶ MatMul [*D*, N] … MatMul [N, *D*] ─▶ + ─▶ …
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from xopt.ir import edit, walk
from xopt.ir.schema import op_of
from xopt.ir.structure import ACTIVATIONS
from xopt.ir.symbolic import Symbols

#: Elementwise ops: every operand that has the axis, has it at the same place from the right.
ELEMENTWISE = ACTIVATIONS + tuple(
    "Add Sub Mul Div Pow Sqrt Erf Neg Abs Exp Clip Min Max Cast Identity Dropout Where".split()  # noqa: SIM905
)
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")

Sizes = tuple[int | None, ...]
Place = tuple[ir.Value, int]
Slot = tuple[ir.Value, int, ir.Node | None]
"""An axis of a weight; for a vector also its reader, as vectors that happen to be shared need not shrink together."""


class BlockedError(Exception):
    """The axis runs into something that cannot shrink; the message is the reason."""


@dataclass(frozen=True)
class Retarget:
    """A constant operand of a Reshape or Expand that holds the width at ``position``."""

    node: ir.Node
    operand: int
    position: int

    def apply(self, graph: ir.Graph, width: int) -> None:
        """Give the node its own constant with the new width."""
        old = self.node.inputs[self.operand]
        sizes = walk.ints(old)
        assert old is not None and sizes is not None
        sizes[self.position] = width
        new = edit.initializer(graph, f"{old.name}", ir.tensor(sizes, dtype=ir.DataType.INT64))
        self.node.replace_input_with(self.operand, new)


@dataclass
class Width:
    """What shrinks with the stream: (initializer, axis) places, and constants that hold the width."""

    size: int
    weights: dict[Slot, None] = field(default_factory=dict)
    retargets: dict[Retarget, None] = field(default_factory=dict)


def stream_width(stream: ir.Value) -> Width:
    """Follow the last axis of a value of the residual stream.

    Raises:
        BlockedError: with the reason, such as "width-is-an-output" or "width-through-Split".
    """
    shape = walk.shape_of(stream)
    if not shape or shape[-1] is None:
        raise BlockedError("width-unknown")
    found = Width(shape[-1])
    seen: set[Place] = set()
    pending = [(stream, len(shape) - 1)]
    while pending:
        value, axis = pending.pop()
        if (value, axis) in seen:
            continue
        seen.add((value, axis))
        extents = walk.shape_of(value)
        if extents is None or axis >= len(extents) or extents[axis] != found.size:
            raise BlockedError("width-unknown")
        if value.is_graph_output() or value.is_graph_input():
            raise BlockedError("width-is-an-output" if value.is_graph_output() else "width-is-an-input")
        if walk.is_weight(value):
            found.weights[value, axis, None] = None
        for node in [value.producer(), *edit.consumers(value)]:
            for other, place in _neighbours(node, value, axis, found) if node is not None else ():
                if walk.is_weight(other, rank=1):
                    found.weights[other, place, node] = None
                else:
                    pending.append((other, place))
    return found


def _neighbours(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    """The other operands and results of a node whose axis is tied to this one."""
    if edit.is_op(node, *ELEMENTWISE):
        yield from _elementwise(node, value, axis, found)
        return
    rule = RULES.get(op_of(node))
    if rule is None:
        raise BlockedError(f"width-through-{node.op_type}")
    yield from rule(node, value, axis, found)


def _rank(value: ir.Value | None) -> int:
    shape = walk.shape_of(value)
    if shape is None:
        raise BlockedError("width-unknown")
    return len(shape)


def _elementwise(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    from_right = _rank(value) - axis
    for other in (*node.inputs, *node.outputs[:1]):
        if other is None or other is value:
            continue
        shape = walk.shape_of(other)
        if shape is None:
            raise BlockedError("width-unknown")
        if len(shape) >= from_right and shape[-from_right] != 1:
            yield other, len(shape) - from_right


def _norm(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    x = edit.operand(node, 0)
    last = _rank(x) - 1
    if value in node.inputs[1:] or axis == last:
        yield from ((parameter, 0) for parameter in node.inputs[1:] if parameter is not None)
        yield from ((x, last), (node.outputs[0], last))
    else:
        yield from ((x, axis), (node.outputs[0], axis))


def _matmul(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    x, weight = edit.operand(node, 0), edit.operand(node, 1)
    if not walk.is_weight(weight, rank=2):
        raise BlockedError("width-through-MatMul")
    if (value is weight and axis == 0) or (value is x and axis == _rank(x) - 1):
        yield from ((weight, 0), (x, _rank(x) - 1))
    elif value is weight or (value is node.outputs[0] and axis == _rank(value) - 1):
        yield from ((weight, 1), (node.outputs[0], _rank(node.outputs[0]) - 1))
    else:
        yield from ((x, axis), (node.outputs[0], axis))


def _gather(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    data, indices = edit.operand(node, 0), edit.operand(node, 1)
    along, extra = walk.axis(node, 0), _rank(indices) - 1
    if value is indices or along is None:
        raise BlockedError("width-through-Gather")
    if value is data:
        source = axis
    else:
        source = axis if axis < along else max(axis - extra, along)
    if source == along:
        raise BlockedError("width-through-Gather")
    yield from ((data, source), (node.outputs[0], source + (extra if source > along else 0)))


def _concat(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    if walk.axis(node, 0) in (axis, None):
        raise BlockedError("width-through-Concat")
    yield from ((other, axis) for other in (*node.inputs, *node.outputs) if other is not None)


def _transpose(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    given = node.attributes.get("perm")
    order = list(given.as_ints()) if given is not None else list(reversed(range(_rank(value))))
    source = axis if value is node.inputs[0] else order[axis]
    yield from ((edit.operand(node, 0), source), (node.outputs[0], order.index(source)))


def _reshape(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    """The width stays whole when as many elements follow it on both sides, or when all sizes before it stay."""
    x, y = edit.operand(node, 0), node.outputs[0]
    before, after, target = walk.shape_of(x), walk.shape_of(y), walk.ints(edit.operand(node, 1))
    if before is None or after is None or target is None:
        raise BlockedError("width-through-Reshape")
    here, there = (before, after) if value is x else (after, before)
    other = _same_place(here, there, axis)
    if other is None and all(size in (0, before[i]) for i, size in enumerate(target[:axis])):
        other = axis
    source, result = (axis, other) if value is x else (other, axis)
    if source is None or result is None or before[source] != found.size or target[result] not in (0, found.size):
        raise BlockedError("width-through-Reshape")
    if target[result] == found.size:
        found.retargets[Retarget(node, 1, result)] = None
    yield from ((x, source), (y, result))


def _same_place(here: Sizes, there: Sizes, axis: int) -> int | None:
    """The axis of another shape that has the same size and the same number of elements after it."""
    behind = _elements(here[axis + 1 :])
    places = [place for place, size in enumerate(there) if size == here[axis]]
    return next((p for p in places if behind is not None and _elements(there[p + 1 :]) == behind), None)


def _elements(sizes: Sizes) -> int | None:
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _expand(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    """The target may say 1 for the width, or hold it in a constant, or in a constant that is the last of its parts."""
    x, y = edit.operand(node, 0), node.outputs[0]
    from_right = _rank(value) - axis
    shape = edit.operand(node, 1)
    asked = Symbols(node.graph).numbers(shape) if isinstance(node.graph, ir.Graph) else None
    if asked is None or asked[-from_right].constant not in (1, found.size):
        raise BlockedError("width-through-Expand")
    if asked[-from_right].constant == found.size:
        found.retargets[_holder(node, shape, from_right, found.size)] = None
    yield from ((x, _rank(x) - from_right), (y, _rank(y) - from_right))


def _holder(node: ir.Node, shape: ir.Value, from_right: int, size: int) -> Retarget:
    """Where the target of an Expand has the width as a constant."""
    operand = 1
    joined = edit.producer(shape, "Concat")
    if joined is not None and len(edit.consumers(shape)) == 1:
        node, operand = joined, len(joined.inputs) - 1
        shape = edit.operand(joined, operand)
    sizes = walk.ints(shape)
    if sizes is None or len(sizes) < from_right or sizes[-from_right] != size:
        raise BlockedError("width-through-Expand")
    return Retarget(node, operand, len(sizes) - from_right)


def _conv(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    x, weight = edit.operand(node, 0), edit.operand(node, 1)
    if walk.int_attribute(node, "group", 1) != 1 or not walk.is_weight(weight):
        raise BlockedError("width-through-Conv")
    bias = edit.input_at(node, 2)
    if (value is x and axis == 1) or (value is weight and axis == 1):
        yield from ((x, 1), (weight, 1))
    elif (value is node.outputs[0] and axis == 1) or (value is weight and axis == 0) or value is bias:
        yield from ((node.outputs[0], 1), (weight, 0))
        if bias is not None:
            yield bias, 0
    else:
        raise BlockedError("width-through-Conv")


def _reduce(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    x, y = edit.operand(node, 0), node.outputs[0]
    rank, along = _rank(x), walk.ints(edit.input_at(node, 1))
    if along is None:
        raise BlockedError(f"width-through-{node.op_type}")
    gone = sorted(item % rank for item in along)
    kept = [i for i in range(rank) if i not in gone]
    places = list(range(rank)) if walk.int_attribute(node, "keepdims", 1) else kept
    source = axis if value is x else places[axis]
    if source in gone:
        raise BlockedError(f"width-through-{node.op_type}")
    yield from ((x, source), (y, places.index(source)))


def _slice(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    x = edit.operand(node, 0)
    along = walk.ints(edit.input_at(node, 3))
    if along is None or axis in {item % _rank(x) for item in along}:
        raise BlockedError("width-through-Slice")
    yield from ((x, axis), (node.outputs[0], axis))


def _shape(node: ir.Node, value: ir.Value, axis: int, found: Width) -> Iterator[Place]:
    """Reading other sizes is harmless."""
    rank = _rank(edit.operand(node, 0))
    start = walk.int_attribute(node, "start", 0)
    end = walk.int_attribute(node, "end", rank)
    if axis in range(rank)[start:end]:
        raise BlockedError("width-through-Shape")
    yield from ()


RULES: dict[str, Callable[[ir.Node, ir.Value, int, Width], Iterator[Place]]] = {
    "Concat": _concat,
    "Conv": _conv,
    "Expand": _expand,
    "Gather": _gather,
    "LayerNormalization": _norm,
    "MatMul": _matmul,
    "RMSNormalization": _norm,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Transpose": _transpose,
    **dict.fromkeys(REDUCTIONS, _reduce),
}
