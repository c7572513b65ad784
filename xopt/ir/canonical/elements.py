"""A tensor as a function of its indices: what one element is, by index, found by reading the graph backwards.

    mask[b, h, q, k]   of   And(LessOrEqual(Range[None,None,None,:], Range[None,None,:,None]),
    GatherND(attention_mask, ...)) is   k <= q  and  attention_mask[b, k]
Index arithmetic is carried out on polynomials, so it does not matter through which Range, Unsqueeze, Expand, Slice,
Gather or Reshape an index went. An element that is not understood is a *leaf*: the element of some tensor at known
indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import constant, input_at, kind_of
from xopt.ir.poly import ONE, ZERO, Poly, product
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import Dims, integer, operands, permutation, spans_of
from xopt.ir.symbolic import Symbols

Indices = tuple[Poly, ...]


@dataclass(frozen=True)
class Element:
    """One element: ``op`` of ``args``.

    Ops: ``number`` (value), ``index`` (position), ``leaf`` (tensor, at), ``and`` ``or`` ``not`` ``where`` ``ge``
    ``eq`` ``add`` ``mul`` ``truth`` (args). Booleans are numbers 0 and 1; ``truth`` is ``arg != 0``.
    """

    op: str
    args: tuple[Element, ...] = ()
    value: float = 0.0
    position: Poly = ZERO
    tensor: ir.Value | None = None
    at: Indices = ()

    @property
    def symbols(self) -> frozenset[str]:
        """Indices that the element depends on."""
        own = self.position.symbols.union(*(index.symbols for index in self.at))
        return own.union(*(arg.symbols for arg in self.args))

    @property
    def leaves(self) -> tuple[Element, ...]:
        """All leaves, in order."""
        return (self,) if self.op == "leaf" else tuple(leaf for arg in self.args for leaf in arg.leaves)


def number(value: float) -> Element:
    """A constant element."""
    return Element("number", value=float(value))


TRUE, FALSE = number(1), number(0)
LARGEST = 500
"""Steps back that are taken for one mask; masks of real models take fewer than 100."""


class Reader:
    """Reads elements of the values of one graph.

    Args:
        ranges: sizes of the axes that index symbols run over.
    """

    def __init__(self, symbols: Symbols, ranges: Mapping[str, Poly]) -> None:
        self.symbols = symbols
        self.ranges = ranges
        self.left = LARGEST

    def element(self, value: ir.Value, at: Indices) -> Element:
        """The element of ``value`` at ``at`` (one index per axis)."""
        fixed = self._known(value, at) or _constant_element(constant(value), at)
        if fixed is not None:
            return fixed
        node = value.producer()
        self.left -= 1
        if node is None or not op_of(node) or constant(value) is not None or self.left < 0:
            return Element("leaf", tensor=value, at=at)
        found = self._computed(node, at) or self._moved(node, value, at)
        return found if found is not None else Element("leaf", tensor=value, at=at)

    def _known(self, value: ir.Value, at: Indices) -> Element | None:
        """A number that shape arithmetic computes."""
        numbers = self.symbols.numbers(value) if value.producer() is not None else None
        if numbers is None or len(at) > 1:
            return None
        place = at[0].constant if at else 0
        return Element("index", position=numbers[place]) if place is not None and place < len(numbers) else None

    def broadcast(self, value: ir.Value, at: Indices) -> Element | None:
        """The element that broadcasting ``value`` puts at ``at``; None when its shape is unknown.

        Named axes that meet are taken to be equal, as the exporter of a model took them to be.
        """
        dims = self.symbols.dims(value)
        if dims is None or len(dims) > len(at):
            return None
        indices = at[len(at) - len(dims) :]
        if not all(self._spans(dim, index) for dim, index in zip(dims, indices)):
            return None
        return self.element(value, tuple(ZERO if dim == ONE else i for dim, i in zip(dims, indices)))

    def _spans(self, dim: Poly, index: Poly) -> bool:
        """Whether an axis of size ``dim`` is 1, or as long as what ``index`` runs over: others may turn out to be 1."""
        if dim == ONE:
            return True
        size = self.ranges.get(next(iter(index.symbols))) if index.is_symbol else None
        if size is None:
            return dim.is_of_axes
        return size == dim or _is_cut(dim, size) or (dim.is_of_axes and (size - dim).constant is None)

    def _computed(self, node: ir.Node, at: Indices) -> Element | None:
        """Element of an elementwise op, Range, Trilu or fill."""
        if node.op_type == "Range":
            start, step = self.symbols.numbers(node.inputs[0]), self.symbols.numbers(node.inputs[2])
            return None if start is None or step is None else Element("index", position=start[0] + at[0] * step[0])
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return number(float(fill.as_tensor().numpy().reshape(-1)[0]) if fill is not None else 0.0)
        if node.op_type == "Trilu":
            return self._triangle(node, at)
        if node.op_type not in _COMPUTED:
            return None
        args = [self.broadcast(value, at) if value is not None else None for value in node.inputs]
        return None if None in args else _COMPUTED[node.op_type](node, *args)

    def _triangle(self, node: ir.Node, at: Indices) -> Element | None:
        given = input_at(node, 1)
        offset = [0] if given is None else self.symbols.integers(given)
        inside = self.broadcast(node.inputs[0], at)  # type: ignore[arg-type]
        if inside is None or not offset:
            return None
        row, column = Element("index", position=at[-2] + offset[0]), Element("index", position=at[-1])
        keep = at_least(column, row) if integer(node, "upper", 1) else at_least(row, column)
        return where(keep, inside, FALSE)

    def _moved(self, node: ir.Node, value: ir.Value, at: Indices) -> Element | None:
        """Element of a value that only moves data: that of its source, at other indices."""
        source, s = node.inputs[0] if node.inputs else None, self.symbols
        dims = s.dims(source)
        if source is None or dims is None:
            return None
        if node.op_type == "Expand":
            return self.broadcast(source, at)
        if node.op_type == "Transpose":
            perm = permutation(node, len(at))
            return self.element(source, tuple(at[perm.index(i)] for i in range(len(at))))
        if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            found = self._reindexed(s.dims(value), dims, at)
            return None if found is None else self.element(source, found)
        if node.op_type == "Slice":
            spans = spans_of(s, node)
            if spans is None or any(span.step < 1 for span in spans.values()):
                return None
            shifted = [spans[i].start + index * spans[i].step if i in spans else index for i, index in enumerate(at)]
            return self.element(source, tuple(shifted))
        if node.op_type == "Gather":
            return self._gathered(node, source, len(dims), at)
        if node.op_type == "GatherND":
            return self._gathered_nd(node, source, at)
        if node.op_type == "Concat" and at[integer(node, "axis", 0)].constant is not None:
            return self._concatenated(node, at)
        return None

    def _reindexed(self, dims: Dims | None, source: Dims, at: Indices) -> Indices | None:
        """Indices into a tensor of shape ``source`` that was reshaped to ``dims``."""
        if dims is None:
            return None
        long, wanted = [i for d, i in zip(dims, at) if d != ONE], [d for d in source if d != ONE]
        if [d for d in dims if d != ONE] == wanted:
            rest = iter(long)
            return tuple(ZERO if d == ONE else next(rest) for d in source)
        flat = ZERO
        for place, index in enumerate(at):
            flat = flat + index * product(dims[place + 1 :])
        found: list[Poly] = []
        for dim in reversed(source[1:]):
            pair = self._divided(flat, dim)
            if pair is None:
                return None
            flat, low = pair
            found.append(low)
        return (flat, *reversed(found)) if source else None

    def _divided(self, flat: Poly, dim: Poly) -> tuple[Poly, Poly] | None:
        """Quotient and remainder of a flat index."""
        high = low = ZERO
        for monomial, coefficient in flat.terms:
            term = Poly(((monomial, coefficient),))
            quotient = term.exactly(dim)
            high, low = (high + quotient, low) if quotient is not None else (high, low + term)
        inside = low == ZERO or (low.is_symbol and self.ranges.get(next(iter(low.symbols))) == dim)
        small = low.constant is not None and dim.constant is not None and low.constant < dim.constant
        return (high, low) if inside or small else None

    def _gathered(self, node: ir.Node, source: ir.Value, rank: int, at: Indices) -> Element | None:
        indices, axis = node.inputs[1], integer(node, "axis", 0) % rank
        count = self.symbols.rank(indices)
        if indices is None or count is None:
            return None
        index = self.element(indices, at[axis : axis + count])
        position = _position(index)
        if position is None:
            return None
        return self.element(source, (*at[:axis], position, *at[axis + count :]))

    def _gathered_nd(self, node: ir.Node, source: ir.Value, at: Indices) -> Element | None:
        indices = node.inputs[1]
        dims = self.symbols.dims(indices)
        depth = dims[-1].constant if dims else None
        if indices is None or dims is None or depth is None or integer(node, "batch_dims", 0):
            return None
        outer = at[: len(dims) - 1]
        found = [_position(self.element(indices, (*outer, Poly.of(i)))) for i in range(depth)]
        return None if None in found else self.element(source, (*found, *at[len(dims) - 1 :]))  # type: ignore[arg-type]

    def _concatenated(self, node: ir.Node, at: Indices) -> Element | None:
        axis = integer(node, "axis", 0) % len(at)
        wanted = at[axis].constant
        for value in node.inputs:
            dims = self.symbols.dims(value)
            size = dims[axis].constant if dims is not None else None
            if value is None or size is None or wanted is None:
                return None
            if wanted < size:
                return self.element(value, (*at[:axis], Poly.of(wanted), *at[axis + 1 :]))
            wanted -= size
        return None


def _is_cut(dim: Poly, size: Poly) -> bool:
    """Whether ``dim`` is that of a table of n > 1 entries cut to ``size``: as long as it, or the two do not fit."""
    parts = operands(dim, "min")
    return len(parts) == 2 and str(size) in parts and any(part.isdecimal() and int(part) > 1 for part in parts)


def _position(element: Element) -> Poly | None:
    if element.op == "index":
        return element.position
    whole = element.op == "number" and element.value.is_integer()
    return Poly.of(int(element.value)) if whole else None


def at_least(a: Element, b: Element) -> Element:
    """``a >= b``."""
    left, right = _position(a), _position(b)
    if left is not None and right is not None:
        if (left - right).at_least(0):
            return TRUE
        if (right - left).at_least(1):
            return FALSE
    return Element("ge", (a, b))


def negated(a: Element) -> Element:
    """``not a``."""
    if a.op == "number":
        return number(a.value == 0)
    if a.op == "not":
        return a.args[0]
    left, right = (_position(arg) for arg in a.args) if a.op == "ge" else (None, None)
    if left is not None and right is not None:  # integers: not (a >= b) is b >= a + 1
        return at_least(a.args[1], Element("index", position=left + 1))
    return Element("not", (a,))


def both(a: Element, b: Element) -> Element:
    """``a and b``."""
    if FALSE in (a, b):
        return FALSE
    return b if a in (TRUE, b) else a if b == TRUE else Element("and", (a, b))


def where(condition: Element, a: Element, b: Element) -> Element:
    """``a`` where the condition holds, else ``b``."""
    if condition.op == "number":
        return a if condition.value else b
    if a == b:
        return a
    if (a, b) == (TRUE, FALSE):
        return condition
    return negated(condition) if (a, b) == (FALSE, TRUE) else Element("where", (condition, a, b))


def either(a: Element, b: Element) -> Element:
    """``a or b``."""
    if TRUE in (a, b):
        return TRUE
    return b if a in (FALSE, b) else a if b == FALSE else Element("or", (a, b))


def _sum(a: Element, b: Element, sign: int = 1) -> Element:
    if a.op == b.op == "number":
        return number(a.value + sign * b.value)
    left, right = _position(a), _position(b)
    if left is not None and right is not None and "index" in (a.op, b.op):
        return Element("index", position=left + right * sign)
    if b == FALSE:
        return a
    if a.op == "number" and b.op in BOOLEAN:
        return where(b, number(a.value + sign), a)
    return b if a == FALSE and sign == 1 else Element("add", (a, b if sign == 1 else _product(b, number(-1))))


def _largest(a: Element, b: Element) -> Element | None:
    if a.op == b.op == "number":
        return number(max(a.value, b.value))
    for one, other in ((a, b), (b, a)):
        if other.op == "number" and one.op == "where":
            x, y = (_largest(arg, other) for arg in one.args[1:])
            return None if x is None or y is None else where(one.args[0], x, y)
    return None


def _product(a: Element, b: Element) -> Element:
    if a.op == b.op == "number":
        return number(a.value * b.value)
    left, right = _position(a), _position(b)
    if left is not None and right is not None:
        return Element("index", position=left * right)
    for one, other in ((a, b), (b, a)):
        if other.op == "number" and one.op == "where":
            return where(one.args[0], _product(one.args[1], other), _product(one.args[2], other))
        if one.op in BOOLEAN and (other.op == "where" or (other.op == "number" and other.value != 1)):
            return where(one, other, FALSE)
    return b if a == TRUE else a if b == TRUE else Element("mul", (a, b))


BOOLEAN = ("and", "or", "not", "ge", "eq", "truth")
"""Ops whose elements are 0 or 1."""


def _cast(node: ir.Node, a: Element) -> Element | None:
    target = ir.DataType(node.attributes["to"].as_int())
    to_bool = target == ir.DataType.BOOL
    if target.is_integer() and a.op == "leaf" and (a.tensor is None or not _is_whole(a.tensor.dtype)):
        return None  # what is behind the point is cut off
    if not to_bool or a.op in BOOLEAN:
        return a
    if a.op == "number":
        return number(a.value != 0)
    return _truth(a)


def _is_whole(dtype: ir.DataType | None) -> bool:
    return dtype is not None and (dtype.is_integer() or dtype == ir.DataType.BOOL)


def _truth(a: Element) -> Element:
    """``a != 0``."""
    known = a.op == "leaf" and a.tensor is not None and a.tensor.dtype == ir.DataType.BOOL
    return a if known else Element("truth", (a,))


def _equal(a: Element, b: Element) -> Element:
    left, right = _position(a), _position(b)
    if left is not None and right is not None:
        if left == right:
            return TRUE
        if (left - right).constant is not None:
            return FALSE
    if b == FALSE and a.op == "leaf":
        return negated(_truth(a))
    if a.op in BOOLEAN and b in (TRUE, FALSE):
        return a if b == TRUE else negated(a)
    return Element("eq", (a, b))


_COMPUTED: dict[str, Callable[..., Element | None]] = {
    "Identity": lambda node, a: a,
    "Cast": _cast,
    "Not": lambda node, a: negated(a),
    "And": lambda node, a, b: both(a, b),
    "BitwiseAnd": lambda node, a, b: both(a, b),
    "Or": lambda node, a, b: either(a, b),
    "BitwiseOr": lambda node, a, b: either(a, b),
    "GreaterOrEqual": lambda node, a, b: at_least(a, b),
    "LessOrEqual": lambda node, a, b: at_least(b, a),
    "Greater": lambda node, a, b: negated(at_least(b, a)),
    "Less": lambda node, a, b: negated(at_least(a, b)),
    "Equal": lambda node, a, b: _equal(a, b),
    "Where": lambda node, c, a, b: where(c, a, b),
    "Add": lambda node, a, b: _sum(a, b),
    "Sub": lambda node, a, b: _sum(a, b, -1),
    "Mul": lambda node, a, b: _product(a, b),
    "Max": lambda node, a, *rest: _largest(a, *rest) if len(rest) == 1 else None,
    "Neg": lambda node, a: _product(a, number(-1)),
}


def _constant_element(array: np.ndarray | None, at: Indices) -> Element | None:
    """Element of a constant that is uniform, counts along its last axis, or is split by the diagonal; else None."""
    if array is None or array.size == 0 or kind_of(array) not in "fiub":
        return None
    first = array.reshape(-1)[0]
    if array.size == 1 or np.all(array == first):
        return number(float(first))
    if (
        array.dtype.kind in "iu"
        and array.size == array.shape[-1]
        and np.array_equal(array.reshape(-1), first + np.arange(array.size))
    ):
        return Element("index", position=at[-1] + int(first))
    if array.ndim < 2 or array.size != array.shape[-1] * array.shape[-2] or min(array.shape[-2:]) < 2:
        return None
    rows, columns = array.shape[-2:]
    matrix = array.reshape(rows, columns)
    low, high = matrix[-1, 0], matrix[0, -1]
    if not np.array_equal(matrix, np.where(np.tri(rows, columns, dtype=bool), low, high)):
        return None
    keep = at_least(Element("index", position=at[-2]), Element("index", position=at[-1]))
    return where(keep, number(float(low)), number(float(high)))
