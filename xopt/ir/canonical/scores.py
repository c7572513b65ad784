"""A softmax read backwards to the product of queries and keys, and forwards to the product with the values.

    weights = softmax(softcap(Q @ K^T * scale) + masks)  [guarded against NaN];  Y = weights @ V
with the scale on the scores, on either operand or on both, the masks added or filled in, in any order, and reshapes
between (3-D batches of heads, windows). Nothing here changes the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, Axis, after, axis, before
from xopt.ir.canonical.operands import DEPTH, KEY, QUERY, VALUE, scaling
from xopt.ir.canonical.report import NotAttentionError
from xopt.ir.canonical.terms import (
    BETWEEN,
    ELEMENTWISE,
    Floor,
    PlacedTerm,
    cut_out,
    floor_of,
    masked,
    product_behind,
    raised,
)
from xopt.ir.edit import attribute, constant, consumers, is_op, producer, scalar
from xopt.ir.poly import ONE, product
from xopt.ir.quantized import PAIR
from xopt.ir.shape_rules import Dims, integer
from xopt.ir.symbolic import Symbols

Factor: TypeAlias = tuple[ir.Value, Axes]
"""A factor of a product, and its axes."""


@dataclass
class Scores:
    """What is left of a softmax: ``q`` and ``k`` with their layouts over the softmax's axes, and what was done to
    their product. ``temperatures`` are constants [..., 1, 1] that it was multiplied by before anything else.
    """

    q: ir.Value
    k: ir.Value
    q_axes: Axes
    k_axes: Axes
    scale: float
    softcap: float
    terms: list[PlacedTerm] = field(default_factory=list)
    temperatures: list[ir.Value] = field(default_factory=list)


@dataclass(frozen=True)
class Weighted:
    """Product of the weights with ``v``; ``v_axes`` and ``axes`` (of the product) over the softmax's axes; ``guarded``
    when weights that are NaN count as 0.
    """

    v: ir.Value
    v_axes: Axes
    node: ir.Node
    axes: Axes
    guarded: bool


def softmax_axes(symbols: Symbols, softmax: ir.Node) -> Axes:
    """Labelled axes of a softmax's input; the one that it sums over is that of the keys.

    Raises:
        NotAttentionError: unknown rank; no product of queries and keys.
    """
    dims = symbols.dims(softmax.inputs[0])
    if dims is None or len(dims) < 3:
        raise NotAttentionError("rank" if product_behind(softmax.inputs[0], BETWEEN) is not None else "no-product")
    product = product_behind(softmax.inputs[0], ELEMENTWISE)
    own = symbols.dims(product.outputs[0]) if product is not None else None
    if own is not None and len(own) == len(dims):  # a mask of fixed size would speak for the scores otherwise
        dims = own
    place = integer(softmax, "axis", -1) % len(dims)
    if place != len(dims) - 1 and product_behind(softmax.inputs[0], BETWEEN) is None:
        weighs = any(_weighs(node) for node in consumers(softmax.outputs[0]))
        raise NotAttentionError("softmax-axis" if weighs else "no-product")
    labels = [*(f"batch{i}" for i in range(len(dims) - 2)), QUERY]
    labels.insert(place, KEY)
    return tuple(axis(label, dim) for label, dim in zip(labels, dims))


def read_scores(symbols: Symbols, value: ir.Value, axes: Axes) -> Scores:
    """The product of queries and keys behind ``value``, the softmax's input.

    Raises:
        NotAttentionError: no such product, or something between that ``Attention`` cannot say.
    """
    terms: list[PlacedTerm] = []
    temperatures: list[tuple[ir.Value, Axes]] = []
    factor, softcap = 1.0, 0.0
    floor: Floor | None = None
    while True:
        node = value.producer()
        if node is None or node.domain != "":
            raise NotAttentionError("no-product")
        if is_op(node, "MatMul"):
            (q, q_axes), (k, k_axes) = _factors(symbols, node, axes)
            if (temperatures and q is not node.inputs[0]) or any(at[:-2] != axes[:-2] for _, at in temperatures):
                raise NotAttentionError("temperature-layout")
            by = [value for value, _ in temperatures]
            return Scores(q, k, q_axes, k_axes, factor, softcap, terms, by)
        moved = before(symbols, value, axes)
        scaled = scaling(node)
        if moved is not None:
            value, axes = moved
        elif scaled is not None and producer(scaled[0], "Tanh") is not None and softcap == 0:
            if factor != 1 or scaled[1] < 0:
                raise NotAttentionError("scaled-softcap")
            value, softcap = scaled[0].producer().inputs[0], scaled[1]  # type: ignore[union-attr, assignment]
            factor = softcap
        elif scaled is not None:
            value, factor = scaled[0], factor * scaled[1]
        elif is_op(node, "Mul") and _is_temperature(symbols, node, axes):
            temperatures.append((node.inputs[1], axes))  # type: ignore[arg-type]
            value = node.inputs[0]  # type: ignore[assignment]
        elif is_op(node, "Mul") and terms and (rest := cut_out(symbols, node, axes, terms[-1])) is not None:
            value = rest
        elif is_op(node, "Max", "Clip") and (lowest := floor_of(symbols, node, factor)) is not None:
            value, floor = lowest
        elif is_op(node, "Add", "Sub", "Where"):
            if softcap or temperatures:
                raise NotAttentionError("mask-inside-softcap" if softcap else "mask-under-temperature")
            value, term = masked(symbols, node, factor, axes)
            terms += [] if term is None else [raised(term, floor, terms)]
        elif is_op(node, *PAIR):
            raise NotAttentionError("scores-quantized" if product_behind(value, BETWEEN) is not None else "no-product")
        else:
            raise NotAttentionError(f"scores-{node.op_type.lower()}")


def _is_temperature(symbols: Symbols, node: ir.Node, axes: Axes) -> bool:
    """Whether the second factor of a Mul is a constant that is the same for all queries and keys."""
    dims, scores = symbols.dims(node.inputs[1]), symbols.dims(node.inputs[0])
    if constant(node.inputs[1]) is None or dims is None or scores is None or len(scores) != len(axes):
        return False
    return len(dims) <= len(axes) and dims[-2:] == (ONE, ONE)


def _factors(symbols: Symbols, node: ir.Node, axes: Axes) -> tuple[Factor, Factor]:
    """Queries and keys of the product whose result has ``axes``: the factor that has the axis of the keys is the keys.

    Raises:
        NotAttentionError: unknown or other ranks; the axis of the keys is in both factors.
    """
    left, right = node.inputs
    left_dims, right_dims = symbols.dims(left), symbols.dims(right)
    if left is None or right is None or left_dims is None or right_dims is None:
        raise NotAttentionError("rank")
    if len(left_dims) != len(axes) or len(right_dims) != len(axes) or len(axes) < 3:
        projected = left.const_value is not None or right.const_value is not None
        raise NotAttentionError("no-product" if projected else "rank")
    depth = axis(DEPTH, left_dims[-1])
    first = left, (*_present(axes[:-2], left_dims), axes[-2], depth)
    second = right, (*_present(axes[:-2], right_dims), depth, axes[-1])
    if _of_keys(axes[-1]) or not axes[-1]:
        return first, second
    if not _of_keys(axes[-2]):
        raise NotAttentionError("head-layout")
    return second, first


def _of_keys(row: Axis) -> bool:
    """Whether an axis is that of the keys."""
    return {digit.label for digit in row} == {KEY}


def _present(axes: Axes, dims: Dims) -> Axes:
    """Batch axes, those that are broadcast left out.

    Raises:
        NotAttentionError: sizes that may differ, of which one broadcasts if the other is 1 when the model runs.
    """
    if any(dim not in (ONE, product(digit.count for digit in row)) for row, dim in zip(axes, dims)):
        raise NotAttentionError("batch-sizes")
    return tuple(() if dim == ONE else row for row, dim in zip(axes, dims))


def read_values(symbols: Symbols, softmax: ir.Node, axes: Axes) -> Weighted:
    """The product of the weights with the values.

    Raises:
        NotAttentionError: the weights are read by anything else.
    """
    value, guarded = softmax.outputs[0], False
    if not any(_weighs(node) for node in consumers(value)):
        raise NotAttentionError(_no_product(symbols, softmax))
    while True:
        node, value, guard = _reader(value)
        guarded = guarded or guard
        if is_op(node, "MatMul"):
            break
        moved = after(symbols, node, axes)
        if moved is None:
            raise NotAttentionError("weights-quantized" if is_op(node, *PAIR) else f"weights-{node.op_type.lower()}")
        value, axes = node.outputs[0], moved
    first = node.inputs[0] is value
    v = node.inputs[first]
    dims = symbols.dims(v)
    if v is None or dims is None or len(dims) != len(axes):
        raise NotAttentionError("rank")
    query, key = axes[-2:] if first else (axes[-1], axes[-2])
    if key and not _of_keys(key):
        raise NotAttentionError("weights-matmul")
    depth = axis(VALUE, dims[-1 if first else -2])
    v_axes, y_axes = ((key, depth), (query, depth)) if first else ((depth, key), (depth, query))
    return Weighted(v, (*_present(axes[:-2], dims), *v_axes), node, (*axes[:-2], *y_axes), guarded)


def _reader(value: ir.Value) -> tuple[ir.Node, ir.Value, bool]:
    """The reader of the weights that leads to their product, past a guard that replaces NaN by 0; what it reads; if
    there is a guard.

    What else reads them, or hands them to the caller, keeps the softmax.
    """
    readers = consumers(value)
    checks = [node for node in readers if is_op(node, "IsNaN")]
    if checks:
        guards = {node for check in checks for node in consumers(check.outputs[0], "Where")}
        if len(guards) == 1:
            guard = guards.pop()
            if scalar(guard.inputs[1]) == 0 and guard.inputs[2] is value and {*readers} <= {*checks, guard}:
                return (*_reader(guard.outputs[0])[:2], True)
    ways = readers if len(readers) == 1 else [node for node in readers if _weighs(node)]
    if len(ways) != 1:
        raise NotAttentionError("weights-read-elsewhere" if ways else "no-product")
    return ways[0], value, False


def _no_product(symbols: Symbols, softmax: ir.Node) -> str:
    """Why a softmax that weighs no values is no attention: what is done to its weights first, if it has scores.

    Weights stay weights as long as they keep their shape; what sums them up or shows them is not followed.
    """
    if product_behind(softmax.inputs[0], BETWEEN) is not None:
        dims = symbols.dims(softmax.outputs[0])
        for reader in consumers(softmax.outputs[0]):
            if _leads_to_product(reader, lambda node: symbols.dims(node.outputs[0]) == dims):
                return f"weights-{reader.op_type.lower()}"
    return "no-product"


def _weighs(node: ir.Node) -> bool:
    """Whether a reader of weights is a product with something that is computed, or leads to one."""
    return _leads_to_product(node, lambda reader: is_op(reader, *BETWEEN, "Dropout", "IsNaN", "Cast"))


def _leads_to_product(node: ir.Node, through: Callable[[ir.Node], bool]) -> bool:
    """Whether a node is a product of two computed factors, or leads to one past nodes that pass `through`."""
    seen, pending = {node}, [node]
    while pending:
        reader = pending.pop()
        if is_op(reader, "MatMul"):
            if all(factor is not None and factor.const_value is None for factor in reader.inputs):
                return True
        elif through(reader):
            following = {*consumers(reader.outputs[0])} - seen
            seen |= following
            pending += following
    return False


def attention_scale(node: ir.Node, head_dim: int) -> float:
    """Scale of an Attention node that may leave it out."""
    written = attribute(node, "scale")
    return float(written) if isinstance(written, (int, float)) and written != 0 else head_dim**-0.5
