"""Tensors brought into the order and grouping of axes that an attention wants, and back.

    q [B, rows, w, columns, w, H*d]  ->  Reshape, Transpose, Reshape  ->  [B*rows*columns, w*w, H*d]
Windows, grids and units of a mask are axes that move between a projection and its attention; so does the sequence
where it comes first. A linear layer works on the last axis alone, which stays where it is: the move is put before the
one that computes an operand, and behind the one that reads the result, so that the layers stand at the attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, Axis, Digit, merged
from xopt.ir.canonical.report import NotAttentionError
from xopt.ir.edit import constant, consumers, initializer, insert, is_op, producer
from xopt.ir.poly import ONE, Poly, product
from xopt.ir.symbolic import Symbols

LAST = "last"
"""Label of a last axis that moves as a whole."""


def move(symbols: Symbols, site: ir.Node, value: ir.Value, axes: Axes, target: Axes) -> ir.Value:
    """``value`` with ``axes`` as one with the axes ``target``, which hold the same digits.

    Raises:
        NotAttentionError: they do not, or more than one size is unknown where shapes need them.
    """
    rows = refined(axes, target)
    wanted = refined(target, rows)
    here, there = ([digit for row in part for digit in row] for part in (rows, wanted))
    if len({*here}) != len(here) or {*here} != {*there}:
        raise NotAttentionError("head-layout")
    if here == there:
        return _reshaped(symbols, site, value, target)
    if any(len(row) != 1 for row in rows):
        value = _reshaped(symbols, site, value, [(digit,) for digit in here])
    value = _made(symbols, site, "Transpose", [value], {"perm": [here.index(digit) for digit in there]})
    return _reshaped(symbols, site, value, target)


def move_operand(symbols: Symbols, site: ir.Node, value: ir.Value, axes: Axes, target: Axes) -> ir.Value:
    """The same for an operand; linear layers that computed it, working on its last axis alone, follow the move."""
    bias = producer(value, "Add")
    matmul = producer(bias.inputs[0] if bias is not None else value, "MatMul")
    if matmul is None or not _is_linear(matmul, bias) or axes[-1] != target[-1]:
        return move(symbols, site, value, axes, target)
    source = matmul.inputs[0]
    dims = symbols.dims(source)
    if source is None or dims is None or len(dims) != len(axes):
        return move(symbols, site, value, axes, target)
    row = (Digit(LAST, dims[-1], ONE, dims[-1]),)
    moved = move(symbols, site, source, (*axes[:-1], row), (*target[:-1], row))
    return _linear(symbols, site, moved, matmul, bias)


def move_result(
    symbols: Symbols, site: ir.Node, y: ir.Value, axes: Axes, old: ir.Value, target: Axes
) -> tuple[ir.Value, ir.Value]:
    """``(value, new)``: the ``new`` that readers of ``value`` are to read, when ``y`` with ``axes`` takes the place of
    ``old`` with the axes ``target``: of ``old`` itself, or of the linear layer that alone reads it.
    """
    readers = consumers(old)
    matmul = readers[0] if len(readers) == 1 and is_op(readers[0], "MatMul") and not old.is_graph_output() else None
    if matmul is None or matmul.inputs[0] is not old or not _is_linear(matmul, None) or axes[-1] != target[-1]:
        return old, move(symbols, site, y, axes, target)
    out = matmul.outputs[0]
    after = consumers(out)
    bias = after[0] if len(after) == 1 and not out.is_graph_output() and _is_linear(matmul, after[0]) else None
    result = bias.outputs[0] if bias is not None else out
    new = _linear(symbols, site, y, matmul, bias)
    width = (symbols.dims(out) or (Poly.unknown(),))[-1]
    row = (Digit(LAST, width, ONE, width),)
    return result, move(symbols, site, new, (*axes[:-1], row), (*target[:-1], row))


def _is_linear(matmul: ir.Node, bias: ir.Node | None) -> bool:
    """Whether these are a product with a constant matrix, and the addition of a constant vector to it."""
    weight = constant(matmul.inputs[1])
    if weight is None or weight.ndim != 2 or bias is None:
        return weight is not None and weight.ndim == 2
    if not is_op(bias, "Add") or bias.inputs[0] is not matmul.outputs[0]:
        return False
    vector = constant(bias.inputs[1])
    return vector is not None and vector.ndim == 1 and vector.shape == weight.shape[1:]


def _linear(symbols: Symbols, site: ir.Node, value: ir.Value, matmul: ir.Node, bias: ir.Node | None) -> ir.Value:
    value = _made(symbols, site, "MatMul", [value, matmul.inputs[1]], {}, matmul.outputs[0].name)
    return value if bias is None else _made(symbols, site, "Add", [value, bias.inputs[1]], {}, bias.outputs[0].name)


def refined(rows: Axes, other: Axes) -> Axes:
    """``rows`` with each digit written as the digits of ``other`` that together are it, where there are such."""
    digits = [digit for row in other for digit in row]
    return tuple(tuple(part for digit in row for part in _parts(digit, digits)) for row in rows)


def _parts(digit: Digit, others: Sequence[Digit]) -> Sequence[Digit]:
    """The digits of ``others`` that ``digit`` is made of, most significant first; itself when they do not fit."""
    parts: list[Digit] = []
    stride = digit.stride
    while stride != digit.stride * digit.count:
        found = next((o for o in others if o.label == digit.label and o.stride == stride and o.count != ONE), None)
        if found is None or len(parts) == len(others):
            return [digit]
        parts.insert(0, found)
        stride = stride * found.count
    return parts if merged(tuple(parts)) == (digit,) else [digit]


def _reshaped(symbols: Symbols, site: ir.Node, value: ir.Value, rows: Sequence[Axis]) -> ir.Value:
    """``value`` with one axis per row."""
    sizes, dims = [product(digit.count for digit in row) for row in rows], symbols.dims(value) or ()
    if tuple(sizes) == dims:
        return value
    kept = [size.constant is None and dims[i : i + 1] == (size,) for i, size in enumerate(sizes)]
    target = [0 if keep else -1 if size.constant is None else size.constant for size, keep in zip(sizes, kept)]
    if target.count(-1) > 1 or any(size == 0 and not keep for size, keep in zip(target, kept)):
        raise NotAttentionError("head-layout")
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    return _made(symbols, site, "Reshape", [value, initializer(graph, "moved", np.asarray(target, np.int64))], {})


def _made(
    symbols: Symbols,
    site: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, list[int]],
    name: str | None = None,
) -> ir.Value:
    return symbols.learn(insert(site, op, inputs, attributes, name=name))
