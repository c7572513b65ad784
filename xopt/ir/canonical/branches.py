"""A branch that is always taken is part of the graph around it.

    y = If(True) { then: z = Squeeze(x, 1) } { else: ... }     ->   y = Squeeze(x, 1)
Exporters write an If for what a size decides (a squeeze of an axis that may be 1): it goes once the size is known, and
what it held is seen by all later steps.
"""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import constant, input_at, is_op, remove_dead, replace_uses, unique_name


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Put the branch of every If whose condition is a constant in its place, those inside of it as well."""
    while decided := [node for node in model.graph.all_nodes() if _taken(node) is not None]:
        for node in decided:
            branch = _taken(node)
            if branch is not None and node.graph is not None:
                _put_in_place(node, branch)
        report.rewrote("if", len(decided))
    remove_dead(model)


def _taken(node: ir.Node) -> ir.Graph | None:
    """The branch that an If takes whatever its inputs are; None where that is not known, or nothing reads it."""
    condition = constant(input_at(node, 0)) if is_op(node, "If") else None
    read = any(value.uses() or value.is_graph_output() for value in node.outputs)
    if condition is None or condition.size != 1 or not read or not isinstance(node.graph, ir.Graph):
        return None
    branch = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"].as_graph()
    inside = {value for inner in branch for value in inner.outputs}
    return branch if inside.issuperset(branch.outputs) else None


def _put_in_place(node: ir.Node, branch: ir.Graph) -> None:
    graph, results = node.graph, list(branch.outputs)
    assert isinstance(graph, ir.Graph)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        del branch.initializers[value.name or ""]
        value.name = unique_name(graph, f"{node.name}/{value.name}")
        graph.initializers[value.name] = value
    for inner in list(branch):
        branch.remove(inner)
        for value in inner.outputs:
            value.name = unique_name(graph, f"{node.name}/{value.name}")
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, results):
        replace_uses(old, new)
    graph.remove(node, safe=True)
