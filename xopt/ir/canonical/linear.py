"""Linear layers in one form: ``MatMul(x[..., K], W[K, N])``, then ``Add(·, b[N])`` with the bias on the right.

    Gemm(x, W, b, transB=1)                        ->  Add(MatMul(x, W'), b)
    MatMul(x, Transpose(W))                        ->  MatMul(x, W')
    Reshape(Add(MatMul(Reshape(x, [-1, K]), W), b), [B, S, N])  ->  Add(MatMul(x, W), b)      (GPT-2's Conv1D)
W' is W transposed now; where W is DequantizeLinear(V), its integers V are.
Refuses  "gemm-dynamic": a Gemm whose second operand is computed and scaled.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir import quantized
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import (
    attribute,
    constant,
    initializer,
    input_at,
    insert,
    operand,
    producer,
    remove_dead,
    replace,
    sweep,
)
from xopt.ir.shapes import equal_by_count, infer_shapes


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Bring every linear layer into the canonical form."""
    infer_shapes(model)  # earlier steps leave values of unknown shape, and shapes tell what a Reshape does
    transposed: dict[ir.Value, ir.Value] = {}
    report.rewrote("gemm", sweep(model, ("Gemm",), lambda node: _gemm(node, transposed)))
    report.rewrote("transposed-weight", sweep(model, ("MatMul",), lambda node: _weight(node, transposed)))
    report.rewrote("einsum", sweep(model, ("Einsum",), _einsum))
    report.rewrote("linear-reshape", sweep(model, ("Reshape",), _lift_reshape))
    remove_dead(model)


def _gemm(node: ir.Node, transposed: dict[ir.Value, ir.Value]) -> bool:
    """``alpha * A' @ B' + beta * C``, with the factors folded into constants where they are."""
    a, b, c = operand(node, 0), operand(node, 1), input_at(node, 2)
    alpha, beta = float(attribute(node, "alpha", 1.0) or 0), float(attribute(node, "beta", 1.0) or 0)
    if attribute(node, "transA", 0):
        a = insert(node, "Transpose", [a], {"perm": [1, 0]})
    if attribute(node, "transB", 0):
        b = _transpose(node, b, transposed)
    product = insert(node, "MatMul", [a, _scaled(node, b, alpha)], dtype=a.dtype, shape=node.outputs[0].shape)
    if c is not None and beta != 0:
        product = insert(node, "Add", [product, _bias(node, _scaled(node, c, beta))], shape=node.outputs[0].shape)
    return replace(node.outputs[0], product)


def _scaled(node: ir.Node, value: ir.Value, factor: float) -> ir.Value:
    if factor == 1.0:
        return value
    array = constant(value)
    graph = node.graph
    if array is not None and isinstance(graph, ir.Graph):
        return initializer(graph, f"{value.name}_scaled", (array * np.asarray(factor, array.dtype)))
    dtype = value.dtype.numpy() if value.dtype is not None else np.float32
    assert isinstance(graph, ir.Graph)
    return insert(node, "Mul", [value, initializer(graph, "factor", np.asarray(factor, dtype))])


def _bias(node: ir.Node, bias: ir.Value) -> ir.Value:
    """A bias of shape [1, N] or [N] as [N]."""
    array = constant(bias)
    if array is None or array.ndim < 2 or array.shape[0] != 1 or not isinstance(node.graph, ir.Graph):
        return bias
    return initializer(node.graph, bias.name or "bias", array.reshape(-1))


def _transpose(node: ir.Node, value: ir.Value, transposed: dict[ir.Value, ir.Value]) -> ir.Value:
    """A 2-D value transposed: now when it is constant (once per weight), else by a node."""
    array = constant(value)
    if value not in transposed and array is not None and isinstance(node.graph, ir.Graph):
        transposed[value] = initializer(node.graph, f"{value.name}_t", array.T)
    elif value not in transposed and (turned := quantized.transposed(node, value)) is not None:
        transposed[value] = turned
    if value in transposed:
        return transposed[value]
    return insert(node, "Transpose", [value], {"perm": [1, 0]})


def _weight(node: ir.Node, transposed: dict[ir.Value, ir.Value]) -> bool:
    """Fold the transpose of a constant weight."""
    turn = producer(operand(node, 1), "Transpose")
    weight = operand(turn, 0) if turn is not None else None
    if turn is None or weight is None or quantized.stored_matrix(weight) is None:
        return False
    perm = turn.attributes.get("perm")
    if perm is not None and list(perm.as_ints()) != [1, 0]:
        return False
    node.replace_input_with(1, _transpose(node, weight, transposed))
    return True


def _einsum(node: ir.Node) -> bool:
    """``bsk,kn->bsn`` and ``bsk,nk->bsn`` with a constant second operand."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    sides = equation.split("->")
    weight = constant(input_at(node, 1))
    if len(sides) != 2 or weight is None or weight.ndim != 2 or sides[0].count(",") != 1:
        return False
    (x, w), out = sides[0].split(","), sides[1]
    if "." in equation or len(set(x)) != len(x) or len(set(w)) != 2 or not x or x[-1] not in w:
        return False
    new = w.replace(x[-1], "")
    if new in x or out != x[:-1] + new or not isinstance(node.graph, ir.Graph):
        return False
    right = operand(node, 1) if w[0] == x[-1] else initializer(node.graph, f"{operand(node, 1).name}_t", weight.T)
    return replace(node.outputs[0], insert(node, "MatMul", [operand(node, 0), right], shape=node.outputs[0].shape))


def _lift_reshape(node: ir.Node) -> bool:
    """Let a linear layer work on the 3-D tensor itself when reshapes only flatten and restore its leading axes."""
    bias = producer(operand(node, 0), "Add")
    product = producer(operand(bias, 0) if bias is not None else operand(node, 0), "MatMul")
    flatten = producer(operand(product, 0), "Reshape") if product is not None else None
    if product is None or flatten is None or constant(operand(product, 1)) is None:
        return False
    bias_value = constant(operand(bias, 1)) if bias is not None else None
    if bias is not None and (bias_value is None or bias_value.ndim > 1):
        return False
    x, result, weight = operand(flatten, 0), node.outputs[0], operand(product, 1)
    if not _same_leading(x.shape, result.shape) or flatten.outputs[0].shape is None:
        return False
    if not weight.shape or len(flatten.outputs[0].shape) != 2 or x.shape is None or result.shape is None:
        return False
    if x.shape[-1] != weight.shape[0] or result.shape[-1] != weight.shape[1]:
        return False
    y = insert(node, "MatMul", [x, weight], name=product.outputs[0].name, shape=result.shape)
    if bias is not None:
        y = insert(node, "Add", [y, operand(bias, 1)], name=bias.outputs[0].name, shape=result.shape)
    return replace(result, y)


def _same_leading(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether all axes but the last are equal."""
    return a is not None and b is not None and len(a) > 1 and equal_by_count(a[:-1], b[:-1])
