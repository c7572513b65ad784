"""Softmax from its parts, and what is done around one that changes nothing.

exp(x) / sum(exp(x)), exp(logsoftmax(x))        ->  Softmax(x)
Softmax(x - max(x))                             ->  Softmax(x)
where(isinf(weights), number, weights)          ->  weights      (they are from 0 to 1, or NaN: nan_to_num)
(weights * g) @ v, g the same for all keys      ->  (weights @ v) * g
"""

from __future__ import annotations

import math

import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import (
    attribute,
    constant,
    input_at,
    insert,
    is_op,
    operand,
    producer,
    remove_dead,
    replace,
    scalar,
    sweep,
)


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Put softmaxes together, and free them of what does nothing."""
    report.rewrote("softmax", sweep(model, ("Div",), _quotient) + sweep(model, ("Exp",), _of_logarithms))
    report.rewrote("softmax-shift", sweep(model, ("Softmax",), _shifted))
    report.rewrote("infinite-weights", sweep(model, ("Where",), _guard))
    report.rewrote("weights-gain", sweep(model, ("MatMul",), _gain))
    remove_dead(model)


def _quotient(node: ir.Node) -> bool:
    """``node`` divides exponentials by their sum."""
    exponential = producer(operand(node, 0), "Exp")
    total = producer(operand(node, 1), "Expand") or operand(node, 1).producer()
    total = producer(operand(total, 0), "ReduceSum") if total is not None and is_op(total, "Expand") else total
    if exponential is None or total is None or not is_op(total, "ReduceSum"):
        return False
    if operand(total, 0) is not exponential.outputs[0] or (axis := _axis(total)) is None:
        return False
    x = operand(exponential, 0)
    return replace(node.outputs[0], insert(node, "Softmax", [x], {"axis": axis}, shape=x.shape))


def _of_logarithms(node: ir.Node) -> bool:
    """``node`` is the Exp of a LogSoftmax."""
    inner = producer(operand(node, 0), "LogSoftmax")
    if inner is None:
        return False
    x, axis = operand(inner, 0), int(attribute(inner, "axis", -1) or 0)
    return replace(node.outputs[0], insert(node, "Softmax", [x], {"axis": axis}, shape=x.shape))


def _shifted(node: ir.Node) -> bool:
    """A softmax of numbers from which their maximum was subtracted."""
    shift = producer(operand(node, 0), "Sub")
    most = producer(operand(shift, 1), "ReduceMax") if shift is not None else None
    if shift is None or most is None or operand(most, 0) is not operand(shift, 0):
        return False
    rank, axis = len(operand(shift, 0).shape or ()), _axis(most)
    if axis is None or not rank or axis % rank != int(attribute(node, "axis", -1) or 0) % rank:
        return False
    node.replace_input_with(0, operand(shift, 0))
    return True


def _axis(node: ir.Node) -> int | None:
    """The one axis that a node reduces, which it keeps."""
    axes = constant(input_at(node, 1))
    return int(axes.item()) if axes is not None and axes.size == 1 and attribute(node, "keepdims", 1) else None


def _guard(node: ir.Node) -> bool:
    """``node`` puts numbers in the place of weights that are infinite."""
    weights = operand(node, 2)
    if not _are_weights(weights) or scalar(node.inputs[1]) is None or not _never(operand(node, 0), weights):
        return False
    return replace(node.outputs[0], weights)


def _are_weights(value: ir.Value) -> bool:
    """Whether a value is a softmax, or one whose NaN are replaced by 0."""
    node = value.producer()
    if is_op(node, "Where") and node is not None:
        checked = producer(node.inputs[0], "IsNaN")
        value = operand(node, 2)
        if checked is None or checked.inputs[0] is not value or scalar(node.inputs[1]) != 0:
            return False
    return producer(value, "Softmax") is not None


def _never(condition: ir.Value, weights: ir.Value) -> bool:
    """Whether a condition holds for no number from 0 to 1: it asks for infinity, among others."""
    node = condition.producer()
    if is_op(node, "And") and node is not None:
        return any(_never(part, weights) for part in node.inputs if part is not None)
    if not is_op(node, "IsInf", "Equal") or node is None:
        return False
    asked = operand(node, 0)
    cast = producer(asked, "Cast")
    if weights is not (operand(cast, 0) if cast is not None else asked):
        return False
    return node.op_type == "IsInf" or math.isinf(scalar(node.inputs[1]) or 0.0)


def _gain(node: ir.Node) -> bool:
    """``node`` multiplies values by weights that were multiplied by what is the same for all keys."""
    scaled = producer(operand(node, 0), "Mul")
    for weights, gain in (scaled.inputs, scaled.inputs[::-1]) if scaled is not None else ():
        softmax = producer(weights, "Softmax")
        if softmax is None or weights is None or gain is None or not _is_last(softmax, weights):
            continue
        sizes = list(gain.shape or ())
        if gain.shape is not None and len(sizes) <= len(weights.shape or ()) and sizes[-1:] in ([], [1]):
            y = insert(node, "MatMul", [weights, node.inputs[1]], name=node.name, shape=node.outputs[0].shape)
            return replace(node.outputs[0], insert(node, "Mul", [y, gain], shape=node.outputs[0].shape))
    return False


def _is_last(softmax: ir.Node, weights: ir.Value) -> bool:
    rank = len(weights.shape or ())
    return rank > 0 and int(attribute(softmax, "axis", -1) or 0) % rank == rank - 1
