"""How large the ids of an integer input may be: the rows of the tables that it indexes."""

from __future__ import annotations

import onnx_ir as ir

_SAME_NUMBERS = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose"}
    | {"Unsqueeze"}
)
"""Operators whose outputs hold numbers of their first input (and nothing larger)."""


def table_rows(value: ir.Value) -> int | None:
    """Rows of the smallest table that ``value`` indexes through a Gather; None when it indexes none of known size."""
    rows: list[int] = []
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, position in current.uses():
            if node.op_type in ("Gather", "GatherElements") and position == 1:
                rows += _rows(node)
            elif node.op_type in _SAME_NUMBERS and (position == 0 or node.op_type == "Concat"):
                pending += node.outputs
    return min(rows, default=None)


def _rows(gather: ir.Node) -> list[int]:
    table = gather.inputs[0]
    attribute = gather.attributes.get("axis")
    axis = attribute.as_int() if attribute is not None else 0
    if table is None or table.shape is None or not -len(table.shape) <= axis < len(table.shape):
        return []
    size = table.shape[axis]
    return [size] if isinstance(size, int) and table.const_value is not None else []
