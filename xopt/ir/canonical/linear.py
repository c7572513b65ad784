"""Linear layers in one form: ``MatMul(x[..., K], W[K, N])``, then ``Add(·, b[N])`` with the bias on the right.

    Gemm(x, W, b, transB=1)                        ->  Add(MatMul(x, W'), b)
    MatMul(x, Transpose(W))                        ->  MatMul(x, W')
    Einsum("bqhd,bkhd->bhqk", q, k)                ->  MatMul(Transpose(q), Transpose(k))             (einsum)
    Reshape(Add(MatMul(Reshape(x, [-1, K]), W), b), [B, S, N])  ->  Add(MatMul(x, W), b)      (GPT-2's Conv1D)
W' is W transposed now; where W is DequantizeLinear(V), its integers V are. Packed weights are cut now.
Refuses  "gemm-dynamic": a Gemm whose second operand is computed and scaled.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir import quantized
from xopt.ir.canonical.einsum import einsum
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
from xopt.ir.shape_rules import equal_parts
from xopt.ir.shapes import equal_by_count, infer_shapes


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Bring every linear layer into the canonical form."""
    infer_shapes(model)  # earlier steps leave values of unknown shape, and shapes tell what a Reshape does
    transposed: dict[ir.Value, ir.Value] = {}
    report.rewrote("constant-part", sweep(model, ("Split", "Slice"), _constant_part))
    report.rewrote("gemm", sweep(model, ("Gemm",), lambda node: _gemm(node, transposed)))
    report.rewrote("transposed-weight", sweep(model, ("MatMul",), lambda node: _weight(node, transposed)))
    report.rewrote("einsum", sweep(model, ("Einsum",), einsum))
    report.rewrote("linear-reshape", sweep(model, ("Reshape",), _lift_reshape))
    remove_dead(model)


def _constant_part(node: ir.Node) -> bool:
    """A part of a constant, as packed projections are cut, is a constant."""
    array = constant(operand(node, 0))
    if array is None or not isinstance(node.graph, ir.Graph):
        return False
    parts = _split(node, array) if node.op_type == "Split" else _sliced(node, array)
    if parts is None or len(parts) != len(node.outputs):
        return False
    made = [initializer(node.graph, output.name or "part", part) for output, part in zip(node.outputs, parts)]
    replaced = [replace(output, part) for output, part in zip(node.outputs, made)]
    return all(replaced)


def _split(node: ir.Node, array: np.ndarray) -> list[np.ndarray] | None:
    axis = int(attribute(node, "axis", 0) or 0)
    sizes = constant(input_at(node, 1))
    if not -array.ndim <= axis < array.ndim:
        return None
    if sizes is None:
        sizes = np.asarray(equal_parts(array.shape[axis], len(node.outputs)))
    if sizes.min() < 0 or sizes.sum() != array.shape[axis] or (input_at(node, 1) is not None and sizes.ndim != 1):
        return None
    return list(np.split(array, np.cumsum(sizes)[:-1], axis))


def _sliced(node: ir.Node, array: np.ndarray) -> list[np.ndarray] | None:
    given = [constant(input_at(node, i)) for i in range(1, 5)]
    if any(value is None and input_at(node, i) is not None for i, value in enumerate(given, 1)):
        return None
    starts, ends, axes, steps = given
    if starts is None or ends is None:
        return None
    axes = np.arange(starts.size) if axes is None else axes
    steps = np.ones(starts.size, np.int64) if steps is None else steps
    if not starts.size == ends.size == axes.size == steps.size or any(not -array.ndim <= a < array.ndim for a in axes):
        return None
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist()):
        if step < 1:
            return None
        array = array[(slice(None),) * (axis % array.ndim) + (slice(start, end, step),)]
    return [array]


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
