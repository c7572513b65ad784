"""The operands of an attention, traced back to the [B, S, heads * d] tensors they are cut from, and put together again.

    Q4 [B,H,S,d] = Transpose(Rotary(Norm(Reshape(x @ W + b)[:, :, 0])))         ->   Q3 [B,S,H*d] =
    Rotary(Norm(Linear(x)))
Between a projection and its attention lie data movement (followed by layout), a scalar scale, and per-head norms and
rotary embeddings, which are carried over to the 3-D form. Several operands cut from one tensor become one Split of
it; where the exporter interleaved them (BLOOM's [H, 3, d]), the columns of the projection's weight are put in order
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, Axis, Digit, axis, before, columns, merged, width
from xopt.ir.canonical.moving import LAST, move_operand
from xopt.ir.edit import constant, initializer, input_at, insert, insert_many, is_op, producer, scalar
from xopt.ir.poly import ONE, Poly, product
from xopt.ir.quantized import rounded_alike, rounds_alike
from xopt.ir.shape_rules import integer
from xopt.ir.symbolic import Symbols

NORMS = ("LayerNormalization", "RMSNormalization")
QUERY, KEY, DEPTH, VALUE = "query", "key", "depth", "value"
"""Labels of the axes; those of the batch are "batch0", "batch1", ..."""
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
LENGTHS = ("ReduceL2", "ReduceSumSquare")


@dataclass(frozen=True)
class Step:
    """A node that treats every head alike or by constants, and every token alone; ``axes`` are those of its result."""

    node: ir.Node
    axes: Axes


@dataclass(frozen=True, eq=False)
class Operand:
    """``value`` [B, S, total], of which ``columns`` (None: all, in order) are the heads, ``head_dim`` wide each.

    ``lead`` and ``head`` tell which parts of the attention's batch axes became batch and heads; ``steps`` are the
    per-head nodes between the value and the attention, the last one first. ``moves`` are the axes of a value that is
    to be moved to [B, S, total] first, and what the last axis is to be.
    """

    value: ir.Value
    total: int
    columns: npt.NDArray[np.int64] | None
    heads: int
    head_dim: int
    lead: Axis
    head: Axis
    steps: tuple[Step, ...]
    scale: float
    moves: tuple[Axes, Axis] | None = None


def trace(symbols: Symbols, value: ir.Value, axes: Axes, sequence: Axis, depth: str) -> Operand | None:
    """The earliest 3-D tensor that holds all of an operand, its heads side by side; or else the earliest that can be
    moved to be one, or one with the heads in its batch; None when there is none.

    Args:
        axes: layout of ``value`` over the attention's axes.
        sequence: the axis of positions.
        depth: label of the axis within a head.
    """
    steps: tuple[Step, ...] = ()
    scale = 1.0
    best: Operand | None = None
    while True:
        found = _in_three_axes(value, axes, sequence, depth, steps, scale)
        movable = None if found else _moved_to_three_axes(value, axes, sequence, depth, steps, scale)
        best = max((one for one in (found, movable, best) if one), key=_closeness, default=None)
        moved = before(symbols, value, axes)
        if moved is not None:
            value, axes = moved
            continue
        node = value.producer()
        if node is None:
            return best
        commutes = all(is_op(step.node, "RotaryEmbedding", "Mul") for step in steps)
        factor = scaling(node) if commutes else None
        if factor is not None:
            value, scale = factor[0], scale * factor[1]
        elif per_head(symbols, node, axes, sequence, depth, found):
            steps, value = (*steps, Step(node, axes)), node.inputs[0]  # type: ignore[assignment]
        else:
            return best


def _closeness(operand: Operand) -> tuple[bool, bool]:
    return bool(operand.head), operand.moves is None


def scaling(node: ir.Node) -> tuple[ir.Value, float] | None:
    """``(x, c)`` when the node computes ``x * c`` for a constant number c.

    Numbers that scale nothing (0, infinities, NaN) or so much that a product of some overflows are none.
    """
    if not is_op(node, "Mul", "Div"):
        return None
    left, right = node.inputs[0], node.inputs[1]
    number = scalar(right)
    if number is not None and left is not None:
        return (left, number if node.op_type == "Mul" else 1.0 / number) if _scales(number) else None
    number = scalar(left) if node.op_type == "Mul" else None
    return (right, number) if number is not None and right is not None and _scales(number) else None


def _scales(number: float) -> bool:
    return 1e-12 < abs(number) < 1e12


def _in_three_axes(
    value: ir.Value, axes: Axes, sequence: Axis, depth: str, steps: tuple[Step, ...], scale: float
) -> Operand | None:
    """The operand, when ``axes`` are [batch][positions][heads and depth]."""
    if len(axes) != 3 or merged(axes[1]) != sequence:
        return None
    return _operand(value, merged(axes[0]), merged(axes[2]), sequence, depth, steps, scale)


def _moved_to_three_axes(
    value: ir.Value, axes: Axes, sequence: Axis, depth: str, steps: tuple[Step, ...], scale: float
) -> Operand | None:
    """The operand, when the last of ``axes`` are heads and depth, and the others batch and positions in any order."""
    if any(step.node.op_type == "RotaryEmbedding" for step in steps):  # its tables are of the batch as it was
        return None
    digits = [digit for row in axes[:-1] for digit in row]
    names = {digit.label for digit in sequence}
    lead = ordered([digit for digit in digits if digit.label not in names])
    if lead is None or ordered([digit for digit in digits if digit.label in names]) != sequence:
        return None
    found = _operand(value, lead, merged(axes[-1]), sequence, depth, steps, scale)
    if found is None:
        return None
    last = axis(LAST, Poly.of(found.total))
    return replace(found, moves=((*axes[:-1], last), last))


def placed(symbols: Symbols, value: ir.Value, axes: Axes, lead: Axis, head: Axis, depth: str) -> Operand | None:
    """An operand of which no more is known than its ``axes`` at the attention: moved, with the heads where others are.

    None when a size is not known.
    """
    digits = [digit for row in axes for digit in row]
    labels = {digit.label for digit in head}
    both = labels & {digit.label for digit in lead}
    own = head if both else tuple(digit for digit in digits if digit.label in labels)
    shared = not {digit.label for digit in digits} & {digit.label for digit in lead}
    inner = next((digit for row in axes for digit in row if digit.label == depth), None)
    head_dim = inner.count.constant if inner is not None else 1
    heads = product(digit.count for digit in own).constant
    if heads is None or head_dim is None or len(own) > 1:
        return None
    last = (*own, inner) if inner is not None else own
    plain = tuple(replace(digit, radix=digit.count) for digit in own)
    return Operand(value, heads * head_dim, None, heads, head_dim, () if shared else lead, plain, (), 1.0, (axes, last))


def ordered(digits: Sequence[Digit]) -> Axis | None:
    """The axis that digits make, by label and with the most significant first; None when they make none."""
    row: list[Digit] = []
    for label in sorted({digit.label for digit in digits}):
        left = [digit for digit in digits if digit.label == label]
        while left:
            highest = next((d for d in left if all(d.stride.exactly(o.stride) is not None for o in left)), None)
            if highest is None or not highest.whole:
                return None
            row.append(highest)
            left.remove(highest)
    return merged(tuple(row))


def _operand(
    value: ir.Value, lead: Axis, last: Axis, sequence: Axis, depth: str, steps: tuple[Step, ...], scale: float
) -> Operand | None:
    """The operand with heads and depth in the ``last`` axis of ``value``."""
    inner = [digit for digit in last if digit.label == depth]
    head = _together([digit for digit in last if digit.label not in (depth, "")])
    others = {digit.label for digit in (*lead, *head)} & {depth, *(digit.label for digit in sequence)}
    if len(head) > 1 or len(inner) > 1 or others or not all(digit.whole for digit in lead):
        return None
    places = columns(last, ("", *(digit.label for digit in head), depth))
    total, head_dim = width(last).constant, inner[0].count.constant if inner else 1
    heads = head[0].count.constant if head else 1
    if places is None or total is None or head_dim is None or heads is None or (inner and inner[0].stride != ONE):
        return None
    chosen = None if np.array_equal(places, np.arange(total)) else places
    plain = tuple(Digit(digit.label, digit.count, digit.stride, digit.count) for digit in head)
    if any(is_op(step.node, *ARITHMETIC) and vector(step, plain, depth) is None for step in steps):
        return None
    return Operand(value, total, chosen, heads, head_dim, lead, plain, steps, scale)


def _together(digits: Sequence[Digit]) -> Sequence[Digit]:
    """Digits that are one number, as it: groups of heads may lie in any order."""
    row = ordered(digits) if len(digits) > 1 else None
    return digits if row is None else row


def per_head(symbols: Symbols, node: ir.Node, axes: Axes, sequence: Axis, depth: str, found: Operand | None) -> bool:
    """Whether the node treats every head apart, so that it has a 3-D form."""
    if not node.outputs:
        return False
    if rounds_alike(node):
        return found is None
    if is_op(node, "RotaryEmbedding"):
        in_heads = len(axes) == 4 and axes[2] == sequence and [digit.label for digit in axes[3]] == [depth]
        return in_heads or (found is not None and found.columns is None)
    size = symbols.dims(node.outputs[0])
    if size is None or size != symbols.dims(node.inputs[0]):
        return False
    in_depth = axes[-1] == axis(depth, size[-1])
    if is_op(node, *NORMS):
        return in_depth and integer(node, "axis", -1) in (-1, len(axes) - 1)
    if is_op(node, *ARITHMETIC) and constant(node.inputs[1]) is not None:
        return found is None and producer(node.inputs[0], "MatMul") is None
    return in_depth and unit_norm(node) is not None


def vector(step: Step, head: Axis, depth: str) -> np.ndarray | None:
    """The constant of an arithmetic step over [heads * depth]; None when it differs along another axis."""
    array, rows = constant(step.node.inputs[1]), step.axes
    if array is None or array.ndim > len(rows):
        return None
    array = array.reshape((1,) * (len(rows) - array.ndim) + array.shape)
    wanted = [(digit.label, digit.stride, digit.count) for row in (head, rows[-1]) for digit in row]
    found: dict[int, int] = {}
    for place, (row, size) in enumerate(zip(rows, array.shape)):
        digits = [(digit.label, digit.stride, digit.count) for digit in row]
        if size == 1:
            continue
        if len(digits) != 1 or digits[0] not in wanted or not row[0].whole:
            return None
        found[wanted.index(digits[0])] = place
    counts = [digit.count.constant for row in (head, rows[-1]) for digit in row]
    if None in counts or [digit.label for digit in rows[-1]] not in ([], [depth]):
        return None
    kept = [array.shape[found[i]] if i in found else 1 for i in range(len(wanted))]
    order = [place for _, place in sorted(found.items())]
    rest = [place for place in range(array.ndim) if place not in order]
    laid = array.transpose([*rest, *order]).reshape(kept)
    return np.broadcast_to(laid, [count or 1 for count in counts]).reshape(-1)


def unit_norm(node: ir.Node) -> list[ir.Node] | None:
    """The nodes that compute the length of x over its last axis, the first one first, where ``node`` is x / length."""
    if not is_op(node, "Div") or node.inputs[0] is None:
        return None
    chain: list[ir.Node] = []
    value = node.inputs[1]
    while value is not None and value is not node.inputs[0]:
        maker = value.producer()
        if maker is None or not is_op(maker, "Expand", "Clip", "Max", "Add", "Sqrt", *LENGTHS):
            return None
        if maker.op_type in LENGTHS:
            axes, rank = constant(input_at(maker, 1)), len(value.shape or ())
            last = axes is not None and axes.size == 1 and int(axes.item()) in (-1, rank - 1)
            if not last or rank == 0 or not integer(maker, "keepdims", 1) or maker.inputs[0] is not node.inputs[0]:
                return None
        elif maker.op_type != "Expand" and any(scalar(v) is None for v in maker.inputs[1:] if v is not None):
            return None
        if maker.op_type != "Expand":
            chain.insert(0, maker)
        value = maker.inputs[0]
    return chain if chain and chain[0].op_type in LENGTHS else None


def assemble(symbols: Symbols, site: ir.Node, operands: Sequence[Operand], sequences: Sequence[Axis]) -> list[ir.Value]:
    """3-D values of the operands, which have these axes of positions, put right before ``site``."""
    sources: dict[tuple[ir.Value, tuple[Axes, Axis] | None], list[int]] = {}
    for index, operand in enumerate(operands):
        sources.setdefault((operand.value, operand.moves), []).append(index)
    values: dict[int, ir.Value] = {}
    for (source, moves), indices in sources.items():
        if moves is not None:
            axes, last = moves
            target = (operands[indices[0]].lead, sequences[indices[0]], last)
            source = move_operand(symbols, site, source, axes, target)
        parts = _parts(site, source, [operands[i] for i in indices])
        values.update(zip(indices, parts))
    found = [_steps(site, values[i], *one) for i, one in enumerate(zip(operands, (DEPTH, DEPTH, VALUE)))]
    model = next((value for value, operand in zip(found, operands) if operand.lead), None)
    return [
        value if operand.lead or model is None else _repeated(symbols, site, value, model)
        for value, operand in zip(found, operands)
    ]


def _repeated(symbols: Symbols, site: ir.Node, value: ir.Value, other: ir.Value) -> ir.Value:
    """``value`` [1, S, n] as often as ``other`` has samples."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    samples = insert(site, "Shape", [other], {"start": 0, "end": 1}, dtype=ir.DataType.INT64, shape=[1])
    ones = initializer(graph, "ones", np.ones(2, np.int64))
    shape = insert(site, "Concat", [samples, ones], {"axis": 0}, dtype=ir.DataType.INT64, shape=[3])
    result = insert(site, "Expand", [value, shape])
    for made in (samples, shape):
        symbols.learn(made)
    return symbols.learn(result)


