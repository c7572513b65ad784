"""A model under mutation: what is known of its values, and how nodes are put between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


@dataclass
class Context:
    """A model under mutation, and what is known of its values."""

    model: onnx.ModelProto
    random: Random
    types: dict[str, tuple[int, tuple[int | str, ...]]]
    """Element type and dimensions; an unnamed dimension is a name of its own."""
    count: int = field(default=0)

    @property
    def graph(self) -> onnx.GraphProto:
        return self.model.graph

    def fresh(self, hint: str) -> str:
        self.count += 1
        return f"{hint}_new{self.count}"

    def shape(self, name: str) -> tuple[int | str, ...]:
        return self.types[name][1] if name in self.types else ()

    def constant(self, array: Any, hint: str = "constant") -> str:
        name = self.fresh(hint)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def edges(self, kind: int | None = FLOAT, ranks: range = range(1, 9)) -> list[tuple[int, int]]:
        """(node, input) pairs that read a computed value of the type and rank."""
        stored = {tensor.name for tensor in self.graph.initializer}
        return [
            (n, i)
            for n, node in enumerate(self.graph.node)
            for i, name in enumerate(node.input)
            if name in self.types and name not in stored and (kind is None or self.types[name][0] == kind)
            and len(self.types[name][1]) in ranks
        ]  # fmt: skip

    def splice(self, edge: tuple[int, int], make: Callable[[str], tuple[list[onnx.NodeProto], str]]) -> None:
        """Put the nodes of ``make(name)`` between a value and one of its readers, or all readers from there on."""
        place, position = edge
        old = self.graph.node[place].input[position]
        nodes, new = make(old)
        everywhere = self.random.random() < 0.3
        for later in self.graph.node[place:] if everywhere else [self.graph.node[place]]:
            for i, name in enumerate(later.input):
                if name == old and (everywhere or i == position):
                    later.input[i] = new
        for offset, node in enumerate(nodes):
            self.graph.node.insert(place + offset, node)
        self.types.setdefault(new, self.types[old])


def types_of(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    """Element type and dimensions of every value whose rank is known."""
    found = {}
    graph = model.graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            dims = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}.{i}"
                for i, d in enumerate(tensor.shape.dim)
            )
            found[value.name] = (tensor.elem_type, dims)
    for stored in graph.initializer:
        found[stored.name] = (stored.data_type, tuple(stored.dims))
    return found
