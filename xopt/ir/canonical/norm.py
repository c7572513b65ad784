"""LayerNormalization and RMSNormalization from their parts.

    d = x - mean(x);  y = d / sqrt(mean(d * d) + eps) * scale + bias        ->  LayerNormalization(x, scale, bias)
    y = x * rsqrt(mean(x * x) + eps) * scale                                ->  RMSNormalization(x, scale)
over the last axis; with Pow or Mul for the square, Div, Reciprocal, Pow(-0.5) or Mul for the division, the operands in
any order, a missing scale or bias, and casts to float32 and back around the middle (that is what stash_type means), or
to double from half precision, as the exporter of TorchScript casts.
Nodes that are already there get their axis and epsilon written in one way.
Refuses  "norm-width-unknown": no scale, and the width of x is not static, so that no scale of ones can be made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import (
    attribute,
    constant,
    consumers,
    initializer,
    input_at,
    insert,
    is_op,
    operand,
    producer,
    remove_dead,
    replace,
    replace_uses,
    same_form,
    scalar,
    set_attributes,
    sweep,
)


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Find decomposed norms by their square root (or power -0.5)."""
    report.rewrote("norm-axis", sweep(model, ("LayerNormalization", "RMSNormalization"), _normalize_attributes))
    report.rewrote("norm", sweep(model, ("Div", "Mul"), lambda node: _fuse(node, report)))
    report.rewrote("norm-affine", sweep(model, ("LayerNormalization", "RMSNormalization"), _absorb_affine))
    remove_dead(model)


def _normalize_attributes(node: ir.Node) -> bool:
    """Axis -1 and an explicit epsilon, where the norm is over the last axis."""
    axis, shape = int(attribute(node, "axis", -1) or 0), operand(node, 0).shape
    before = dict(node.attributes)
    if shape is not None and axis == len(shape) - 1:
        axis = -1
    set_attributes(node, axis=axis, epsilon=float(attribute(node, "epsilon", 1e-5) or 0.0))
    return set(before) != set(node.attributes) or before.get("axis") != node.attributes["axis"]


@dataclass(frozen=True)
class _Normalized:
    """``centered / sqrt(mean(centered ** 2) + epsilon)`` of ``x``; ``kind`` is the op that computes it."""

    kind: str
    x: ir.Value
    epsilon: float


def _fuse(node: ir.Node, report: CanonicalizeReport) -> bool:
    """Replace one ``normalized`` (scale and bias are absorbed afterwards)."""
    found = _match(node)
    if found is None or not isinstance(node.graph, ir.Graph) or found.x.dtype is None:
        return False
    width = found.x.shape[-1] if found.x.shape else None
    site, result = node, node.outputs[0]
    if result.dtype not in (None, found.x.dtype):  # the cast back to x's type belongs to the norm
        casts = consumers(result)
        if result.is_graph_output() or len(casts) != 1 or not is_op(casts[0], "Cast"):
            return False
        site, result = casts[0], casts[0].outputs[0]
        if result.dtype != found.x.dtype:
            return False
    if not isinstance(width, int):
        report.refuse("norm", node.name, "norm-width-unknown")
        return False
    if not same_form(result, found.x):
        return False
    scale = initializer(node.graph, f"{node.name}/scale", np.ones(width, found.x.dtype.numpy()))
    attributes = {"axis": -1, "epsilon": found.epsilon}
    return replace(result, insert(site, found.kind, [found.x, scale], attributes, shape=found.x.shape))


def _match(node: ir.Node) -> _Normalized | None:
    """``node`` as ``d / root`` or ``d * (1 / root)``, d on either side of the product."""
    left, right = operand(node, 0), operand(node, 1)
    if node.op_type == "Div":
        return _normalized(left, _root(right))
    return _normalized(left, _reciprocal_root(right)) or _normalized(right, _reciprocal_root(left))


def _root(value: ir.Value) -> ir.Value | None:
    """Finds v of ``sqrt(v)`` or ``v ** 0.5``."""
    node = producer(_uncast(value), "Sqrt", "Pow")
    if node is None or (node.op_type == "Pow" and scalar(operand(node, 1)) != 0.5):
        return None
    return operand(node, 0)


