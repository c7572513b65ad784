"""The QDQ form: a value that is stored in 8 bits stands in the graph as what a DequantizeLinear makes of it.

    weight       W int8 [K, N] ─▶ DequantizeLinear(scale [N], axis=1) ─▶ MatMul
    activation   x ─▶ QuantizeLinear(scale, zero) ─▶ DequantizeLinear(scale, zero) ─▶ MatMul

The functions here see through it in both directions; where there is nothing to see through, they give back their
argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir import edit, walk


@dataclass(frozen=True)
class Grid:
    """How integers stand for numbers: ``(integer - zero) * scale``, per tensor or per slice along ``axis``.

    Attributes:
        scale: initializer, one number or a vector.
        zero: initializer in the integers' type, shaped like scale; None for 0.
        axis: which axis of the tensor a vector belongs to.
    """

    scale: ir.Value
    zero: ir.Value | None
    axis: int

    @property
    def vector(self) -> bool:
        """Whether there is one scale for each slice."""
        return len(walk.shape_of(self.scale) or ()) == 1

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The initializers."""
        return (self.scale,) if self.zero is None else (self.scale, self.zero)


def grid_of(node: ir.Node, rank: int) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear of a tensor of this rank.

    None where it is computed, or in blocks.
    """
    scale, zero = edit.operand(node, 1), edit.input_at(node, 2)
    constant = walk.is_weight(scale) and (zero is None or walk.is_weight(zero))
    if not constant or walk.int_attribute(node, "block_size", 0) or len(walk.shape_of(scale) or ()) > 1:
        return None
    return Grid(scale, zero, walk.int_attribute(node, "axis", 1) % max(rank, 1))


def weight_dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value`` from an initializer by a constant grid."""
    node = edit.producer(value, "DequantizeLinear")
    if node is None or not walk.is_weight(node.inputs[0]):
        return None
    return node if grid_of(node, len(walk.shape_of(node.inputs[0]) or ())) is not None else None


def stored_matrix(value: ir.Value | None) -> ir.Value | None:
    """The initializer of rank 2 that ``value`` is, or is dequantized from."""
    node = weight_dequantizer(value)
    stored = node.inputs[0] if node is not None else value
    return stored if walk.is_weight(stored, rank=2) else None


def before(value: ir.Value) -> ir.Value:
    """The value that was quantized and dequantized to ``value``."""
    inner = edit.producer(value, "DequantizeLinear")
    quantizer = edit.producer(inner.inputs[0], "QuantizeLinear") if inner is not None else None
    return edit.operand(quantizer, 0) if quantizer is not None else value


def after(value: ir.Value) -> ir.Value:
    """What a pair of QuantizeLinear and DequantizeLinear makes of ``value``, if nothing else reads it."""
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        readers = edit.consumers(value)
        if len(readers) != 1 or not edit.is_op(readers[0], op_type) or value.is_graph_output():
            return value if op_type == "QuantizeLinear" else edit.operand(_producer(value), 0)
        value = readers[0].outputs[0]
    return value


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def transposed(site: ir.Node, value: ir.Value) -> ir.Value | None:
    """A dequantized weight [N, K] as one of [K, N], inserted before ``site``; None where ``value`` is none."""
    node = weight_dequantizer(value)
    stored = stored_matrix(value)
    graph = site.graph
    if node is None or stored is None or stored.const_value is None or not isinstance(graph, ir.Graph):
        return None
    array = np.ascontiguousarray(stored.const_value.numpy().T)
    turned = edit.initializer(graph, f"{stored.name}_t", ir.tensor(array, dtype=stored.dtype))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes["axis"] = 1 - walk.int_attribute(node, "axis", 1) % 2
    inputs = [turned, *node.inputs[1:]]
    return edit.insert(site, "DequantizeLinear", inputs, attributes, dtype=value.dtype, shape=array.shape)
