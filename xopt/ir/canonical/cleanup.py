"""Remove what does nothing: identities, dropout, casts to the same type, reshapes and transposes that cancel out.

    before   y = Cast(Identity(Dropout(x)), to=float)          after   y = x          (x is float already)
Equal computations are shared, so that later steps see one mean of x, not two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

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
    same_form,
    scalar,
    set_attributes,
    sweep,
)
from xopt.ir.shapes import equal_by_count


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Run every clean-up once, in an order in which each helps the next."""
    for op_types, clean, name in _CLEANUPS:
        report.rewrote(name, sweep(model, op_types, clean))
    DeduplicateInitializersPass(size_limit=1)(model)
    before = sum(1 for _ in model.graph.all_nodes())
    CommonSubexpressionEliminationPass()(model)
    report.rewrote("share-equal", before - sum(1 for _ in model.graph.all_nodes()))
    remove_dead(model)


def _identity(node: ir.Node) -> bool:
    """Identity, and Dropout outside of training (its mask must be unread)."""
    if node.op_type == "Dropout":
        training = input_at(node, 2)
        mask_read = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
        if mask_read or not (training is None or scalar(training) == 0):
            return False
    return _bypass(node)


def _bypass(node: ir.Node) -> bool:
    """Let readers of the node's output read its first input; a graph input stays apart from a graph output, and so does
    what the graph around computes.
    """
    source, result = operand(node, 0), node.outputs[0]
    own = source.producer() is not None and source.graph is node.graph and not source.is_graph_output()
    if result.is_graph_output() and not own:
        return False
    return replace(result, source)


def _cast(node: ir.Node) -> bool:
    """Cast to the type a value has; Cast of a Cast that lost nothing in between."""
    source = operand(node, 0)
    target = ir.DataType(int(attribute(node, "to", 0) or 0))
    if source.dtype == target:
        return _bypass(node)
    inner = producer(source, "Cast")
    if inner is None or not _holds(source.dtype, operand(inner, 0).dtype):
        return False
    node.replace_input_with(0, operand(inner, 0))
    _cast(node)
    return True


def _holds(wide: ir.DataType | None, narrow: ir.DataType | None) -> bool:
    """Whether every value of ``narrow`` is also one of ``wide``."""
    if wide is None or narrow is None or ir.DataType.STRING in (wide, narrow):
        return False
    return bool(np.can_cast(narrow.numpy(), wide.numpy(), casting="safe"))


def _transpose(node: ir.Node) -> bool:
    """Two transposes become one; one that moves nothing goes."""
    perm = _perm(node)
    inner = producer(operand(node, 0), "Transpose")
    changed = False
    if perm is not None and inner is not None:
        first = _perm(inner)
        if first is not None:
            perm = [first[axis] for axis in perm]
            set_attributes(node, perm=perm)
            node.replace_input_with(0, operand(inner, 0))
            changed = True
    if perm == sorted(perm or ()) and perm is not None:
        return _bypass(node)
    return changed


def _perm(node: ir.Node) -> list[int] | None:
    found = node.attributes.get("perm")
    if found is not None:
        return list(found.as_ints())
    shape = operand(node, 0).shape
    return list(reversed(range(len(shape)))) if shape is not None else None


def _reshape(node: ir.Node) -> bool:
    """A reshape to the shape a value has goes; a reshape of a reshape skips the one in between."""
    shape, inner = node.outputs[0].shape, producer(operand(node, 0), "Reshape", "Squeeze", "Unsqueeze", "Flatten")
    sources = [operand(node, 0)] + ([operand(inner, 0)] if inner is not None else [])
    for source in sources:
        if shape is not None and source.shape is not None and equal_by_count(source.shape, shape):
            node.replace_input_with(0, source)
            return _bypass(node)
    target = constant(input_at(node, 1)) if node.op_type == "Reshape" else None
    if inner is None or target is None or 0 in target:
        return False
    node.replace_input_with(0, operand(inner, 0))
    return True