def _reciprocal_root(value: ir.Value) -> ir.Value | None:
    """Finds v of ``1 / sqrt(v)`` in any of its spellings."""
    node = producer(_uncast(value), "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op_type == "Reciprocal":
        return _root(operand(node, 0))
    if node.op_type == "Div":
        return _root(operand(node, 1)) if scalar(operand(node, 0)) == 1.0 else None
    return operand(node, 0) if scalar(operand(node, 1)) == -0.5 else None


def _normalized(centered: ir.Value, variance: ir.Value | None) -> _Normalized | None:
    """Check that ``variance`` is ``mean(centered ** 2) + epsilon`` and see what ``centered`` is made of."""
    total = producer(variance, "Add")
    if total is None:
        return None
    epsilon = scalar(operand(total, 1))
    squares = _mean_of(operand(total, 0))
    centered = _uncast(centered)
    if epsilon is None or squares is None or _square_of(squares) is not centered:
        return None
    difference = producer(centered, "Sub")
    if difference is not None:
        x = _uncast(operand(difference, 0))
        mean = _mean_of(operand(difference, 1))
        if mean is not None and _uncast(mean) is x:
            return _Normalized("LayerNormalization", x, epsilon)
    return _Normalized("RMSNormalization", centered, epsilon)


def _mean_of(value: ir.Value) -> ir.Value | None:
    """Finds v of ``mean(v)`` over the last axis, that axis kept."""
    node = producer(_uncast(value), "ReduceMean")
    if node is None or attribute(node, "keepdims", 1) != 1:
        return None
    source = operand(node, 0)
    axes = constant(input_at(node, 1))
    if axes is None or axes.size != 1:
        return None
    axis = int(axes.reshape(-1)[0])
    return source if axis == -1 or (source.shape is not None and axis == len(source.shape) - 1) else None


def _square_of(value: ir.Value) -> ir.Value | None:
    """Finds v of ``v ** 2`` or ``v * v``."""
    node = producer(_uncast(value), "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return _uncast(operand(node, 0)) if scalar(operand(node, 1)) == 2.0 else None
    left, right = _uncast(operand(node, 0)), _uncast(operand(node, 1))
    return left if left is right else None


def _uncast(value: ir.Value) -> ir.Value:
    """``value`` before casts to wider floating-point types.

    Double is a norm's working type for half precision alone, whose digits float32 has to spare.
    """
    node = producer(value, "Cast")
    while node is not None and _widens(operand(node, 0).dtype, value.dtype):
        value = operand(node, 0)
        node = producer(value, "Cast")
    return value


def _widens(source: ir.DataType | None, target: ir.DataType | None) -> bool:
    if source in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return target in (source, ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return source == target == ir.DataType.FLOAT


def _absorb_affine(node: ir.Node) -> bool:
    """Take a following ``* scale`` into a scale of ones, and ``+ bias`` into an absent or zero bias."""
    result, scale = node.outputs[0], operand(node, 1)
    array = constant(scale)
    changed = False
    user = _only_consumer(result, "Mul")
    if user is not None and array is not None and np.all(array == 1) and input_at(node, 2) is None:
        factor = _other(user, result)
        if _is_vector(factor, array.size, result) and same_form(user.outputs[0], result):
            result = _absorb(node, 1, factor, user)
            changed = True
    user = _only_consumer(result, "Add")
    if user is not None and node.op_type == "LayerNormalization" and input_at(node, 2) is None and array is not None:
        bias = _other(user, result)
        if _is_vector(bias, array.size, result) and same_form(user.outputs[0], result):
            _absorb(node, 2, bias, user)
            changed = True
    return changed


def _only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    users = consumers(value)
    one = len(users) == 1 and not value.is_graph_output() and is_op(users[0], op_type)
    return users[0] if one else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    return operand(node, 1) if operand(node, 0) is value else operand(node, 0)


def _is_vector(value: ir.Value, size: int, result: ir.Value) -> bool:
    """A constant that broadcasts over the last axis of ``result`` alone, and gives it no axis more."""
    array = constant(value)
    if array is None or array.size != size or (size != 1 and array.shape[-1] != size):
        return False
    return array.ndim <= 1 or (result.shape is not None and array.ndim <= len(result.shape))


def _absorb(node: ir.Node, index: int, vector: ir.Value, user: ir.Node) -> ir.Value:
    """Make ``vector`` input ``index`` of the norm and drop ``user``; returns the norm's output."""
    array = constant(vector)
    assert isinstance(node.graph, ir.Graph)
    if array is not None and array.ndim != 1:
        vector = initializer(node.graph, vector.name or "vector", array.reshape(-1))
    inputs = list(node.inputs)
    if len(inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, vector)
    replace_uses(user.outputs[0], node.outputs[0])
    node.graph.remove(user, safe=True)
    return node.outputs[0]
