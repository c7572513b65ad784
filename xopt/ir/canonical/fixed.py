"""Axes that the graph itself fixes, written into the shapes of the inputs.

    x [seq, batch, 8] -> Reshape(x, [5, 2 * batch, 4])         ->   x [5, batch, 8]
An exporter that traced one length may have left it in a target while the axis keeps its name: such a file runs with
that length and no other. Sizes of a Reshape whose target says all of them hold as many elements as it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import is_op
from xopt.ir.poly import Poly, product
from xopt.ir.shape_rules import integer
from xopt.ir.shapes import symbolic_dims
from xopt.ir.symbolic import Symbols

MOST_ROUNDS = 8
"""How often what was learnt is looked at again for more."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Fix the named axes of the inputs that only one size fits."""
    for _ in range(MOST_ROUNDS):
        names = {Poly.axis(name): name for name in symbolic_dims(model)}
        sizes = _fixed(model.graph, names) if names else {}
        if not sizes:
            return
        for value in _values(model):
            if value.shape is not None:
                dims = list(value.shape)
                value.shape = ir.Shape(
                    [sizes.get(d.value or "", d) if isinstance(d, ir.SymbolicDim) else d for d in dims]
                )
        report.rewrote("fixed-axis", len(sizes))


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _fixed(graph: ir.Graph, names: dict[Poly, str]) -> dict[str, int]:
    """The sizes of axes of which only one makes the Reshapes of the graph possible, by the names of the axes."""
    symbols, found = Symbols(graph), dict[str, int]()
    for node in graph:
        if not is_op(node, "Reshape"):
            continue
        dims, target = symbols.dims(node.inputs[0]), symbols.numbers(node.inputs[1])
        written = target is not None and not any((size.constant or 0) < 1 for size in target if not size.symbols)
        if dims is None or target is None or not written or integer(node, "allowzero", 0):
            continue
        solved = _solved(product(dims), product(target))
        if solved is not None and solved[0] in names:
            found.setdefault(names[solved[0]], solved[1])
    return found


def _solved(one: Poly, other: Poly) -> tuple[Poly, int] | None:
    """The symbol, and the number that it is, when two products are equal, but for factors that both have."""
    if len(one.terms) != 1 or len(other.terms) != 1:
        return None
    (left, by_left), (right, by_right) = one.terms[0], other.terms[0]
    more, less = Counter(left) - Counter(right), Counter(right) - Counter(left)
    if more and not less:
        number, rest, sides = by_right, by_left, more
    elif less and not more:
        number, rest, sides = by_left, by_right, less
    else:
        return None
    names = list(sides.elements())
    return (Poly.of(names[0]), number // rest) if len(names) == 1 and number % rest == 0 and number >= rest else None
