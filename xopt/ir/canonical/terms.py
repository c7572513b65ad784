"""What is done to scores between the product and the softmax: masks, in all the ways of writing one.

s + m, s - m, where(c, s, -inf), where(c, -1e9, s)      a term each
max(s + m, -3e38), clip(s + m, -3e38)                   a term max(m, -3e38): no row is hidden without a number
s * c + m, m very low wherever c is 0                   the term m alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import onnx_ir as ir

from xopt.ir.canonical.elements import BOOLEAN, Element, Reader
from xopt.ir.canonical.layout import Axes
from xopt.ir.canonical.masks import LOWEST, as_condition, numbers
from xopt.ir.canonical.operands import KEY, QUERY
from xopt.ir.canonical.report import NotAttentionError
from xopt.ir.edit import input_at, is_op, scalar
from xopt.ir.poly import ONE, Poly, product
from xopt.ir.quantized import PAIR
from xopt.ir.symbolic import Symbols

ABSORBS = -1e9
"""Added to a score, anything at or below this leaves nothing of it, in float32."""


@dataclass(frozen=True)
class PlacedTerm:
    """A mask on the scores where they had ``axes``; the rest as in ``masks.Term``. Where there is a ``floor``, what is
    lower counts as it.
    """

    kind: str
    value: ir.Value
    factor: float
    axes: Axes
    finite: bool = False
    floor: float | None = None


Floor: TypeAlias = tuple[float, float]
"""The lowest score that is left, and the factor that scores are multiplied by after that."""


def masked(symbols: Symbols, node: ir.Node, factor: float, axes: Axes) -> tuple[ir.Value, PlacedTerm | None]:
    """The scores under one mask, and the mask; None for one that is zeros.

    Raises:
        NotAttentionError: what is added or chosen is no mask of such scores.
    """
    if node.op_type in ("Add", "Sub"):
        for scores, mask in (node.inputs, node.inputs[::-1])[: 1 + (node.op_type == "Add")]:
            if scores is not None and mask is not None and product_behind(scores, BETWEEN) is not None:
                _check_broadcast(symbols, mask, axes)
                if number_of(symbols, mask) == 0 and _fits(symbols, mask, axes):
                    return scores, None
                return scores, PlacedTerm("add", mask, factor if node.op_type == "Add" else -factor, axes)
        raise NotAttentionError("no-product")
    condition, chosen, other = node.inputs
    assert condition is not None
    _check_broadcast(symbols, condition, axes)
    for fill, scores, kind in ((chosen, other, "drop"), (other, chosen, "keep")):
        number = number_of(symbols, fill)
        if number is not None and number * factor <= LOWEST and scores is not None and _fits(symbols, fill, axes):
            return scores, PlacedTerm(kind, condition, 1.0, axes, math.isfinite(number))
    raise NotAttentionError("where-without-fill")


def number_of(symbols: Symbols, value: ir.Value | None) -> float | None:
    """The number that all elements of a tensor are, where that is known."""
    rank = symbols.rank(value)
    if value is None or rank is None or scalar(value) is not None:
        return scalar(value)
    element = Reader(symbols, {}).element(value, tuple(Poly.of(f"@{place}") for place in range(rank)))
    return element.value if element.op == "number" else None


def cut_out(symbols: Symbols, node: ir.Node, axes: Axes, term: PlacedTerm) -> ir.Value | None:
    """``x`` of a Mul ``x * c``, where ``term`` was added to it: c is 0 where the term hides, or 1."""
    ranges = {f"@{place}": product(digit.count for digit in row) for place, row in enumerate(axes)}
    reader, at = Reader(symbols, ranges), tuple(Poly.of(name) for name in ranges)
    added = reader.broadcast(term.value, at) if term.kind == "add" and term.axes == axes else None
    hidden = as_condition(added, term.factor) if added is not None else None
    if added is None or hidden is None:
        return None
    for x, factor in (node.inputs, node.inputs[::-1]):
        shown = reader.broadcast(factor, at) if factor is not None else None
        if shown is not None and shown.op in BOOLEAN and shown == hidden:
            lowest = min(numbers(added), default=0.0) * abs(term.factor)
            if lowest <= ABSORBS or _is_causal(shown, axes):
                return x
    return None


def _is_causal(shown: Element, axes: Axes) -> bool:
    """Whether no query is left without keys: it sees those up to its own place."""
    places = [next((i for i, row in enumerate(axes) if [d.label for d in row] == [x]), None) for x in (QUERY, KEY)]
    if shown.op != "ge" or None in places or any(arg.op != "index" for arg in shown.args):
        return False
    query, key = (Poly.of(f"@{place}") for place in places)
    return shown.args[0].position - shown.args[1].position == query - key


def floor_of(symbols: Symbols, node: ir.Node, factor: float) -> tuple[ir.Value, Floor] | None:
    """What a Max or Clip raises to a number that hides, and that number; None where it does more."""
    source, number = node.inputs[0], number_of(symbols, input_at(node, 1))
    if len(node.inputs) > 2 and (node.op_type == "Max" or node.inputs[2] is not None):
        return None
    if node.op_type == "Max" and number is None:
        source, number = node.inputs[-1], number_of(symbols, node.inputs[0])
    if source is None or number is None or not math.isfinite(number) or number * factor > LOWEST:
        return None
    return source, (number, factor)


def raised(term: PlacedTerm, floor: Floor | None, others: list[PlacedTerm]) -> PlacedTerm:
    """A term that is met behind a floor.

    Raises:
        NotAttentionError: not only this one is added behind the floor.
    """
    if floor is None:
        return term
    if term.kind != "add":
        return replace(term, finite=True)
    if term.factor != floor[1] or any(other.floor is not None for other in others):
        raise NotAttentionError("scores-max")
    return replace(term, floor=floor[0])


def _check_broadcast(symbols: Symbols, mask: ir.Value, axes: Axes) -> None:
    dims = symbols.dims(mask)
    if dims is None or len(dims) > len(axes):
        raise NotAttentionError("mask-rank")


def _fits(symbols: Symbols, value: ir.Value | None, axes: Axes) -> bool:
    """Whether a tensor broadcasts over the scores, which stay of the same size."""
    dims = symbols.dims(value)
    sizes = [product(digit.count for digit in row) for row in axes]
    if dims is None or len(dims) > len(sizes):
        return False
    return all(dim in (ONE, size) for dim, size in zip(reversed(dims), reversed(sizes)))


ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Identity", "Tanh", "Where", "Max", "Clip")
MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", *PAIR)
BETWEEN = ELEMENTWISE + MOVING


def product_behind(value: ir.Value | None, ops: tuple[str, ...], depth: int = 12) -> ir.Node | None:
    """The product of two computed tensors that ``value`` is few steps of ``ops`` away from: what scores look like."""
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return None
    if is_op(node, "MatMul"):
        return node if all(operand is not None and operand.const_value is None for operand in node.inputs) else None
    if not is_op(node, *ops):
        return None
    sources = node.inputs[:1] if node.op_type in MOVING else node.inputs[node.op_type == "Where" :]
    found = (product_behind(source, ops, depth - 1) for source in sources)
    return next((product for product in found if product is not None), None)
