"""The graph run over calibration samples node by node, so that values can be read and replaced on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
from torch import Tensor, fx

from xopt.ir.fx import run_node


class Replay:
    """The graph in execution over all batches at once, one node after the other.

    A value lives until its last reader has run.
    """

    def __init__(self, gm: fx.GraphModule, feeds: Sequence[Mapping[str, Tensor]]) -> None:
        self._gm = gm
        self._interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        self._nodes: Iterator[fx.Node] = iter(gm.graph.nodes)
        self._pending: fx.Node | None = next(self._nodes)
        self._named = {node.name: node for node in gm.graph.nodes}
        self._given: dict[fx.Node, list[Tensor]] = {}
        self._readers = {node: len(node.users) for node in gm.graph.nodes}
        self._inputs = {target: name for name, target in gm.meta["inputs"].items()}
        self._feeds = feeds
        self._values: list[dict[fx.Node, Tensor]] = [{} for _ in feeds]

    def node(self, value: ir.Value) -> fx.Node:
        """The fx node that makes a value of the main graph."""
        return self._named[self._gm.meta["values"][value.name]]

    def advance(self, to: ir.Value) -> None:
        """Run everything that comes before the node that makes ``to``."""
        stop = self.node(to)
        while self._pending is not None and self._pending is not stop and self._pending.op != "output":
            self._run(self._pending)
            self._pending = next(self._nodes, None)

    def complete(self, value: ir.Value) -> None:
        """Run everything up to the node that makes ``value``, that node too."""
        self.advance(value)
        if self._pending is self.node(value):
            self._run(self._pending)
            self._pending = next(self._nodes, None)

    def values(self, of: ir.Value) -> list[Tensor] | None:
        """A value in each batch; None where it is not computed yet."""
        node = self.node(of)
        found = [values[node] for values in self._values if node in values]
        return found if len(found) == len(self._values) else None

    def give(self, to: ir.Value, values: list[Tensor]) -> None:
        """Let ``to`` be these values, instead of what its node would compute."""
        self._given[self.node(to)] = values

    def _run(self, node: fx.Node) -> None:
        for index, values in enumerate(self._values):
            if node in self._given:
                values[node] = self._given[node][index]
            elif node.op == "placeholder":
                values[node] = self._feeds[index][self._inputs[str(node.target)]]
            else:
                self._interpreter.env = values
                values[node] = run_node(self._interpreter, node)
        self._given.pop(node, None)
        for source in node.all_input_nodes:
            self._readers[source] -= 1
            if not self._readers[source]:
                for values in self._values:
                    values.pop(source, None)