def _parts(site: ir.Node, source: ir.Value, operands: Sequence[Operand]) -> Sequence[ir.Value]:
    """The operands' columns of ``source``, by one Split where they share it."""
    if all(operand.columns is None for operand in operands):
        return [source] * len(operands)
    total = operands[0].total
    wanted = [np.arange(total) if operand.columns is None else operand.columns for operand in operands]
    distinct = list({places.tobytes(): places for places in wanted}.values())
    order = np.concatenate(distinct)
    if not np.array_equal(order, np.arange(total)):
        source = _reordered(site, source, order)
    if len(distinct) == 1:
        return [source] * len(operands)
    sizes = [places.size for places in distinct]
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    table = initializer(graph, f"{source.name}/sizes", np.asarray(sizes, np.int64))
    outputs = insert_many(site, "Split", [source, table], {"axis": -1}, len(sizes), name=f"{source.name}/part")
    for output, size in zip(outputs, sizes):
        output.shape = ir.Shape([*list(source.shape)[:-1], size]) if source.shape is not None else None
    part = {places.tobytes(): output for places, output in zip(distinct, outputs)}
    return [part[places.tobytes()] for places in wanted]


def _reordered(site: ir.Node, source: ir.Value, order: npt.NDArray[np.int64]) -> ir.Value:
    """Chosen columns of ``source``: of the weight and bias when it is a projection, else gathered at run time."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    add = producer(source, "Add")
    matmul = producer(add.inputs[0] if add is not None else source, "MatMul")
    bias = constant(add.inputs[1]) if add is not None else None
    weight = constant(matmul.inputs[1]) if matmul is not None else None
    shape = [*list(source.shape or ())[:-1], len(order)]
    if matmul is None or weight is None or weight.ndim != 2 or (add is not None and (bias is None or bias.ndim != 1)):
        index = initializer(graph, f"{source.name}/columns", order)
        return insert(site, "Gather", [source, index], {"axis": -1}, name=f"{source.name}/chosen", shape=shape)
    stem = matmul.inputs[1].name if matmul.inputs[1] is not None else "weight"
    chosen = initializer(graph, f"{stem}/columns", weight[:, order])
    value = insert(site, "MatMul", [matmul.inputs[0], chosen], name=f"{source.name}/chosen", shape=shape)
    if add is not None and bias is not None and add.inputs[1] is not None:
        chosen_bias = initializer(graph, f"{add.inputs[1].name}/columns", bias[order])
        value = insert(site, "Add", [value, chosen_bias], name=f"{source.name}/biased", shape=shape)
    return value


def _steps(site: ir.Node, value: ir.Value, operand: Operand, depth: str) -> ir.Value:
    """Re-apply the per-head nodes in 3-D form."""
    for step in reversed(operand.steps):
        node = step.node
        if node.op_type == "RotaryEmbedding":
            attributes = {
                "num_heads": operand.heads,
                "interleaved": integer(node, "interleaved", 0),
                "rotary_embedding_dim": integer(node, "rotary_embedding_dim", 0),
            }
            value = insert(site, "RotaryEmbedding", [value, *node.inputs[1:]], attributes, shape=value.shape)
        elif rounds_alike(node):  # signed: attention on uint8 rounds its weights, too, which nobody has asked for here
            value = rounded_alike(site, node, value, signed=True)
        elif is_op(node, *ARITHMETIC) and (numbers := vector(step, operand.head, depth)) is not None:
            graph = site.graph
            assert isinstance(graph, ir.Graph)
            constants = initializer(graph, f"{node.name}/per_head", numbers)
            value = insert(site, node.op_type, [value, constants], shape=value.shape)
        else:
            value = _normed(site, value, node, operand.head_dim)
    return value


def _normed(site: ir.Node, value: ir.Value, node: ir.Node, head_dim: int) -> ir.Value:
    """Per-head norm of a 3-D value; head counts stay out of the shapes."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    apart = initializer(graph, "per_head", np.asarray([0, 0, -1, head_dim], np.int64))
    joined = initializer(graph, "joined_heads", np.asarray([0, 0, -1], np.int64))
    split = insert(site, "Reshape", [value, apart])
    chain = unit_norm(node)
    if chain is None:
        attributes = {
            "axis": -1,
            "epsilon": node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5,
        }
        normed = insert(site, node.op_type, [split, *node.inputs[1:]], attributes)
    else:
        length = split
        for part in chain:
            length = insert(site, part.op_type, [length, *part.inputs[1:]], {"keepdims": 1} if part is chain[0] else {})
        normed = insert(site, "Div", [split, length])
    return insert(site, "Reshape", [normed, joined], shape=value.shape)
