"""A node taken out of its graph, as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from xopt.ir import walk


def captured(graph: ir.Graph) -> list[ir.Value]:
    """Values of other graphs that a graph reads, also those that graphs inside its nodes read."""
    own, found = set(graph.inputs) | set(graph.initializers.values()), dict[ir.Value, None]()
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        for inner in walk.graphs(node):
            read += captured(inner)
        found.update((value, None) for value in read if value not in own)
        own.update(node.outputs)
    found.update((value, None) for value in graph.outputs if value not in own)
    return list(found)


def reads(node: ir.Node) -> list[ir.Value]:
    """Values that a node reads, each once, also those that graphs inside of it read."""
    inner = [value for graph in walk.graphs(node) for value in captured(graph)]
    return list(dict.fromkeys([*(value for value in node.inputs if value is not None), *inner]))


def alone(
    node: ir.Node, inputs: Sequence[ir.Value], constants: Mapping[ir.Value, np.ndarray[Any, Any]], model: ir.Model
) -> ir.Model:
    """A model of one node.

    Args:
        node: not changed.
        inputs: values that become inputs of the model, in order.
        constants: values that become initializers.
        model: the node's, for its opsets and functions.
    """
    tensors = []
    for value, array in constants.items():
        tensor = ir.to_proto(ir.Tensor(array, dtype=value.dtype, name=value.name))
        tensors.append(tensor)
    outputs = [value for value in node.outputs if value.name and (value.uses() or value.is_graph_output())]
    graph = onnx.helper.make_graph(
        [ir.to_proto(node)],
        "segment",
        [ir.to_proto(value) for value in inputs],
        [ir.to_proto(value) for value in outputs],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    functions = [ir.to_proto(function) for function in model.functions.values()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=model.ir_version)
    made: ir.Model = ir.from_proto(proto)
    return made
