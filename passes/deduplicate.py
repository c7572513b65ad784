"""Deduplicate: store equal weights once, and compute equal expressions once.

    before   a = MatMul(x, w1); b = MatMul(x, w2)    with w1 == w2 bit for bit
    after    a = MatMul(x, w1); b = a

Refuses  "layer-parameter": equal floating-point vectors (biases, norm scales) of two layers are equal by chance, mostly
         because they are all zero; sharing them saves nothing and ties the widths of the layers together for pruning.
         "graph-output": an output of the model keeps its own node.
Source   value numbering; identity is bitwise, so -0.0 is not 0.0 and a NaN equals itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_SCALAR_ATTRIBUTES = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING)
_LIST_ATTRIBUTES = (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS)


@dataclass(frozen=True)
class Deduplicate(Pass):
    """Share equal initializers and equal computations."""

    name: ClassVar[str] = "deduplicate"
    effect: ClassVar[Effect] = Effect.EXACT

    vectors: bool = False
    """Also share floating-point vectors."""

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        saved = 0
        for value, original in _equal_initializers(model.graph):
            if report.accepts(value, None if self.vectors else _belongs_to_a_layer(value)):
                saved += value.const_value.nbytes if value.const_value is not None else 0
                value.replace_all_uses_with(original)
                model.graph.initializers.pop(value.name or "")
                report.rewrote(value)
        report.numbers = {"initializers": report.rewritten, "bytes": saved}
        report.numbers["nodes"] = _share_computations(model.graph, report)
        return report


def _equal_initializers(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Pairs (duplicate, first of its kind) of private initializers with the same bytes."""
    first: dict[Hashable, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output() or tensor.dtype == ir.DataType.STRING:
            continue
        digest = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data).digest()
        original = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), digest), value)
        if original is not value:
            yield value, original


def _belongs_to_a_layer(value: ir.Value) -> str | None:
    floating = value.dtype is not None and value.dtype.is_floating_point()
    vector = value.shape is not None and len(value.shape) == 1 and value.shape[0] != 1
    return "layer-parameter" if floating and vector else None


def _share_computations(graph: ir.Graph, report: PassReport) -> int:
    """Let readers of a repeated node read the first one; returns how many nodes went."""
    first: dict[Hashable, ir.Node] = {}
    removed = 0
    for node in list(graph):
        key = _identity(node)
        original = first.setdefault(key, node) if key is not None else node
        if original is node:
            continue
        is_output = any(value.is_graph_output() for value in node.outputs)
        if report.accepts(node, "graph-output" if is_output else None):
            for old, new in zip(node.outputs, original.outputs, strict=True):
                old.replace_all_uses_with(new)
            graph.remove(node, safe=True)
            report.rewrote(node)
            removed += 1
    return removed


def _identity(node: ir.Node) -> Hashable:
    """What two nodes must share to compute the same; None for a node that is not to be shared."""
    if node.op_type in _RANDOM and not node.domain:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in _SCALAR_ATTRIBUTES:
            attributes.append((name, attribute.value))
        elif attribute.type in _LIST_ATTRIBUTES:
            attributes.append((name, tuple(attribute.value)))
        else:
            return None
    return (node.op_identifier(), tuple(map(id, node.inputs)), len(node.outputs), tuple(attributes))
