"""A branch that is always taken is part of the graph around it.

    y = If(True) { then: z = Squeeze(x, 1) } { else: ... }     ->   y = Squeeze(x, 1)
Exporters write an If for what a size decides (a squeeze of an axis that may be 1): it goes once the size is known, and
what it held is seen by all later steps. Where the size is not known, what reads the result may tell: a Concat takes
tensors of one rank, and only one branch may have it.

Where one branch gives a scalar and the other a vector of one number, which every reader broadcasts to a larger rank
anyway, the scalar becomes a vector: a value that is computed has one rank.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import constant, consumers, initializer, input_at, is_op, remove_dead, replace_uses, unique_name
from xopt.ir.shape_rules import BROADCASTING

KEEPS = ("Identity", "Cast", "Relu", "Gelu", "Tanh", "Sigmoid", "Neg", "Softmax", "Dropout")
"""What has the rank of its operand."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Put the branch of every If whose condition is a constant in its place, those inside of it as well."""
    while decided := [node for node in model.graph.all_nodes() if _chosen(node) is not None]:
        for node in decided:
            branch = _chosen(node)
            if branch is not None and node.graph is not None:
                _put_in_place(node, branch)
        report.rewrote("if", len(decided))
    undecided = [node for node in model.graph.all_nodes() if node.op_type == "If" and not node.domain]
    report.rewrote("scalar-branch", sum(_one_rank(node) for node in undecided))
    remove_dead(model)


def _chosen(node: ir.Node) -> ir.Graph | None:
    """The branch that an If certainly takes; None for other nodes, and where that is not known."""
    if node.op_type != "If" or node.domain:
        return None
    return _taken(node) or _fitting(node)


def _taken(node: ir.Node) -> ir.Graph | None:
    """The branch of an If whose condition is a constant; None where it is not, or nothing reads the result."""
    condition = constant(input_at(node, 0))
    read = any(value.uses() or value.is_graph_output() for value in node.outputs)
    if condition is None or condition.size != 1 or not read or not isinstance(node.graph, ir.Graph):
        return None
    branch = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"].as_graph()
    inside = {value for inner in branch for value in inner.outputs}
    return branch if inside.issuperset(branch.outputs) else None


def _fitting(node: ir.Node) -> ir.Graph | None:
    """The branch of an If whose result alone has the rank that a reader asks for; None where both have, or neither."""
    if len(node.outputs) != 1 or not isinstance(node.graph, ir.Graph):
        return None
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    if not all(len(branch.outputs) == 1 and branch.outputs[0].producer() in list(branch) for branch in branches):
        return None
    ranks, asked = [_rank(branch.outputs[0]) for branch in branches], _asked(node.outputs[0])
    if None in ranks or ranks[0] == ranks[1] or asked not in ranks:
        return None
    return branches[ranks.index(asked)]


def _asked(value: ir.Value) -> int | None:
    """The rank that a reader of ``value`` demands, also past what keeps it; None where none does."""
    pending = [value]
    while pending:
        read = pending.pop()
        for reader in consumers(read):
            if reader.graph is not value.graph:
                continue  # inside a branch or loop that may not run
            if is_op(reader, *KEEPS):
                pending.append(reader.outputs[0])
            elif (rank := _demanded(reader, read)) is not None:
                return rank
    return None


def _demanded(reader: ir.Node, value: ir.Value) -> int | None:
    """The rank that one reader of ``value`` takes alone."""
    if is_op(reader, "Concat"):
        return next((rank for other in reader.inputs if other is not value and (rank := _rank(other))), None)
    if is_op(reader, "Transpose"):
        return len(reader.attributes["perm"].as_ints()) if "perm" in reader.attributes else None
    if is_op(reader, "Conv") and reader.inputs[0] is value:
        return _rank(reader.inputs[1])
    return 2 if is_op(reader, "Gemm") and reader.inputs[0] is value else None


def _one_rank(node: ir.Node) -> int:
    """Make a vector of each scalar result of one branch whose reader cannot tell it from the other branch's vector."""
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    changed = 0
    for place, result in enumerate(node.outputs):
        values = [branch.outputs[place] for branch in branches]
        ranks = [_rank(value) for value in values]
        if {*ranks} != {0, 1} or not _is_broadcast(result):
            continue
        side = ranks.index(0)
        if list(values[1 - side].shape or ()) == [1]:
            branches[side].outputs[place] = _vector(branches[side], values[side])
            result.shape = ir.Shape([1])
            changed += 1
    return changed


def _is_broadcast(value: ir.Value) -> bool:
    """Whether each reader broadcasts the value with something that has axes."""
    return not value.is_graph_output() and all(
        is_op(reader, *BROADCASTING) and any(_rank(other) for other in reader.inputs if other is not value)
        for reader in consumers(value)
    )


def _vector(graph: ir.Graph, scalar: ir.Value) -> ir.Value:
    shape = initializer(graph, f"{scalar.name}/one", np.array([1], np.int64))
    node = ir.node("Reshape", [scalar, shape], name=unique_name(graph, f"{scalar.name}/vector"))
    node.outputs[0].name = node.name
    node.outputs[0].type, node.outputs[0].shape = scalar.type, ir.Shape([1])
    graph.append(node)
    return node.outputs[0]


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


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
