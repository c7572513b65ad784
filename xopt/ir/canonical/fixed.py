"""Axes that the graph itself fixes, or makes equal, written into the shapes of the inputs.

    x [seq, batch, 8] -> Reshape(x, [5, 2 * batch, 4])         ->   x [5, batch, 8]
    Concat(past [pasts, 4, p, 8], key [batch, 4, s, 8], -2)    ->   past [batch, 4, p, 8]
An exporter that traced one length may have left it in a target while the axis keeps its name: such a file runs with
that length and no other. And where a user named the axes of each input apart, no run has different sizes of what an
operator takes for one.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from xopt.ir.canonical.relations import certain, solution
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.poly import Poly
from xopt.ir.shapes import symbolic_dims
from xopt.ir.symbolic import Symbols

MOST_ROUNDS = 8
"""How often what was learnt is looked at again for more."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Fix the named axes of the inputs that only one size fits, and call those alike that are equal."""
    for _ in range(MOST_ROUNDS):
        sizes = _fixed(model)
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


def _fixed(model: ir.Model) -> dict[str, int | str]:
    """By the names of axes: their sizes, where there is one that makes the graph possible, or the axis they equal."""
    names = {next(iter(Poly.axis(name).symbols)): name for name in symbolic_dims(model)}
    solved = dict[str, Poly]()
    for relation in certain(model.graph, Symbols(model.graph)) if names else ():
        found = solution(relation, list(names), solved)
        if found is not None and all((size.constant or 0) > 0 or size.is_symbol for size in found.values()):
            solved = {symbol: size.replaced(found) for symbol, size in solved.items()} | found
    return {
        names[symbol]: names[next(iter(size.symbols))] if size.constant is None else size.constant
        for symbol, size in solved.items()
    }
