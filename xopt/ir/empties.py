"""Axes of inputs that may be empty: those that are only joined to others, as the past in a decoder's first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from xopt.ir.edit import is_op
from xopt.ir.shape_rules import integer
from xopt.ir.width import ELEMENTWISE

MOVING = ("Transpose", "CastLike", "Unsqueeze", "Squeeze", "Gather", "Split", "Slice", "Expand", "Reshape",
          "QuantizeLinear", "DequantizeLinear", *ELEMENTWISE)  # fmt: skip
"""Operators that compute what stands at a place of an axis from what stood there, where the axis keeps its size."""
PASTS = (4, 5)
"""The inputs of Attention that are joined to keys and values."""


def may_be_empty(model: ir.Model) -> frozenset[str]:
    """Names of the symbolic dimensions of inputs that may be 0.

    Args:
        model: with inferred shapes.
    """
    ends: dict[str, list[ir.Node | None]] = {}
    for value in model.graph.inputs:
        for name in _names(value):
            ends.setdefault(name, []).extend(_ends(value, name))
    found = {name: [node for node in nodes if node is not None] for name, nodes in ends.items() if None not in nodes}
    while odd := [name for name, nodes in found.items() if not all(_joined(node, name, found) for node in nodes)]:
        for name in odd:
            del found[name]
    return frozenset(found)


def _names(value: ir.Value | None) -> list[str]:
    """The symbolic dimensions of a value."""
    return [dim.value for dim in _dims(value) if isinstance(dim, ir.SymbolicDim) and dim.value]


def _dims(value: ir.Value | None) -> list[int | ir.SymbolicDim]:
    return list(value.shape) if value is not None and value.shape is not None else []


def _ends(value: ir.Value, name: str) -> Iterator[ir.Node | None]:
    """The nodes at which an axis ends: what joins it to another; None for any other use."""
    seen, waiting = {value}, [value]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output() or _names(value).count(name) != 1:
            yield None
        for node, place in value.uses():
            if is_op(node, "Concat") or (is_op(node, "Attention") and place in PASTS):
                yield node
            elif is_op(node, *MOVING) and (place == 0 or is_op(node, *ELEMENTWISE)):
                waiting += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            elif not is_op(node, "Shape", "Size"):
                yield None


def _joined(node: ir.Node, name: str, empty: Mapping[str, object]) -> bool:
    """Whether a node joins an axis to one that has elements."""
    attention = node.op_type == "Attention"
    axis = -2 if attention else integer(node, "axis", 0)
    parts = [_dims(value) for value in ([node.inputs[1]] if attention else node.inputs)]
    if not all(parts):
        return False
    sizes = [_name(dims[axis]) for dims in parts]
    crossing = any(name in map(_name, dims) and size != name for dims, size in zip(parts, sizes))
    return not crossing and any(size not in (0, None) and size not in empty for size in sizes)


def _name(dim: int | ir.SymbolicDim) -> str | int | None:
    """A size that is known to have elements, or the name of one."""
    return dim.value if isinstance(dim, ir.SymbolicDim) else dim
