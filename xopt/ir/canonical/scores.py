"""A softmax read backwards to the product of queries and keys, and forwards to the product with the values.

    weights = softmax(softcap(Q @ K^T * scale) + masks)  [guarded against NaN];  Y = weights @ V
with the scale on the scores, on either operand or on both, the masks added or filled in, in any order, and reshapes
between (3-D batches of heads, windows). Nothing here changes the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, after, axis, before
from xopt.ir.canonical.masks import LOWEST
from xopt.ir.canonical.operands import DEPTH, KEY, QUERY, VALUE, scaling
from xopt.ir.canonical.report import NotAttentionError
from xopt.ir.edit import attribute, constant, consumers, is_op, producer, scalar
from xopt.ir.poly import ONE, product
from xopt.ir.quantized import PAIR
from xopt.ir.shape_rules import Dims, integer
from xopt.ir.symbolic import Symbols


@dataclass(frozen=True)
class PlacedTerm:
    """A mask on the scores where they had ``axes``; the rest as in ``masks.Term``."""

    kind: str
    value: ir.Value
    factor: float
    axes: Axes
    finite: bool = False


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
    """Labelled axes of a softmax's input.

    Raises:
        NotAttentionError: unknown rank, or not over the last axis; no product of queries and keys.
    """
    dims = symbols.dims(softmax.inputs[0])
    if dims is None or len(dims) < 3:
        raise NotAttentionError("rank" if _product(softmax.inputs[0], _BETWEEN) is not None else "no-product")
    product = _product(softmax.inputs[0], _ELEMENTWISE)
    own = symbols.dims(product.outputs[0]) if product is not None else None
    if own is not None and len(own) == len(dims):  # a mask of fixed size would speak for the scores otherwise
        dims = own
    if integer(softmax, "axis", -1) not in (-1, len(dims) - 1):
        raise NotAttentionError("softmax-axis")
    labels = [*(f"batch{i}" for i in range(len(dims) - 2)), QUERY, KEY]
    return tuple(axis(label, dim) for label, dim in zip(labels, dims))


def read_scores(symbols: Symbols, value: ir.Value, axes: Axes) -> Scores:
    """The product of queries and keys behind ``value``, the softmax's input.

    Raises:
        NotAttentionError: no such product, or something between that ``Attention`` cannot say.
    """
    terms: list[PlacedTerm] = []
    temperatures: list[tuple[ir.Value, Axes]] = []
    factor, softcap = 1.0, 0.0
    while True:
        node = value.producer()
        if node is None or node.domain != "":
            raise NotAttentionError("no-product")
        if is_op(node, "MatMul"):
            q_axes, k_axes = _factors(symbols, node, axes)
            if any(at[:-2] != axes[:-2] for _, at in temperatures):
                raise NotAttentionError("temperature-layout")
            by = [value for value, _ in temperatures]
            return Scores(node.inputs[0], node.inputs[1], q_axes, k_axes, factor, softcap, terms, by)  # type: ignore[arg-type]
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
        elif is_op(node, "Add", "Sub", "Where"):
            if softcap or temperatures:
                raise NotAttentionError("mask-inside-softcap" if softcap else "mask-under-temperature")
            value, term = _masked(symbols, node, factor, axes)
            terms.append(term)
        elif is_op(node, *PAIR):
            raise NotAttentionError("scores-quantized" if _product(value, _BETWEEN) is not None else "no-product")
        else:
            raise NotAttentionError(f"scores-{node.op_type.lower()}")


def _is_temperature(symbols: Symbols, node: ir.Node, axes: Axes) -> bool:
    """Whether the second factor of a Mul is a constant that is the same for all queries and keys."""
    dims, scores = symbols.dims(node.inputs[1]), symbols.dims(node.inputs[0])
    if constant(node.inputs[1]) is None or dims is None or scores is None or len(scores) != len(axes):
        return False
    return len(dims) <= len(axes) and dims[-2:] == (ONE, ONE)


def _masked(symbols: Symbols, node: ir.Node, factor: float, axes: Axes) -> tuple[ir.Value, PlacedTerm]:
    """The scores under one mask, and the mask."""
    if node.op_type == "Add":
        for scores, mask in (node.inputs, node.inputs[::-1]):
            if scores is not None and mask is not None and _product(scores, _BETWEEN) is not None:
                _check_broadcast(symbols, mask, axes)
                return scores, PlacedTerm("add", mask, factor, axes)
        raise NotAttentionError("no-product")
    if node.op_type == "Sub":
        scores, mask = node.inputs
        if scores is None or mask is None or _product(scores, _BETWEEN) is None:
            raise NotAttentionError("no-product")
        _check_broadcast(symbols, mask, axes)
        return scores, PlacedTerm("add", mask, -factor, axes)
    condition, chosen, other = node.inputs
    assert condition is not None
    _check_broadcast(symbols, condition, axes)
    for fill, scores, kind in ((chosen, other, "drop"), (other, chosen, "keep")):
        number = scalar(fill)
        if number is not None and number * factor <= LOWEST and scores is not None:
            return scores, PlacedTerm(kind, condition, 1.0, axes, math.isfinite(number))
    raise NotAttentionError("where-without-fill")


def _check_broadcast(symbols: Symbols, mask: ir.Value, axes: Axes) -> None:
    dims = symbols.dims(mask)
    if dims is None or len(dims) > len(axes):
        raise NotAttentionError("mask-rank")


_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Identity", "Tanh", "Where")
_MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", *PAIR)
_BETWEEN = _ELEMENTWISE + _MOVING


def _product(value: ir.Value | None, ops: tuple[str, ...], depth: int = 12) -> ir.Node | None:
    """The product of two computed tensors that ``value`` is few steps of ``ops`` away from: what scores look like."""
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return None
    if is_op(node, "MatMul"):
        return node if all(operand is not None and operand.const_value is None for operand in node.inputs) else None
    if not is_op(node, *ops):
        return None
    sources = node.inputs[:1] if node.op_type in _MOVING else node.inputs[node.op_type == "Where" :]
    found = (_product(source, ops, depth - 1) for source in sources)
    return next((product for product in found if product is not None), None)


def _factors(symbols: Symbols, node: ir.Node, axes: Axes) -> tuple[Axes, Axes]:
    """Layouts of the two factors of the product whose result has ``axes``."""
    q, k = node.inputs
    q_dims, k_dims = symbols.dims(q), symbols.dims(k)
    if q_dims is None or k_dims is None or len(q_dims) != len(axes) or len(k_dims) != len(axes) or len(axes) < 3:
        raise NotAttentionError("rank")
    depth = axis(DEPTH, q_dims[-1])
    q_axes = (*_present(axes[:-2], q_dims), axes[-2], depth)
    return q_axes, (*_present(axes[:-2], k_dims), depth, axes[-1])


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
    while True:
        node, value, guard = _reader(value)
        guarded = guarded or guard
        if is_op(node, "MatMul") and node.inputs[0] is value:
            break
        moved = after(symbols, node, axes)
        if moved is None:
            raise NotAttentionError("weights-quantized" if is_op(node, *PAIR) else f"weights-{node.op_type.lower()}")
        value, axes = node.outputs[0], moved
    v = node.inputs[1]
    dims = symbols.dims(v)
    if v is None or dims is None or len(dims) != len(axes):
        raise NotAttentionError("rank")
    depth = axis(VALUE, dims[-1])
    v_axes = (*_present(axes[:-2], dims), axes[-1], depth)
    return Weighted(v, v_axes, node, (*axes[:-1], depth), guarded)


def _reader(value: ir.Value) -> tuple[ir.Node, ir.Value, bool]:
    """The only reader of the weights, past a guard that replaces NaN by 0; what it reads; whether there is a guard."""
    readers = consumers(value)
    if value.is_graph_output():
        raise NotAttentionError("weights-read-elsewhere")
    checks = [node for node in readers if is_op(node, "IsNaN")]
    if checks:
        guards = {node for check in checks for node in consumers(check.outputs[0], "Where")}
        if len(guards) == 1:
            guard = guards.pop()
            if scalar(guard.inputs[1]) == 0 and guard.inputs[2] is value and {*readers} <= {*checks, guard}:
                return (*_reader(guard.outputs[0])[:2], True)
    if len(readers) != 1:
        raise NotAttentionError("weights-read-elsewhere")
    return readers[0], value, False


Transform = Callable[[Symbols, ir.Node, Axes], Axes | None]


def attention_scale(node: ir.Node, head_dim: int) -> float:
    """Scale of an Attention node that may leave it out."""
    written = attribute(node, "scale")
    return float(written) if isinstance(written, (int, float)) and written != 0 else head_dim**-0.5
