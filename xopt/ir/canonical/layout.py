"""Where the axes of a tensor come from: layouts followed through Transpose, Reshape, Split, Gather, Expand and the
like.

An axis is a row of *digits*, most significant first, as in a number of mixed radix: the last axis of a projection [B,
S, H*d] is ``(h, d)``. A digit that a slice cut out of a longer run keeps its offset; a digit that is only a part of
an original axis (``h // group``) keeps the stride at which it counts. Moving data permutes and regroups digits and
nothing else, so any chain of such ops is understood, however the exporter spelled it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.ir.edit import input_at
from xopt.ir.poly import ONE, ZERO, Poly, product
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import Dims, Span, integer, permutation, spans_of, split_sizes
from xopt.ir.symbolic import Symbols


@dataclass(frozen=True)
class Digit:
    """``count`` steps of ``stride`` along the original axis ``label``, found at ``offset`` in a run of ``radix``."""

    label: str
    count: Poly
    stride: Poly = ONE
    radix: Poly = ONE
    offset: Poly = ZERO

    @property
    def whole(self) -> bool:
        """Whether no slice cut this digit out of a longer run."""
        return self.radix == self.count


Axis = tuple[Digit, ...]
Axes = tuple[Axis, ...]


def axis(label: str, size: Poly) -> Axis:
    """An axis that is one original axis."""
    return () if size == ONE else (Digit(label, size, ONE, size),)


def is_read(value: ir.Value) -> bool:
    """Whether a node or the caller reads the value: rewrites leave dead nodes behind until they are swept."""
    return bool(value.uses()) or value.is_graph_output()


def before(symbols: Symbols, value: ir.Value, axes: Axes) -> tuple[ir.Value, Axes] | None:
    """The value that ``value``'s producer moved, and its axes; None when the producer does more than move data."""
    node = value.producer()
    rule = _BEFORE.get(op_of(node))
    if node is None or rule is None:
        return None
    found = rule(symbols, node, value, axes)
    source = node.inputs[0]
    return None if found is None or source is None else (source, found)


def after(symbols: Symbols, node: ir.Node, axes: Axes) -> Axes | None:
    """Axes of the first output of a node that moves its first input, which has ``axes``."""
    if op_of(node) in ("Identity", "Dropout"):
        return axes
    if op_of(node) == "Transpose":
        return tuple(axes[i] for i in permutation(node, len(axes)))
    if op_of(node) in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        dims = symbols.dims(node.outputs[0])
        return None if dims is None else regroup(axes, dims)
    return None


def regroup(axes: Axes, dims: Dims) -> Axes | None:
    """The same digits over other axes, as Reshape does; None when sizes do not fit digit boundaries."""
    digits = [digit for row in axes for digit in row if digit.radix != ONE]
    result: list[Axis] = []
    for dim in dims:
        row: list[Digit] = []
        missing: Poly | None = dim
        while missing is not None and missing != ONE:
            if not digits:
                return None
            digit = digits.pop(0)
            rest = missing.exactly(digit.radix)
            if rest is None:
                low = digit.radix.exactly(missing)
                if low is None or not digit.whole:
                    return None
                digits.insert(0, Digit(digit.label, low, digit.stride, low))
                digit, rest = Digit(digit.label, missing, digit.stride * low, missing), ONE
            row.append(digit)
            missing = rest
        result.append(tuple(row))
    return None if digits else tuple(result)


def merged(row: Axis) -> Axis:
    """The same axis with neighbouring parts of one original axis joined."""
    result: list[Digit] = []
    for digit in row:
        last = result[-1] if result else None
        joins = last is not None and last.label == digit.label and last.stride == digit.stride * digit.count
        if last is not None and joins and last.whole and digit.whole:
            count = last.count * digit.count
            result[-1] = Digit(digit.label, count, digit.stride, count)
        else:
            result.append(digit)
    return tuple(result)


