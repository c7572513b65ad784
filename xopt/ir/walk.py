"""Questions about a graph: integer constants, known shapes, and what lies between two values."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from xopt.ir import edit

NORMS = ("LayerNormalization", "RMSNormalization")


def is_weight(value: ir.Value | None, rank: int | None = None) -> bool:
    """Whether the value is an initializer with data (of this rank)."""
    if value is None or value.const_value is None or value.producer() is not None:
        return False
    return rank is None or len(value.const_value.shape) == rank


def ints(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant scalar or vector, or None."""
    data = edit.constant(value)
    if data is None or data.dtype.kind not in "iu" or data.ndim > 1:
        return None
    return [int(item) for item in data.reshape(-1)]


def in_order(node: ir.Node) -> bool:
    """Whether a Slice takes elements one after the other: steps that the data decide may be any."""
    steps = edit.input_at(node, 4)
    return steps is None or set(ints(steps) or [0]) == {1}


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def attention_heads(node: ir.Node) -> tuple[int, int, int]:
    """How many heads Q, K and V of an attention node have side by side; 0 where they have an axis of their own."""
    q, kv = (int_attribute(node, name, 0) for name in ("q_num_heads", "kv_num_heads"))
    return q, kv, kv


def mask_ends_early(node: ir.Node) -> bool:
    """Whether the mask of an attention node is surely shorter than its keys: ONNX hides those beyond its end."""
    mask, keys = (shape_of(edit.input_at(node, index)) for index in (3, 1))
    if not mask or not keys or len(keys) < 3 or mask[-1] is None:
        return False
    return mask[-1] != keys[-2] if keys[-2] is not None else mask[-1] == 1


def shape_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape with None for symbolic dimensions, or None when the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def axis(node: ir.Node, default: int, operand: int = 0) -> int | None:
    """The ``axis`` attribute counted from the front; None when it is negative and the operand's rank is unknown."""
    found = int_attribute(node, "axis", default)
    if found >= 0:
        return found
    shape = shape_of(node.inputs[operand])
    return None if shape is None else found + len(shape)


def graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside a node: branches of If, bodies of Loop and Scan."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


class Order:
    """Topological positions in a graph, and the paths between values.

    Values that no node makes (inputs, initializers) are at position -1.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: list[ir.Node] = list(graph)
        self.position: dict[ir.Node, int] = {node: index for index, node in enumerate(self.nodes)}

    def of(self, value: ir.Value) -> int:
        """Position of the node that makes the value."""
        node = value.producer()
        return -1 if node is None else self.position.get(node, -1)

    def between(self, start: ir.Value, end: ir.Value) -> list[ir.Node] | None:
        """Nodes on the paths from start to end, in order; [] when they are one value, None without a path."""
        if start is end:
            return []
        reached, path = {start}, []
        for node in sorted(self._cone(end, self.of(start)), key=self.position.__getitem__):
            if any(value in reached for value in node.inputs):
                reached.update(node.outputs)
                path.append(node)
        return path if end in reached else None

    def _cone(self, end: ir.Value, floor: int) -> set[ir.Node]:
        """The nodes after position ``floor`` that ``end`` depends on."""
        seen: set[ir.Node] = set()
        pending = [end]
        while pending:
            node = pending.pop().producer()
            if node is not None and node not in seen and self.position.get(node, -1) > floor:
                seen.add(node)
                pending.extend(value for value in node.inputs if value is not None)
        return seen
