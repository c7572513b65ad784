"""GELU and SiLU from their parts.

    0.5 * x * (1 + erf(x / sqrt(2)))                                  ->  Gelu(x, approximate="none")
    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))      ->  Gelu(x, approximate="tanh")
    x * sigmoid(alpha * x)                                            ->  Swish(x, alpha); SiLU: 1, quick GELU: 1.702
Products are compared as products (a coefficient and powers of values), so the order of factors does not matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import (
    consumers,
    insert,
    operand,
    producer,
    remove_dead,
    replace,
    same_form,
    scalar,
    set_attributes,
    sweep,
)

TOLERANCE = 1e-3
"""Relative slack on the constants: exporters round them to float16 or to four digits (0.7979, 0.0447)."""

BFLOAT16_TOLERANCE = 2**-8
"""The same where they are bfloat16: two of them, each rounded to 2**-9 of itself."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Find activations by the node that makes them recognizable: Erf, Tanh, Sigmoid."""
    report.rewrote("gelu-attribute", sweep(model, ("Gelu",), _write_approximate))
    report.rewrote("gelu-erf", sweep(model, ("Erf",), _erf))
    report.rewrote("gelu-tanh", sweep(model, ("Tanh",), _tanh))
    report.rewrote("swish", sweep(model, ("Sigmoid",), _sigmoid))
    remove_dead(model)


def _write_approximate(node: ir.Node) -> bool:
    if "approximate" in node.attributes:
        return False
    set_attributes(node, approximate="none")
    return True


def _erf(node: ir.Node) -> bool:
    """``node`` is the Erf."""
    for x in _factors(operand(node, 0)):
        if _is_product(operand(node, 0), math.sqrt(0.5), {x: 1}):
            return _replace_gate(node, x, "none")
    return False


def _tanh(node: ir.Node) -> bool:
    """``node`` is the Tanh; its operand is a cubic in x, with x taken out or not."""
    for factor in _factors(operand(node, 0)):
        x = _cubic(operand(node, 0), factor)
        if x is not None:
            return _replace_gate(node, x, "tanh")
    return False


def _cubic(value: ir.Value, factor: ir.Value) -> ir.Value | None:
    """x, if ``value`` is ``k * (x + c * x ** 3)`` or ``k * x * (1 + c * x ** 2)``; ``factor`` is the sum."""
    total = producer(factor, "Add")
    if total is None:
        return None
    k, c = math.sqrt(2 / math.pi), 0.044715
    left, right = operand(total, 0), operand(total, 1)
    if _is_product(value, k, {factor: 1}):
        for x, cube in ((left, right), (right, left)):
            if _is_product(cube, c, {x: 3}):
                return x
    for one, square in ((left, right), (right, left)):
        if scalar(one) == 1.0:
            for x in _factors(square):
                if _is_product(square, c, {x: 2}) and _is_product(value, k, {factor: 1, x: 1}):
                    return x
    return None


def _sigmoid(node: ir.Node) -> bool:
    """``node`` is the Sigmoid of ``alpha * x``; one of the readers multiplies by x."""
    source, gate = operand(node, 0), node.outputs[0]
    candidates = [(source, 1.0)]
    scale = producer(source, "Mul")
    if scale is not None and scalar(operand(scale, 1)) is not None:
        candidates.append((operand(scale, 0), scalar(operand(scale, 1)) or 0.0))
    found = False
    for x, alpha in candidates:
        for user in consumers(gate, "Mul"):
            if {operand(user, 0), operand(user, 1)} == {gate, x} and same_form(user.outputs[0], x):
                found |= replace(user.outputs[0], insert(user, "Swish", [x], {"alpha": alpha}, shape=x.shape))
    return found


def _replace_gate(node: ir.Node, x: ir.Value, approximate: str) -> bool:
    """Find ``0.5 * x * (1 + node)`` among the products that ``1 + node`` flows into, and replace the whole."""
    found = False
    for total in consumers(node.outputs[0], "Add"):
        if scalar(operand(total, 1)) != 1.0:
            continue
        gate = total.outputs[0]
        for whole in _products_over(gate):
            if _is_product(whole, 0.5, {x: 1, gate: 1}) and same_form(whole, x):
                site = whole.producer()
                assert site is not None
                result = insert(site, "Gelu", [x], {"approximate": approximate}, shape=x.shape)
                found |= replace(whole, result)
                break
    return found


def _products_over(value: ir.Value, depth: int = 3) -> list[ir.Value]:
    """Products that ``value`` is a factor of, innermost first."""
    found: list[ir.Value] = []
    frontier = [value]
    for _ in range(depth):
        frontier = [user.outputs[0] for v in frontier for user in consumers(v, "Mul", "Div")]
        found += frontier
    return found


def _factors(value: ir.Value) -> list[ir.Value]:
    """Values that occur in the product ``value`` (itself included), its innermost factors last."""
    found, frontier = [value], [value]
    while frontier:
        node = producer(frontier.pop(), "Mul", "Div", "Pow")
        if node is not None and len(found) < 16:
            parts = [v for v in (operand(node, 0), operand(node, 1)) if v.const_value is None]
            found += parts
            frontier += parts
    return found


def _is_product(value: ir.Value, coefficient: float, powers: dict[ir.Value, int]) -> bool:
    """Whether ``value`` is ``coefficient`` times the given powers."""
    k, found = _expand(value, powers)
    slack = BFLOAT16_TOLERANCE if value.dtype == ir.DataType.BFLOAT16 else TOLERANCE
    return found == Counter(powers) and math.isclose(k, coefficient, rel_tol=slack)


def _expand(value: ir.Value, leaves: Collection[ir.Value], depth: int = 8) -> tuple[float, Counter[ir.Value]]:
    """``value`` as a coefficient times powers of values; what is in ``leaves`` is not looked into."""
    number = scalar(value)
    if number is not None:
        return number, Counter()
    node = producer(value, "Mul", "Div", "Pow") if value not in leaves and depth else None
    if node is None:
        return 1.0, Counter([value])
    left, right = operand(node, 0), operand(node, 1)
    if node.op_type == "Mul":
        (a, p), (b, q) = _expand(left, leaves, depth - 1), _expand(right, leaves, depth - 1)
        return a * b, p + q
    number = scalar(right)
    k, p = _expand(left, leaves, depth - 1)
    if node.op_type == "Div" and number:
        return k / number, p
    if node.op_type == "Pow" and number in (1.0, 2.0, 3.0):
        return k ** int(number), Counter({v: n * int(number) for v, n in p.items()})
    return 1.0, Counter([value])
