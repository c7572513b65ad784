"""Operators of onnxruntime's own domain, ``com.microsoft``, as standard ones.

    before   y = com.microsoft::BiasGelu(x, b)          after   y = Gelu(Add(x, b))
A rule is a function of a :class:`~xopt.ir.canonical.contrib.site.Site` in the module of its family, which writes the
operators and gives back what the outputs are. What the node carries beyond that is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TypeAlias

import onnx_ir as ir

from xopt.ir import walk
from xopt.ir.canonical.contrib.site import Site, Unknown, refused
from xopt.ir.canonical.contrib.typed import Typed
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.contrib import DOMAIN
from xopt.ir.edit import names_remembered, remove_dead, replace_uses
from xopt.ir.shapes import infer_shapes

Rule: TypeAlias = Callable[[Site], Sequence[ir.Value | None]]
FAMILIES = (
    "activations", "attention", "blocks", "experts", "grouped", "norms", "positions", "products", "quantized", "rotary",
    "shapes", "spectrum", "streams",
)  # fmt: skip


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Rewrite every node of ``com.microsoft``, in the order of the graph; again while that makes more shapes known.

    Raises:
        InputError: ``E-UNSUPPORTED-OP``: a node carries something that its rule does not read, or its rule needs to
            know more of its operands.
    """
    while left := sum(_foreign(node) for node in model.graph.all_nodes()):
        infer_shapes(model)
        with names_remembered():
            unknown = _Sweep(model.graph, report).run()
        remove_dead(model)
        if unknown and sum(_foreign(node) for node in model.graph.all_nodes()) == left:
            raise refused(unknown[0].node, str(unknown[0]))
    model.opset_imports.pop(DOMAIN, None)


def _foreign(node: ir.Node) -> bool:
    return node.domain == DOMAIN


class _Sweep:
    """One pass over a graph, which learns shapes and types of what it writes as it goes."""

    def __init__(self, graph: ir.Graph, report: CanonicalizeReport) -> None:
        self._graph, self._report, self._unknown = graph, report, list[Unknown]()
        self._typed = Typed(graph)
        self._rules = rules()

    def run(self) -> list[Unknown]:
        """Rewrite what can be; gives back what more would have to be known of the rest."""
        self._walk(self._graph)
        return self._unknown

    def _walk(self, graph: ir.Graph) -> None:
        for node in list(graph):
            for inner in walk.graphs(node):
                self._walk(inner)
            if _foreign(node):
                self._rewrite(node)
            else:
                self._typed.visit(node)

    def _rewrite(self, node: ir.Node) -> None:
        rule = self._rules.get(node.op_type)
        if rule is None:
            raise refused(node, "it has no counterpart among the standard operators")
        site = Site(node, self._typed)
        try:
            results = rule(site)
        except Unknown as reason:
            self._unknown.append(reason)
            return
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of a graph that contradicts itself
            raise refused(node, "its operands are not what it takes") from error
        site.require_read(results)
        for old, new in zip(node.outputs, results):
            if new is not None and (old.uses() or old.is_graph_output()):
                replace_uses(old, new)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
        self._report.rewrote(f"contrib-{node.op_type}")


def rules() -> dict[str, Rule]:
    """The rule of each operator."""
    found: dict[str, Rule] = {}
    for family in FAMILIES:
        found |= import_module(f"{__name__}.{family}").RULES
    return found
