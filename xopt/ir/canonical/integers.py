"""Operators on quantized tensors in the QDQ form, which passes and kernels for integers know.

    QLinearMatMul(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero)
        ->  QuantizeLinear(MatMul(DequantizeLinear(a, …), DequantizeLinear(b, …)), y_scale, y_zero)
    QLinearConv(x, …, w, …, y_scale, y_zero, bias)
        ->  QuantizeLinear(Conv(DequantizeLinear(x, …), DequantizeLinear(w, …), bias * x_scale * w_scale), …)
A scale is one number, or one for each row of a, column of b, channel of w; those of higher rank are left as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import input_at, insert, operand, remove_dead, replace, sweep
from xopt.ir.shapes import infer_shapes

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Rewrite every operator on quantized tensors."""
    if not any(node.op_type in ("QLinearMatMul", "QLinearConv") for node in model.graph.all_nodes()):
        return
    infer_shapes(model)
    report.rewrote("qlinear-matmul", sweep(model, ("QLinearMatMul",), _matmul))
    report.rewrote("qlinear-conv", sweep(model, ("QLinearConv",), _conv))
    remove_dead(model)


def _matmul(node: ir.Node) -> bool:
    left = _dequantized(node, 0, -2)
    right = _dequantized(node, 3, -1)
    if left is None or right is None:
        return False
    product = insert(node, "MatMul", [left, right], dtype=left.dtype, shape=node.outputs[0].shape)
    return _quantized(node, product)


def _conv(node: ir.Node) -> bool:
    x, w = _dequantized(node, 0, 1), _dequantized(node, 3, 0)
    if x is None or w is None:
        return False
    inputs = [x, w]
    if (bias := input_at(node, 8)) is not None:
        unit = insert(node, "Mul", [operand(node, 1), operand(node, 4)], dtype=x.dtype)
        wide = insert(node, "Cast", [bias], {"to": ir.DataType.FLOAT.value}, dtype=ir.DataType.FLOAT)
        inputs.append(insert(node, "Mul", [wide, unit], dtype=x.dtype, shape=bias.shape))
    attributes = {name: node.attributes[name].value for name in _CONV if name in node.attributes}
    return _quantized(node, insert(node, "Conv", inputs, attributes, dtype=x.dtype, shape=node.outputs[0].shape))


def _dequantized(node: ir.Node, index: int, axis: int) -> ir.Value | None:
    """The operand at ``index``, followed by its scale and zero point, as real numbers; None for grids of rank 2."""
    x, scale, zero = (operand(node, index + k) for k in range(3))
    if x.shape is None or scale.shape is None:
        return None
    if len(scale.shape) > 1:
        return None
    per_row = len(scale.shape) == 1 and scale.shape[0] != 1
    attributes = {"axis": axis % max(len(x.shape), 1)} if per_row else {}
    if len(scale.shape) == 1 and not per_row:  # one number in a vector is one number for the whole tensor
        scale, zero = (_scalar(node, value) for value in (scale, zero))
    return insert(node, "DequantizeLinear", [x, scale, zero], attributes, dtype=scale.dtype, shape=x.shape)


def _scalar(node: ir.Node, value: ir.Value) -> ir.Value:
    return insert(node, "Squeeze", [value], dtype=value.dtype, shape=[])


def _quantized(node: ir.Node, result: ir.Value) -> bool:
    scale, zero = operand(node, 6), operand(node, 7)
    if scale.shape is not None and len(scale.shape) == 1:
        scale, zero = (_scalar(node, value) for value in (scale, zero))
    written = insert(
        node, "QuantizeLinear", [result, scale, zero], dtype=node.outputs[0].dtype, shape=node.outputs[0].shape
    )
    return replace(node.outputs[0], written)
