"""Feed-forward networks whose second matrix is a stack of them: experts, computed all or as a router chose; channels in
blocks.

    Y = f(X @ Up[e]) @ Down[e]
No pass changes them; they are named, so that nobody takes them for overlooked.
"""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir.edit import is_op
from xopt.ir.structure import LINEAR, POINTWISE, Unrecognized
from xopt.ir.walk import is_weight, shape_of

PRODUCTS = ("MatMul", "Einsum")
MOVES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Slice Split Concat Pad Expand Cast Identity Gather".split()  # noqa: SIM905
)
FAR = 10
"""Steps from the second product back to the first."""


def stacked(model: ir.Model) -> list[Unrecognized]:
    """The second product of each such network."""
    return [Unrecognized(node, "stacked-weights") for node in model.graph if _by_a_stack(node) and _bends(node)]


def is_chosen(value: ir.Value | None) -> bool:
    """Whether a value is taken, by computed indices, from a stack of weight matrices."""
    while (node := value.producer() if value is not None else None) is not None and not node.domain:
        if is_op(node, "Gather", "GatherND") and is_weight(node.inputs[0]):
            return len(shape_of(node.inputs[0]) or ()) > 2
        if node.op_type not in MOVES:
            return False
        value = node.inputs[0]
    return False


def _by_a_stack(node: ir.Node) -> bool:
    """Whether a node multiplies by matrices of a stack."""
    return is_op(node, *PRODUCTS) and any(_is_stack(value) or is_chosen(value) for value in node.inputs)


def _is_stack(value: ir.Value | None) -> bool:
    """Whether a value is a constant of more than one matrix."""
    return is_weight(value) and any(size != 1 for size in (shape_of(value) or ())[:-2])


def _bends(node: ir.Node) -> bool:
    """Whether what a node multiplies is an activation of another product by weights."""
    level = {(value, False) for value in node.inputs}
    for _ in range(FAR):
        behind = set[tuple[ir.Value | None, bool]]()
        for value, bent in level:
            before = value.producer() if value is not None else None
            if before is None or before.domain:
                continue
            if bent and is_op(before, *PRODUCTS) and any(is_weight(v) or is_chosen(v) for v in before.inputs):
                return True
            if before.op_type in MOVES:
                behind.add((before.inputs[0], bent))
            elif before.op_type in POINTWISE:
                behind |= {(source, bent or before.op_type not in LINEAR) for source in before.inputs}
        level = behind
    return False
