"""The linear layers of a model, and their rewrite into the QDQ form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from xopt.ir import edit, quantized, walk
from xopt.passes.quantize.scales import Scale, quantized_weight


@dataclass(frozen=True)
class Layer:
    """``MatMul(x [..., K], weight [K, N])`` by a constant."""

    node: ir.Node

    @property
    def name(self) -> str:
        """Name of the MatMul."""
        return str(self.node.name)

    @property
    def input(self) -> ir.Value:
        """What it multiplies."""
        return edit.operand(self.node, 0)

    @property
    def weight(self) -> ir.Value:
        """What it multiplies by."""
        return edit.operand(self.node, 1)

    @property
    def size(self) -> int:
        """Elements of the weight: multiply-accumulates a row."""
        rows, columns = walk.shape_of(self.weight) or (0, 0)
        return (rows or 0) * (columns or 0)

    def problem(self) -> str | None:
        """Why it cannot be quantized whatever the data, or None."""
        if quantized.weight_dequantizer(self.weight) is not None:
            return "already-quantized"
        if self.weight.dtype != ir.DataType.FLOAT or self.input.dtype != ir.DataType.FLOAT:
            return "not-float32"
        if not np.isfinite(array(self.weight)).all():
            return "weight-not-finite"
        return None


def linear_layers(graph: ir.Graph) -> list[Layer]:
    """All products with a constant matrix, in the order of execution."""
    products = (node for node in graph if edit.is_op(node, "MatMul"))
    return [Layer(node) for node in products if quantized.stored_matrix(node.inputs[1]) is not None]


def named(layers: Sequence[Layer], patterns: Sequence[str]) -> Iterator[Layer]:
    """The layers that a pattern names: ``first``, ``last``, or wildcards over names of MatMuls and weights."""
    for index, layer in enumerate(layers):
        places = {"first": index == 0, "last": index == len(layers) - 1}
        names = (layer.name, str(layer.weight.name))
        if any(places.get(one, any(fnmatchcase(name, one) for name in names)) for one in patterns):
            yield layer


def quantize_layers(graph: ir.Graph, layers: Sequence[Layer], scales: Mapping[ir.Value, Scale]) -> None:
    """Rewrite layers; those that read one value share its QDQ pair, those that share a weight its integers.

    Args:
        graph: the main graph.
        layers: in the order of execution.
        scales: of the values that the layers read.
    """
    done: dict[ir.Value, ir.Value] = {}
    for layer in layers:
        x, weight = layer.input, layer.weight
        if x not in done:
            done[x] = quantized_input(layer.node, x, scales[x])
        if weight not in done:
            done[weight] = _quantized_weight(layer.node, weight)
        layer.node.replace_input_with(0, done[x])
        layer.node.replace_input_with(1, done[weight])


def quantized_input(site: ir.Node, x: ir.Value, grid: Scale) -> ir.Value:
    """A value after a new QDQ pair before ``site``."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    scale = edit.initializer(graph, f"{x.name}.scale", np.asarray(grid.scale))
    zero = edit.initializer(graph, f"{x.name}.zero_point", np.asarray(grid.zero))
    axis = {"axis": -1} if np.ndim(grid.scale) else {}
    levels = edit.insert(
        site,
        "QuantizeLinear",
        [x, scale, zero],
        axis,
        name=f"{x.name}.quantized",
        dtype=ir.DataType.UINT8,
        shape=x.shape,
    )
    return edit.insert(
        site,
        "DequantizeLinear",
        [levels, scale, zero],
        axis,
        name=f"{x.name}.dequantized",
        dtype=x.dtype,
        shape=x.shape,
    )


def _quantized_weight(site: ir.Node, weight: ir.Value) -> ir.Value:
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    integers, scale = quantized_weight(array(weight))
    stored = edit.initializer(graph, f"{weight.name}.int8", integers)
    columns = edit.initializer(graph, f"{weight.name}.scale", scale)
    return edit.insert(
        site,
        "DequantizeLinear",
        [stored, columns],
        {"axis": 1},
        name=f"{weight.name}.dequantized",
        dtype=weight.dtype,
        shape=weight.shape,
    )


def array(value: ir.Value) -> np.ndarray:
    """The contents of a layer's weight."""
    assert value.const_value is not None  # a layer's weight is an initializer
    return value.const_value.numpy()
