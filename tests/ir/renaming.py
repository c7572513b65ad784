"""A model under other names: every name that a file can choose goes through a function, what is computed stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
import onnx_ir as ir

STANDARD = ("", "ai.onnx", "xopt")
"""Domains whose operators have a meaning by their names."""


class Renaming:
    """New names by kind ("value", "node", "axis", "graph", "function", "domain", "attribute") and old name.

    Args:
        choose: makes the new name of a kind and an old name; it is asked once for each, and must not give one name
            to two values, axes, functions or attributes.
    """

    def __init__(self, choose: Callable[[str, str], str]) -> None:
        self._choose = choose
        self._known: dict[tuple[str, str], str] = {}

    def __call__(self, kind: str, name: str) -> str:
        """The new name; no name stays none."""
        if not name:
            return name
        if (kind, name) not in self._known:
            self._known[kind, name] = self._choose(kind, name)
        return self._known[kind, name]

    def model(self, model: ir.Model) -> ir.Model:
        """``model`` under the new names, as it would be read from a file."""
        proto = ir.to_proto(model)
        for function in proto.functions:
            if function.domain not in STANDARD:
                self._function(function)
        for opset in proto.opset_import:
            if opset.domain not in STANDARD:
                opset.domain = self("domain", opset.domain)
        self._graph(proto.graph)
        return ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))

    def _graph(self, graph: onnx.GraphProto) -> None:
        graph.name = self("graph", graph.name)
        for value in [*graph.input, *graph.output, *graph.value_info]:
            value.name = self("value", value.name)
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = self("axis", dim.dim_param)
        for tensor in graph.initializer:
            tensor.name = self("value", tensor.name)
        self._nodes(graph.node)

    def _nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            node.name = self("node", node.name)
            node.input[:] = [self("value", name) for name in node.input]
            node.output[:] = [self("value", name) for name in node.output]
            own = node.domain not in STANDARD
            if own:
                node.op_type = self("function", f"{node.domain}::{node.op_type}")
                node.domain = self("domain", node.domain)
            for attribute in node.attribute:
                attribute.name = self("attribute", attribute.name) if own else attribute.name
                attribute.ref_attr_name = self("attribute", attribute.ref_attr_name)
                for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                    self._graph(inner)

    def _function(self, function: onnx.FunctionProto) -> None:
        function.name = self("function", f"{function.domain}::{function.name}")
        function.domain = self("domain", function.domain)
        function.input[:] = [self("value", name) for name in function.input]
        function.output[:] = [self("value", name) for name in function.output]
        function.attribute[:] = [self("attribute", name) for name in function.attribute]
        for attribute in function.attribute_proto:
            attribute.name = self("attribute", attribute.name)
        for opset in function.opset_import:
            if opset.domain not in STANDARD:
                opset.domain = self("domain", opset.domain)
        self._nodes(function.node)
