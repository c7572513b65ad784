"""The QDQ form: a value that is stored in 8 bits stands in the graph as what a DequantizeLinear makes of it.

    weight       W int8 [K, N] ─▶ DequantizeLinear(scale [N], axis=1) ─▶ MatMul
    activation   x ─▶ QuantizeLinear(scale, zero) ─▶ DequantizeLinear(scale, zero) ─▶ MatMul

The functions here see through it in both directions; where there is nothing to see through, they give back their
argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir import edit, walk
from xopt.ir.schema import unread

PAIR = ("QuantizeLinear", "DequantizeLinear")


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


def is_grid(value: ir.Value) -> bool:
    """Whether a value is nothing but scales or zero points."""
    uses = value.uses()
    return bool(uses) and all(use.idx > 0 and edit.is_op(use.node, *PAIR) for use in uses)


def rounds_alike(node: ir.Node) -> bool:
    """Whether a node quantizes or dequantizes all elements of a tensor by one constant grid."""
    if not edit.is_op(node, *PAIR) or not all(given is None or walk.is_weight(given) for given in node.inputs[1:]):
        return False
    return walk.shape_of(edit.operand(node, 1)) in ((), (1,))


def rounded_alike(site: ir.Node, node: ir.Node, value: ir.Value, *, signed: bool = False) -> ir.Value:
    """What a node that rounds all elements alike makes of another ``value``, written before ``site``.

    Args:
        signed: whether uint8 is to be int8, 128 less, which stands for the same numbers.
    """
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs, dtype = [value, *node.inputs[1:]], node.outputs[0].dtype
    zero = edit.constant(edit.input_at(node, 2))
    if signed and zero is not None and zero.dtype == np.uint8:
        assert isinstance(site.graph, ir.Graph)
        inputs[2] = edit.initializer(site.graph, f"{site.name}/zero", (zero.astype(np.int16) - 128).astype(np.int8))
        dtype = ir.DataType.INT8 if dtype == ir.DataType.UINT8 else dtype
    return edit.insert(site, node.op_type, inputs, attributes, dtype=dtype, shape=value.shape)


def weight_dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value`` from an initializer by constant scales: one, a vector, or of blocks."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain or not set(unread(node)) <= {"block_size"}:
        return None
    return node if all(given is None or walk.is_weight(given) for given in node.inputs) else None


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
    reached = value
    for op_type in PAIR:
        readers = edit.consumers(reached)
        if len(readers) != 1 or not edit.is_op(readers[0], op_type) or reached.is_graph_output():
            return value
        reached = readers[0].outputs[0]
    return reached


def transposed(site: ir.Node, value: ir.Value) -> ir.Value | None:
    """A dequantized weight [N, K] as one of [K, N], inserted before ``site``; None where ``value`` is none."""
    node = weight_dequantizer(value)
    stored = stored_matrix(value)
    graph = site.graph
    if node is None or stored is None or not isinstance(graph, ir.Graph):
        return None
    turned = _turned(graph, stored)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes["axis"] = 1 - walk.int_attribute(node, "axis", 1) % 2
    blocks = [given for given in node.inputs[1:] if given is not None and walk.is_weight(given, rank=2)]
    inputs = [turned, *([_turned(graph, given) for given in blocks] or node.inputs[1:])]
    return edit.insert(site, "DequantizeLinear", inputs, attributes, dtype=value.dtype, shape=turned.shape)


def _turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
    array = np.ascontiguousarray(_contents(value).T)
    return edit.initializer(graph, f"{value.name}_t", ir.tensor(array, dtype=value.dtype))


def joinable(weights: Sequence[ir.Value]) -> bool:
    """Whether :func:`joined` can put matrices side by side: all floating, or integers of one type, scaled by column."""
    nodes = [weight_dequantizer(weight) for weight in weights]
    if not any(nodes):
        return True
    stored = {node.inputs[0].dtype if node is not None and node.inputs[0] is not None else None for node in nodes}
    return len(stored) == 1 and all(node is not None and _by_column(node) is not None for node in nodes)


def joined(site: ir.Node, weights: Sequence[ir.Value], name: str) -> ir.Value:
    """Joinable matrices [K, N1], [K, N2]… as one [K, N1 + N2 + …], as integers where they are; before ``site``."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    arrays = [_contents(stored_matrix(weight)) for weight in weights]
    whole = edit.initializer(graph, name, np.concatenate(arrays, axis=1))
    parts = [_by_column(node) for node in map(weight_dequantizer, weights) if node is not None]
    if not parts:
        return whole
    scales, zeros = zip(*(part for part in parts if part is not None))
    inputs = [whole, edit.initializer(graph, f"{name}.scale", np.concatenate(scales))]
    if any(zero.any() for zero in zeros):
        inputs.append(edit.initializer(graph, f"{name}.zero_point", np.concatenate(zeros)))
    return edit.insert(
        site,
        "DequantizeLinear",
        inputs,
        {"axis": 1},
        name=f"{name}.dequantized",
        dtype=weights[0].dtype,
        shape=whole.shape,
    )


def _by_column(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero point of each column of a dequantized matrix; None where they belong to its rows."""
    stored = _contents(node.inputs[0])
    grid = grid_of(node, stored.ndim)
    if grid is None or stored.ndim != 2 or (grid.vector and grid.axis != 1):
        return None
    zero = np.zeros((), stored.dtype) if grid.zero is None else _contents(grid.zero)
    columns = stored.shape[1:]
    return np.broadcast_to(_contents(grid.scale), columns), np.broadcast_to(zero, columns)


def _contents(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # the callers have seen an initializer
    return value.const_value.numpy()