def _certainly_equal(a: ir.Shape, b: ir.Shape | None) -> bool:
    if b is None or len(a) != len(b):
        return False
    return all(isinstance(x, int) or x.value is not None for x in a) and list(a) == list(b)


def _neutral(node: ir.Node) -> bool:
    """``x + 0``, ``x - 0``, ``x * 1``, ``x / 1``, where the constant does not broadcast x to another shape."""
    neutral = 0.0 if node.op_type in ("Add", "Sub") else 1.0
    left, right = operand(node, 0), operand(node, 1)
    if node.op_type in ("Add", "Mul") and scalar(left) == neutral:
        left, right = right, left
    if scalar(right) != neutral or left.shape is None or not same_form(node.outputs[0], left):
        return False
    node.replace_input_with(0, left)
    return _bypass(node)


def _constant_right(node: ir.Node) -> bool:
    """Constants are the second operand of what commutes: ``c + x`` becomes ``x + c``."""
    left, right = operand(node, 0), operand(node, 1)
    if left.const_value is None or right.const_value is not None:
        return False
    node.replace_input_with(0, right)
    node.replace_input_with(1, left)
    return True


def _expand(node: ir.Node) -> bool:
    """Expand to the shape a value has, or where every reader would broadcast by itself to the same result."""
    source, result = operand(node, 0), node.outputs[0]
    return source.shape is not None and _certainly_equal(source.shape, result.shape) and _bypass(node)


def _rows(node: ir.Node) -> bool:
    """GatherND of whole rows at constant places, which is Gather; exporters write ``x[:, [-2]]`` so."""
    places = constant(input_at(node, 1))
    if places is None or node.graph is None or places.shape[-1:] != (1,) or attribute(node, "batch_dims", 0):
        return False
    shape = node.outputs[0].shape
    rows = initializer(node.graph, f"{node.name}/rows", places[..., 0])
    return replace(node.outputs[0], insert(node, "Gather", [operand(node, 0), rows], {"axis": 0}, shape=shape))


def _range(node: ir.Node) -> bool:
    """Range from, to or by a vector of one number, which runtimes take as the scalar that ONNX asks for."""
    vectors = [place for place in range(3) if len(operand(node, place).shape or ()) == 1]
    for place in vectors:
        assert node.graph is not None
        scalar = initializer(node.graph, f"{node.name}/scalar", np.array([], np.int64))
        node.replace_input_with(place, insert(node, "Reshape", [operand(node, place), scalar], shape=[]))
    return bool(vectors)


def _concat(node: ir.Node) -> bool:
    return len(node.inputs) == 1 and _bypass(node)


def _slice(node: ir.Node) -> bool:
    """A slice that keeps everything."""
    starts, ends, steps = (constant(input_at(node, i)) for i in (1, 2, 4))
    if starts is None or ends is None or np.any(starts) or (input_at(node, 4) is not None and steps is None):
        return False
    if steps is not None and np.any(steps != 1):
        return False
    source, result = operand(node, 0), node.outputs[0]
    whole = bool(np.all(ends.astype(np.int64) >= np.iinfo(np.int32).max))
    return (whole or (source.shape is not None and _certainly_equal(source.shape, result.shape))) and _bypass(node)


_CLEANUPS: tuple[tuple[tuple[str, ...], Callable[[ir.Node], bool], str], ...] = (
    (("Identity", "Dropout"), _identity, "remove-identity"),
    (("Cast",), _cast, "remove-cast"),
    (("Add", "Mul"), _constant_right, "constant-right"),
    (("Add", "Sub", "Mul", "Div"), _neutral, "remove-neutral"),
    (("Transpose",), _transpose, "merge-transpose"),
    (("Expand",), _expand, "remove-expand"),
    (("Range",), _range, "range-of-vectors"),
    (("Concat",), _concat, "remove-concat"),
    (("GatherND",), _rows, "gather-rows"),
    (("Slice",), _slice, "remove-slice"),
    (("Reshape", "Squeeze", "Unsqueeze"), _reshape, "merge-reshape"),
)
