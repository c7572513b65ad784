"""How large a model may be: a small file can ask for a graph, or for an amount of work, that nobody has.

Each limit lies far beyond what trained transformers have (the largest exports: ten thousand nodes, two hundred
outputs, tensors of eight dimensions), and low enough that every step over the graph ends in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from xopt.errors import InputError

MOST_NODES = 20_000
"""Nodes, with those of subgraphs, once every local function is written out."""
MOST_OPERANDS = 2_048
"""Inputs, and outputs, of one node: tools detach them one by one, each time copying the rest."""
MOST_INPUTS = 4_096
MOST_OUTPUTS = 1_024
MOST_TENSORS = 100_000
MOST_OPSETS = 256
MOST_METADATA = 10_000
DEEPEST = 64
"""Subgraphs and called functions in each other."""
HIGHEST_RANK = 32


def check_bounds(proto: onnx.ModelProto) -> None:
    """Refuse a model that is larger than any limit of this module.

    Raises:
        InputError: ``E-FORMAT``.
    """
    _at_most(len(proto.opset_import), MOST_OPSETS, "sets of operators")
    _at_most(len(proto.metadata_props), MOST_METADATA, "entries of metadata")
    _at_most(len(proto.graph.output), MOST_OUTPUTS, "outputs")
    fed = {value.name for value in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer}
    _at_most(len(fed), MOST_INPUTS, "inputs")
    _Counter(proto).check()


def check_rank(rank: int, where: str) -> None:
    """Refuse a tensor of too many dimensions; InputError ``E-FORMAT``."""
    _at_most(rank, HIGHEST_RANK, "dimensions", where)


class _Counter:
    """Counts nodes and tensors of a model, functions as often as they are called, without following a call twice."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
        self._nodes: dict[tuple[str, str, str], int] = {}
        self._tensors = 0

    def check(self) -> None:
        nodes = self._in_graph(self._graph, 0)
        _at_most(nodes, MOST_NODES, "nodes once its functions are written out" if self._functions else "nodes")

    def _in_graph(self, graph: onnx.GraphProto, depth: int) -> int:
        self._tensors += len(graph.initializer)
        _at_most(self._tensors, MOST_TENSORS, "initializers")
        return self._in_nodes(graph.node, depth)

    def _in_nodes(self, nodes: Iterable[onnx.NodeProto], depth: int) -> int:
        _at_most(depth, DEEPEST, "subgraphs and functions in each other")
        count = 0
        for node in nodes:
            where = f"node {(node.name or node.op_type)[:100]!r}"
            _at_most(max(len(node.input), len(node.output)), MOST_OPERANDS, "operands", where)
            inner = (graph for attr in node.attribute for graph in ([attr.g] if attr.HasField("g") else attr.graphs))
            count += 1 + self._in_call(node, depth) + sum(self._in_graph(graph, depth + 1) for graph in inner)
        return count

    def _in_call(self, node: onnx.NodeProto, depth: int) -> int:
        """Nodes of the function that a node calls, if it calls one."""
        key = (node.domain, node.op_type, node.overload)
        if key not in self._functions:
            return 0
        if key not in self._nodes:
            self._nodes[key] = MOST_NODES  # what a function counts that calls itself
            self._nodes[key] = self._in_nodes(self._functions[key].node, depth + 1)
        return self._nodes[key]


def _at_most(count: int, most: int, what: str, where: str = "") -> None:
    if count > most:
        raise InputError(
            "E-FORMAT",
            f"{'it' if where else 'the model'} has {count} {what}, more than {most}",
            where=where,
            cure="check how the model was exported",
        )
