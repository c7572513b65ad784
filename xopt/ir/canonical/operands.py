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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, Axis, Digit, axis, before, columns, merged, width
from xopt.ir.edit import constant, initializer, insert, insert_many, is_op, producer, scalar
from xopt.ir.poly import ONE
from xopt.ir.shape_rules import integer
from xopt.ir.symbolic import Symbols

NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Operand:
    """``value`` [B, S, total], of which ``columns`` (None: all, in order) are the heads, ``head_dim`` wide each.

    ``lead`` and ``head`` tell which parts of the attention's batch axes became batch and heads; ``steps`` are the
    per-head nodes between the value and the attention, the last one first.
    """

    value: ir.Value
    total: int
    columns: npt.NDArray[np.int64] | None
    heads: int
    head_dim: int
    lead: Axis
    head: Axis
    steps: tuple[ir.Node, ...]
    scale: float


def trace(symbols: Symbols, value: ir.Value, axes: Axes, sequence: Axis, depth: str) -> Operand | None:
    """The earliest 3-D tensor that holds all of an operand; None when there is none.

    Args:
        axes: layout of ``value`` over the attention's axes.
        sequence: the axis of positions.
        depth: label of the axis within a head.
    """
    steps: tuple[ir.Node, ...] = ()
    scale, best = 1.0, None
    while True:
        found = _in_three_axes(value, axes, sequence, depth, steps, scale)
        best = found or best
        moved = before(symbols, value, axes)
        if moved is not None:
            value, axes = moved
            continue
        node = value.producer()
        if node is None:
            return best
        factor = None if any(is_op(step, *NORMS) for step in steps) else scaling(node)
        if factor is not None:
            value, scale = factor[0], scale * factor[1]
        elif _per_head(symbols, node, axes, sequence, depth, found is not None and found.columns is None):
            steps, value = (*steps, node), node.inputs[0]  # type: ignore[assignment]
        else:
            return best


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
    value: ir.Value, axes: Axes, sequence: Axis, depth: str, steps: tuple[ir.Node, ...], scale: float
) -> Operand | None:
    """The operand, when ``axes`` are [batch][positions][heads and depth]."""
    if len(axes) != 3 or merged(axes[1]) != sequence:
        return None
    lead, last = merged(axes[0]), merged(axes[2])
    inner = [digit for digit in last if digit.label == depth]
    head = [digit for digit in last if digit.label not in (depth, "")]
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
    return Operand(value, total, chosen, heads, head_dim, lead, plain, steps, scale)


def _per_head(symbols: Symbols, node: ir.Node, axes: Axes, sequence: Axis, depth: str, flat: bool) -> bool:
    """Whether the node treats every head alike and apart, so that it has a 3-D form."""
    if is_op(node, "RotaryEmbedding"):
        in_heads = len(axes) == 4 and axes[2] == sequence and [digit.label for digit in axes[3]] == [depth]
        return flat or in_heads
    size = symbols.dims(node.outputs[0])
    per_head = is_op(node, *NORMS) and integer(node, "axis", -1) in (-1, len(axes) - 1)
    return per_head and size is not None and axes[-1] == axis(depth, size[-1])


def assemble(site: ir.Node, operands: Sequence[Operand]) -> list[ir.Value]:
    """3-D values of the operands, put right before ``site``."""
    sources: dict[ir.Value, list[int]] = {}
    for index, operand in enumerate(operands):
        sources.setdefault(operand.value, []).append(index)
    values: dict[int, ir.Value] = {}
    for source, indices in sources.items():
        parts = _parts(site, source, [operands[i] for i in indices])
        values.update(zip(indices, parts))
    return [_steps(site, values[i], operand) for i, operand in enumerate(operands)]


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


def _steps(site: ir.Node, value: ir.Value, operand: Operand) -> ir.Value:
    """Re-apply the per-head nodes in 3-D form."""
    for node in reversed(operand.steps):
        if node.op_type == "RotaryEmbedding":
            attributes = {
                "num_heads": operand.heads,
                "interleaved": integer(node, "interleaved", 0),
                "rotary_embedding_dim": integer(node, "rotary_embedding_dim", 0),
            }
            value = insert(site, "RotaryEmbedding", [value, *node.inputs[1:]], attributes, shape=value.shape)
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
    attributes = {
        "axis": -1,
        "epsilon": node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5,
    }
    normed = insert(site, node.op_type, [split, *node.inputs[1:]], attributes)
    return insert(site, "Reshape", [normed, joined], shape=value.shape)
