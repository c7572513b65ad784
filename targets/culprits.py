"""Which node a late failure is about: TVM reports it when the graph is Relax already, and does not say where.

The first nodes of the graph are compiled without the others, and their number is halved until one node makes the
difference: as one finds the change that broke a program.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from xopt.ir.outlining import reads
from xopt.targets.segments import is_tensor


def culprit(model: ir.Model, fails: Callable[[ir.Model], bool]) -> ir.Node:
    """The node with which a model does not compile, and without which those before it do.

    Args:
        model: canonical form, of at least one node, which does not compile; not changed.
        fails: whether a part of it does not, either. It is asked a number of times that grows with the logarithm of
            the number of nodes.
    """
    nodes = list(model.graph)
    good, bad = 0, len(nodes)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fails(_first(model, middle)):
            bad = middle
        else:
            good = middle
    return nodes[bad - 1]


def _first(model: ir.Model, count: int) -> ir.Model:
    """The model of the first nodes of a graph; what others read of them are its outputs."""
    part = model.clone()
    nodes = list(part.graph)
    read = {value for node in nodes[count:] for value in reads(node)}
    results = [value for node in nodes[:count] for value in node.outputs]
    ends = [value for value in results if is_tensor(value) and (value in read or value.is_graph_output())]
    part.graph.outputs.clear()
    part.graph.outputs.extend(ends)
    part.graph.remove(nodes[count:], safe=True)
    return part
