"""A mask that was applied to scores of other axes (windows, flattened heads), as one over [B, H, S, T]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, Digit, merged
from xopt.ir.canonical.moving import refined
from xopt.ir.canonical.report import NotAttentionError
from xopt.ir.edit import initializer, insert, operand, producer
from xopt.ir.poly import ONE, Poly, product
from xopt.ir.symbolic import Symbols


def in_four_axes(symbols: Symbols, site: ir.Node, value: ir.Value, axes: Axes, frame: Axes) -> ir.Value:
    """``value``, which broadcasts over ``axes``, as one that broadcasts over ``frame`` [batch, head, query, key].

    Both are the same digits, grouped differently and perhaps in another order. Where one axis of the frame is made of
    a broadcast and a present part (windows shared by all images), the value is expanded to the whole axis.

    Raises:
        NotAttentionError: the digits are not the same, or a size that is needed is not known.
    """
    if [merged(row) for row in axes] == list(frame):
        return value
    dims = symbols.dims(value)
    if dims is None:
        raise NotAttentionError("mask-rank")
    dims = (ONE,) * (len(axes) - len(dims)) + dims
    axes = refined(axes, refined(frame, axes))
    here, there = ([digit for row in part for digit in row] for part in (axes, refined(frame, axes)))
    if {*here} != {*there}:
        raise NotAttentionError("mask-layout")
    if here != there:
        value, axes = _in_order(symbols, site, value, axes, dims, there)
        dims = symbols.dims(value) or ()
    present = {digit for row, dim in zip(axes, dims) if dim != ONE for digit in row}
    target: list[Poly] = []
    missing: set[Digit] = set()
    for row in refined(frame, axes):
        inside = [digit for digit in row if digit in present]
        missing |= {*row} - {*inside} if inside else set()
        target.append(product(d.count for d in row) if inside else ONE)
    if missing:
        value = _expanded(symbols, site, value, axes, missing)
    return _reshaped(symbols, site, value, target)


def _in_order(
    symbols: Symbols, site: ir.Node, value: ir.Value, axes: Axes, dims: tuple[Poly, ...], order: list[Digit]
) -> tuple[ir.Value, Axes]:
    """``value`` with an axis per digit, in this order, and these axes."""
    digits = [digit for row in axes for digit in row]
    present = {digit for row, dim in zip(axes, dims) if dim != ONE for digit in row}
    value = _reshaped(symbols, site, value, [digit.count if digit in present else ONE for digit in digits])
    value = symbols.learn(insert(site, "Transpose", [value], {"perm": [digits.index(digit) for digit in order]}))
    return value, tuple((digit,) for digit in order)


def _expanded(symbols: Symbols, site: ir.Node, value: ir.Value, axes: Axes, missing: set[Digit]) -> ir.Value:
    """``value`` [1, windows, ...] repeated for every image: the axes of ``missing`` digits at full size."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    parts: list[ir.Value] = []
    for row in axes:
        wanted = product(digit.count for digit in row) if missing.issuperset(row) else ONE
        if wanted.constant is not None:
            parts.append(initializer(graph, "windows", np.asarray([wanted.constant], np.int64)))
        else:
            parts.append(_size_at_run_time(symbols, site, wanted))
    shape = symbols.learn(insert(site, "Concat", parts, {"axis": 0}, dtype=ir.DataType.INT64))
    return symbols.learn(insert(site, "Expand", [value, shape]))


def _size_at_run_time(symbols: Symbols, site: ir.Node, size: Poly) -> ir.Value:
    """A dimension of the graph's inputs, as a vector of one element."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    for source in graph.inputs:
        for place, dim in enumerate(symbols.dims(source) or ()):
            if dim == size:
                bounds = {"start": place, "end": place + 1}
                return insert(site, "Shape", [source], bounds, dtype=ir.DataType.INT64, shape=[1])
    raise NotAttentionError("mask-expand")


def _reshaped(symbols: Symbols, site: ir.Node, value: ir.Value, target: list[Poly]) -> ir.Value:
    """``value`` reshaped to ``target``, or what it was before it was reshaped otherwise; of its sizes that are not
    known one is inferred, the others stay in place.

    Raises:
        NotAttentionError: more than one such size is new, or at another place counted from the last axis.
    """
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    dims = symbols.dims(value) or ()
    earlier = producer(value, "Reshape", "Unsqueeze", "Squeeze")
    if earlier is not None and symbols.dims(earlier.inputs[0]) == tuple(target):
        return operand(earlier, 0)
    numbers = [size.constant for size in target]
    if numbers.count(None) > 1 and (missing := len(target) - len(dims)) > 0:
        front = initializer(graph, "mask_front", np.arange(missing, dtype=np.int64))
        value = symbols.learn(insert(site, "Unsqueeze", [value, front]))
        dims = (ONE,) * missing + dims
    if numbers.count(None) > 1:
        numbers = [0 if number is None and size == dim else number for number, size, dim in zip(numbers, target, dims)]
    if numbers.count(None) > 1 or len(numbers) != len(target):
        raise NotAttentionError("mask-sizes")
    shape = [-1 if number is None else number for number in numbers]
    table = initializer(graph, "mask_shape", np.asarray(shape, np.int64))
    return symbols.learn(insert(site, "Reshape", [value, table]))
