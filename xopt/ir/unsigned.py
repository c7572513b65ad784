"""Products of integers that onnxruntime multiplies exactly on every CPU.

    MatMulInteger(a, b int8, zero_a, zero_b)   ->   MatMulInteger(a, b + 128 uint8, zero_a, zero_b + 128)
Where a CPU has no dot products of integers (VNNI), onnxruntime adds two products of uint8 and int8 in 16 bits, and
saturates; its products of uint8 and uint8 are exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir import edit

_MIDDLE = 128


def widen_products(model: ir.Model) -> None:
    """Write every product of uint8 and int8 as one of uint8 and uint8, in place."""
    for node in list(model.graph.all_nodes()):
        if not edit.is_op(node, "MatMulInteger"):
            continue
        left, right = edit.operand(node, 0), edit.operand(node, 1)
        if (left.dtype, right.dtype) == (ir.DataType.UINT8, ir.DataType.INT8):
            zero = _moved(node, edit.input_at(node, 3))
            node.resize_inputs(4)
            node.replace_input_with(3, zero)
            node.replace_input_with(1, _moved(node, right))


def _moved(node: ir.Node, value: ir.Value | None) -> ir.Value:
    """int8 as uint8, 128 higher; an absent zero point is 0."""
    assert isinstance(node.graph, ir.Graph)
    if value is None:
        return edit.initializer(node.graph, "middle", np.array(_MIDDLE, np.uint8))
    if (array := edit.constant(value)) is not None:
        moved = (array.astype(np.int16) + _MIDDLE).astype(np.uint8)
        return edit.initializer(node.graph, f"{value.name}_unsigned", moved)
    middle = edit.initializer(node.graph, "middle", np.array(_MIDDLE, np.int32))
    wide = edit.insert(node, "Cast", [value], {"to": ir.DataType.INT32.value}, dtype=ir.DataType.INT32)
    total = edit.insert(node, "Add", [wide, middle], dtype=ir.DataType.INT32)
    return edit.insert(node, "Cast", [total], {"to": ir.DataType.UINT8.value}, dtype=ir.DataType.UINT8)