def columns(row: Axis, order: tuple[str, ...]) -> npt.NDArray[np.int64] | None:
    """Positions along the axis of its elements, in the order of the labels (earlier is more significant).

    None when a size is symbolic.
    """
    index = np.zeros([1] * len(row), np.int64)
    scale = 1
    for place in range(len(row) - 1, -1, -1):
        digit = row[place]
        count, radix, offset = digit.count.constant, digit.radix.constant, digit.offset.constant
        if count is None or radix is None or offset is None:
            return None
        shape = [1] * len(row)
        shape[place] = count
        index = index + ((np.arange(count) + offset) * scale).reshape(shape)
        scale *= radix
    ranked = sorted(range(len(row)), key=lambda i: (order.index(row[i].label), -(row[i].stride.constant or 0)))
    return index.transpose(ranked).reshape(-1)


def width(row: Axis) -> Poly:
    """Number of positions along the axis, those that slices cut away included."""
    return product(digit.radix for digit in row)


# (symbols, node, output, axes of the output) -> axes of the first input, or None.


def _same(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    return axes


def _transpose(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    perm = permutation(node, len(axes))
    return tuple(axes[perm.index(i)] for i in range(len(axes)))


def _regroup(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    dims = s.dims(node.inputs[0])
    return None if dims is None else regroup(axes, dims)


def _expand(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    source, result = s.dims(node.inputs[0]), s.dims(value)
    if source is None or result is None:
        return None
    kept = axes[len(result) - len(source) :]
    return tuple(() if dim == ONE else row for dim, row in zip(source, kept))


def _tile(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    """Tile of axes of size 1, which is what Expand does."""
    source, result = s.dims(node.inputs[0]), s.dims(value)
    if source is None or result is None or any(old not in (new, ONE) for old, new in zip(source, result)):
        return None
    return _expand(s, node, value, axes)


def _gather(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    """Gather with one constant index: a new axis of which that position is taken."""
    index, dims = s.integers(input_at(node, 1)), s.dims(node.inputs[0])
    if index is None or len(index) != 1 or dims is None:
        return None
    place, keeps = integer(node, "axis", 0) % len(dims), s.rank(node.inputs[1]) == 1
    size = dims[place]
    offset = Poly.of(index[0]) if index[0] >= 0 else size + index[0]
    taken = Digit("", ONE, ONE, size, offset)
    return (*axes[:place], (taken,), *axes[place + keeps :])


def _slice(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    spans, dims = spans_of(s, node), s.dims(node.inputs[0])
    if spans is None or dims is None:
        return None
    result = list(axes)
    for place, span in spans.items():
        if span.size == dims[place]:
            continue
        part = _part(axes[place], span.start, dims[place]) if span.step == 1 else _every(axes[place], span, dims[place])
        if part is None:
            return None
        result[place] = part
    return tuple(result)


def _split(s: Symbols, node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    dims = s.dims(node.inputs[0])
    if dims is None:
        return None
    place = integer(node, "axis", 0) % len(dims)
    start = Poly.of(0)
    for size in split_sizes(s, node, dims[place])[: node.outputs.index(value)]:
        start = start + size
    part = _part(axes[place], start, dims[place])
    return None if part is None else (*axes[:place], part, *axes[place + 1 :])


def _every(row: Axis, span: Span, total: Poly) -> Axis | None:
    """The axis of which ``row`` is every ``step``-th element."""
    if span.step < 1 or span.size * span.step != total or not (Poly.of(span.step - 1) - span.start).at_least(0):
        return None
    return (*row, Digit("", ONE, ONE, Poly.of(span.step), span.start))


def _part(row: Axis, start: Poly, total: Poly) -> Axis | None:
    """The axis of which ``row`` is the part from ``start``: its first digit gets the offset."""
    first = row[0] if row else Digit("", ONE)
    lower = product(digit.radix for digit in row[1:])
    offset, radix = start.exactly(lower), total.exactly(lower)
    if offset is None or radix is None or not first.whole:
        return None
    return (replace(first, radix=radix, offset=offset), *row[1:])


_BEFORE = {
    "Identity": _same,
    "Dropout": _same,
    "Transpose": _transpose,
    "Reshape": _regroup,
    "Squeeze": _regroup,
    "Unsqueeze": _regroup,
    "Flatten": _regroup,
    "Expand": _expand,
    "Tile": _tile,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
}
