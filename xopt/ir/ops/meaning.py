"""Whether a function of a file is the operator of ours that it is called: its body says, and not its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from xopt.ir.ops import DOMAIN, FUNCTIONS


def is_own(function: ir.Function) -> bool:
    """Whether ``function`` is an xopt operator with the body that xopt gives it, under whatever names inside.

    Passes and kernels go by the name of an operator. Another body under that name is a function like any other.
    """
    if function.domain != DOMAIN or function.name not in FUNCTIONS:
        return False
    return _Form().function(function) == _Form().function(FUNCTIONS[function.name])


class _Form:
    """A body with its values numbered in the order in which they occur, in place of their names."""

    def __init__(self) -> None:
        self._numbers: dict[ir.Value | None, int] = {None: -1}

    def function(self, function: ir.Function) -> tuple[Any, ...]:
        declared = function.attributes.items()
        defaults = sorted((name, self._attribute(one)[1:] if one.value is not None else ()) for name, one in declared)
        return (self._values(function.inputs), self._nodes(function), self._values(function.outputs), defaults)

    def _values(self, values: Iterable[ir.Value | None]) -> tuple[int, ...]:
        return tuple(self._numbers.setdefault(value, len(self._numbers)) for value in values)

    def _nodes(self, nodes: Iterable[ir.Node]) -> tuple[Any, ...]:
        return tuple(self._node(node) for node in nodes)

    def _node(self, node: ir.Node) -> tuple[Any, ...]:
        attributes = tuple((name, self._attribute(node.attributes[name])) for name in sorted(node.attributes))
        domain = "" if node.domain == "ai.onnx" else node.domain
        return (domain, node.op_type, node.overload, self._values(node.inputs), attributes, self._values(node.outputs))

    def _attribute(self, attribute: ir.Attr) -> tuple[Any, ...]:
        if attribute.is_ref():
            return (attribute.type, attribute.ref_attr_name)
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            return (attribute.type, tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if attribute.type == ir.AttributeType.GRAPH:
            graph = attribute.as_graph()
            held = tuple(
                (self._values([value]), value.const_value and value.const_value.tobytes())
                for value in graph.initializers.values()
            )
            return (attribute.type, self._values(graph.inputs), held, self._nodes(graph), self._values(graph.outputs))
        return (attribute.type, ir.to_proto(attribute).SerializeToString(deterministic=True))
