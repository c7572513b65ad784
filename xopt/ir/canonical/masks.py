"""Masks of attention: what is causal, what is padding, what is a bias.

    where(k <= q, 0, -3e38)                                  ->   is_causal=1
    where(k <= q and attention_mask[b, k], 0, -inf)          ->   is_causal=1, attn_mask = bool [B,1,1,T]
    where(attention_mask[b, k], 0, -3e38)                    ->   attn_mask = float [B,1,1,T]
    position_bias[h, q, k] + where(...)                      ->   attn_mask = float [1|B,H,S,T]
A mask that is only causal vanishes, one that depends on keys alone becomes [B,1,1,T], any other stays as it is with
four axes.

A row without any key to attend to is where masks differ that otherwise mean the same. Filled with -inf it is NaN, or
zeros by the exporter's guard: zeros in a boolean mask. Filled with a finite number it is a mean over all keys, those of
the future too: that fill stays a number, and such a mask is only causal when no row can be without a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.elements import FALSE, TRUE, Element, Reader, both, either, negated
from xopt.ir.edit import constant, initializer, insert, is_op, producer, scalar
from xopt.ir.poly import ONE, ZERO, Poly
from xopt.ir.symbolic import Symbols

LOWEST = -1e4
"""Added to a score, anything at or below this leaves a weight of zero."""
COMPARISONS = {"ge": "GreaterOrEqual", "eq": "Equal"}
BATCH, HEAD, QUERY, KEY = (Poly.of(name) for name in ("@batch", "@head", "@query", "@key"))
POSITION = (BATCH, HEAD, QUERY, KEY)


@dataclass(frozen=True)
class Term:
    """One mask on the scores [B,H,S,T]: ``value`` (broadcast from the right) times ``factor``.

    ``kind`` is ``"add"``, or for booleans ``"keep"`` (True attends) or ``"drop"`` (True does not); ``finite`` when
    these put a finite number in the place of scores.
    """

    kind: str
    value: ir.Value
    factor: float = 1.0
    finite: bool = False


@dataclass(frozen=True)
class Mask:
    """The canonical mask; ``hides_rows`` when what it adds may leave a row without any finite score."""

    value: ir.Value | None
    causal: bool
    hides_rows: bool = False


@dataclass
class Masks:
    """Builds the masks of one graph; sites that need the same mask share it."""

    symbols: Symbols
    made: dict[object, ir.Value] = field(default_factory=dict)
    dtype: ir.DataType = ir.DataType.FLOAT

    def build(self, site: ir.Node, terms: Sequence[Term], sizes: Sequence[Poly]) -> Mask:
        """Canonical mask of all ``terms`` over scores of ``sizes`` [B,H,S,T], put before ``site``."""
        if not terms:
            return Mask(None, False)
        self.dtype = site.outputs[0].dtype or ir.DataType.FLOAT
        reader = Reader(self.symbols, {next(iter(p.symbols)): size for p, size in zip(POSITION, sizes)})
        split = [part for term in terms for part in _summands(term)]
        conditions = [_condition(reader, part) for part in split]
        causal, rest = _sorted_out(conditions)
        if rest != TRUE:  # a row may be without keys: what it is then depends on the fill
            split = [self._added(site, part) for part in split]
            conditions = [None if _is_finite(reader, part) else one for part, one in zip(split, conditions)]
            causal, rest = _sorted_out(conditions)
        biases = [part for part, condition in zip(split, conditions) if condition is None]
        keep = None if rest == TRUE or (biases and not causal) else self._boolean(site, rest)
        if rest != TRUE and keep is None:
            shown = [self._shown(site, term) for term in terms] if not biases else None
            whole = self._all(site, shown) if shown else self._as_it_is(site, [self._added(site, t) for t in terms])
            return Mask(whole, False, hides_rows=whole.dtype != ir.DataType.BOOL)
        bias = self._sum(site, [self._bias(site, reader, part) for part in biases])
        if bias is not None and keep is not None:
            return Mask(self._masked(site, keep, bias), causal, hides_rows=True)
        finite = all(_adds_finite_numbers(reader, part) for part in biases)
        return Mask(bias if bias is not None else keep, causal, hides_rows=not finite)

    def _added(self, site: ir.Node, term: Term) -> Term:
        """A term that puts a finite number in the place of scores, as one that is added: so low that they vanish."""
        if not term.finite:
            return term
        value, (shown, hidden) = term.value, (self._number(site, 0.0), self._number(site, float(self.dtype.min)))
        branches = (shown, hidden) if term.kind == "keep" else (hidden, shown)
        return Term("add", self._made(site, "Where", [value, *branches], dtype=self.dtype))

    def _shown(self, site: ir.Node, term: Term) -> ir.Value:
        """Where a term that is a condition holds, as a tensor that the graph has, or a comparison of one."""
        if term.kind != "add":
            wanted = self.four_axes(site, term.value)
            return self._made(site, "Not", [wanted]) if term.kind == "drop" else wanted
        choice = producer(term.value, "Where")
        numbers = [scalar(value) for value in choice.inputs[1:]] if choice is not None else []
        if choice is not None and choice.inputs[0] is not None and None not in numbers:
            chosen, other = (number * term.factor <= LOWEST for number in numbers if number is not None)
            if chosen != other:
                return self._shown(site, Term("drop" if chosen else "keep", choice.inputs[0]))
        return self._made(site, "Greater", [self._scaled(site, term), self._number(site, LOWEST)])

    def _all(self, site: ir.Node, conditions: Sequence[ir.Value]) -> ir.Value:
        """Where all conditions hold."""
        whole = conditions[0]
        for condition in conditions[1:]:
            whole = self._made(site, "And", [whole, condition])
        return whole

    def _as_it_is(self, site: ir.Node, terms: Sequence[Term]) -> ir.Value:
        """All terms, with four axes, without a closer look at what they are."""
        added = self._sum(site, [self._scaled(site, t) for t in terms if t.kind == "add"])
        shown = [self._shown(site, term) for term in terms if term.kind != "add"]
        keep = self._all(site, shown) if shown else None
        if added is None or keep is None:
            result = added if added is not None else keep
            assert result is not None
            return result
        return self._masked(site, keep, added)

    def _masked(self, site: ir.Node, keep: ir.Value, bias: ir.Value) -> ir.Value:
        lowest = self._number(site, float(self.dtype.min))
        return self._made(site, "Where", [keep, bias, lowest], dtype=bias.dtype)

    def _sum(self, site: ir.Node, values: Sequence[ir.Value]) -> ir.Value | None:
        total: ir.Value | None = None
        for value in values:
            total = value if total is None else self._made(site, "Add", [total, value])
        return total

    def _bias(self, site: ir.Node, reader: Reader, term: Term) -> ir.Value:
        """An additive term, reduced to [B,1,1,T] when it depends on keys alone."""
        dims = self.symbols.dims(term.value)
        element = reader.broadcast(term.value, POSITION)
        if element is None or dims is None or len(dims) < 2 or dims[-2] == ONE:
            return self._scaled(site, term)
        if element.symbols & (HEAD.symbols | QUERY.symbols):
            return self._scaled(site, term)
        emitted = self._emit(site, element, boolean=False)
        if emitted is None:
            return self._scaled(site, term)
        return emitted if term.factor == 1 else self._made(site, "Mul", [emitted, self._number(site, term.factor)])

    def _scaled(self, site: ir.Node, term: Term) -> ir.Value:
        value = self.four_axes(site, term.value)
        return value if term.factor == 1 else self._made(site, "Mul", [value, self._number(site, term.factor)])

    def four_axes(self, site: ir.Node, value: ir.Value) -> ir.Value:
        """``value`` with leading axes of size 1 up to four."""
        rank = self.symbols.rank(value)
        if rank is None or rank >= 4:
            return value
        key = ("rank", value)
        if key not in self.made:
            array = constant(value)
            graph = site.graph
            assert isinstance(graph, ir.Graph)
            if array is not None:
                shaped = array.reshape((1,) * (4 - rank) + array.shape)
                self.made[key] = initializer(graph, f"{value.name}/mask", shaped)
            else:
                axes = initializer(graph, "axes", np.arange(4 - rank, dtype=np.int64))
                self.made[key] = self._insert(site, "Unsqueeze", [value, axes])
        return self.made[key]

    def _boolean(self, site: ir.Node, element: Element) -> ir.Value | None:
        """A boolean [B|1, H|1, S|1, T|1] of the element; None when it cannot be written as ops on its leaves."""
        return self._emit(site, element, boolean=True)

    def _emit(self, site: ir.Node, element: Element, boolean: bool) -> ir.Value | None:
        key = (element, boolean, self.dtype)
        if key not in self.made:
            found = self._emitted(site, element, boolean)
            if found is None:
                return None
            self.made[key] = found
        return self.made[key]

    def _emitted(self, site: ir.Node, element: Element, boolean: bool) -> ir.Value | None:
        if element.op == "leaf":
            value = self._leaf(site, element)
            wanted = ir.DataType.BOOL if boolean else self.dtype
            if value is None or (value.dtype == wanted):
                return value
            return self._made(site, "Cast", [value], {"to": int(wanted)}, dtype=wanted)
        if element.op == "number" and not boolean:
            return self._number(site, element.value)
        if element.op == "where" and not boolean:
            parts = [self._emit(site, arg, not index) for index, arg in enumerate(element.args)]
            return None if None in parts else self._made(site, "Where", parts, dtype=self.dtype)
        if element.op == "truth":
            return self._emit(site, element.args[0], True) if boolean else None
        if element.op in COMPARISONS:
            return self._compared(site, element) if boolean else None
        op = {"and": "And", "or": "Or", "not": "Not", "add": "Add", "mul": "Mul"}.get(element.op)
        if op is None or (op in ("Add", "Mul")) == boolean:
            return None
        args = [self._emit(site, arg, boolean) for arg in element.args]
        return None if None in args else self._made(site, op, args)

    def _compared(self, site: ir.Node, element: Element) -> ir.Value | None:
        """A comparison of elements of tensors and numbers, in the type of the tensors."""
        leaves = [self._leaf(site, arg) for arg in element.args if arg.op == "leaf"]
        types = {leaf.dtype if leaf is not None else None for leaf in leaves}
        dtype, rest = next(iter(types), None), iter(leaves)
        if dtype is None or len(types) != 1 or not all(_fits(arg, dtype) for arg in element.args):
            return None
        parts = [next(rest) if arg.op == "leaf" else self._number(site, arg.value, dtype) for arg in element.args]
        return self._made(site, COMPARISONS[element.op], parts)

    def _leaf(self, site: ir.Node, leaf: Element) -> ir.Value | None:
        """The leaf's tensor with its indices moved to the four axes."""
        dims, value = self.symbols.dims(leaf.tensor), leaf.tensor
        if dims is None or value is None:
            return None
        places = [POSITION.index(index) if index in POSITION else None for index in leaf.at]
        if any(p is None and dim != ONE for p, dim in zip(places, dims)):
            return None
        kept = [p for p in places if p is not None]
        if len(set(kept)) != len(kept):
            return None
        if len(dims) == 4 and all(p in (None, i) for i, p in enumerate(places)):
            return value
        graph = site.graph
        assert isinstance(graph, ir.Graph)
        dropped = [i for i, p in enumerate(places) if p is None]
        if dropped:
            value = self._insert(site, "Squeeze", [value, initializer(graph, "axes", np.asarray(dropped, np.int64))])
        if kept != sorted(kept):
            value = self._insert(site, "Transpose", [value], {"perm": [int(i) for i in np.argsort(kept)]})
        missing = [i for i in range(4) if i not in kept]
        return self._insert(site, "Unsqueeze", [value, initializer(graph, "axes", np.asarray(missing, np.int64))])

    def _number(self, site: ir.Node, value: float, dtype: ir.DataType | None = None) -> ir.Value:
        graph = site.graph
        assert isinstance(graph, ir.Graph)
        dtype = dtype or self.dtype
        key = ("number", value, dtype)
        if key not in self.made:
            self.made[key] = initializer(graph, "mask/number", np.asarray(value, dtype.numpy()))
        return self.made[key]

    def _made(
        self,
        site: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A node's output, shared between sites."""
        key = (op, tuple(inputs), tuple(sorted((attributes or {}).items())))
        if key not in self.made:
            self.made[key] = self._insert(site, op, inputs, attributes, dtype)
        return self.made[key]

    def _insert(
        self,
        site: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int] | dict[str, list[int]] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        return self.symbols.learn(insert(site, op, inputs, attributes, name=f"mask/{op}", dtype=dtype))


def _fits(element: Element, dtype: ir.DataType) -> bool:
    """Whether an element is one of a tensor, or a number that the type has."""
    return element.op == "leaf" or (
        element.op == "number" and float(dtype.numpy().type(element.value)) == element.value
    )


def hides_later_keys(symbols: Symbols, mask: ir.Value) -> bool:
    """Whether a mask [B,H,S,T] that is written out keeps each query from all keys after it."""
    dims = symbols.dims(mask)
    if dims is None or len(dims) != len(POSITION):
        return False
    reader = Reader(symbols, {next(iter(p.symbols)): size for p, size in zip(POSITION, dims)})
    parts = _summands(Term("keep" if mask.dtype == ir.DataType.BOOL else "add", mask))
    return _sorted_out([_condition(reader, part) for part in parts])[0]


def _summands(term: Term) -> list[Term]:
    """The parts that an additive term is the sum of; numbers among which some are replaced by a low one are two."""
    node = term.value.producer() if term.kind == "add" else None
    if is_op(node, "Add") and node is not None:
        parts = [value for value in node.inputs if value is not None]
        return [part for value in parts for part in _summands(Term("add", value, term.factor))]
    if node is None or not is_op(node, "Where"):
        return [term]
    for place, kind in ((1, "drop"), (2, "keep")):
        fill, rest, condition = scalar(node.inputs[place]), node.inputs[3 - place], node.inputs[0]
        if fill is not None and fill * term.factor <= LOWEST and rest is not None and scalar(rest) is None:
            assert condition is not None
            others = _summands(Term("add", rest, term.factor))
            return [Term(kind, condition, finite=math.isfinite(fill)), *others]
    return [term]


def _condition(reader: Reader, term: Term) -> Element | None:
    """The condition to attend that the term stands for; None when it is a bias (or not understood)."""
    element = reader.broadcast(term.value, POSITION)
    if term.kind == "add":
        return None if element is None else as_condition(element, term.factor)
    element = element or _as_it_lies(reader, term.value)
    return element if element is None or term.kind == "keep" else negated(element)


def _as_it_lies(reader: Reader, value: ir.Value) -> Element | None:
    """A boolean whose sizes tell nothing: it is broadcast as it is."""
    dims = reader.symbols.dims(value)
    if dims is None or len(dims) > len(POSITION):
        return None
    places = POSITION[len(POSITION) - len(dims) :]
    return Element("leaf", tensor=value, at=tuple(ZERO if dim == ONE else at for dim, at in zip(dims, places)))


def as_condition(element: Element, factor: float) -> Element | None:
    """Where an element that is added to a score lets it be; None when it is more than that."""
    if element.op == "number":
        return TRUE if element.value == 0 else FALSE if element.value * factor <= LOWEST else None
    if element.op == "add":
        a, b = (as_condition(arg, factor) for arg in element.args)
        return None if a is None or b is None else both(a, b)
    if element.op != "where":
        return None
    condition, a, b = element.args[0], as_condition(element.args[1], factor), as_condition(element.args[2], factor)
    if a is None or b is None:
        return None
    return either(both(condition, a), both(negated(condition), b))


def _is_finite(reader: Reader, term: Term) -> bool:
    """Whether an additive term hides keys by a finite number."""
    element = reader.broadcast(term.value, POSITION) if term.kind == "add" else None
    return element is not None and any(math.isfinite(x) and x * term.factor <= LOWEST for x in numbers(element))


def _adds_finite_numbers(reader: Reader, term: Term) -> bool:
    """Whether every element of an additive term is known, and finite."""
    element = reader.broadcast(term.value, POSITION)
    return element is not None and _is_choice(element) and all(math.isfinite(x * term.factor) for x in numbers(element))


def _is_choice(element: Element) -> bool:
    """Whether an element is one of some numbers, or a sum of such."""
    if element.op == "add":
        return all(_is_choice(part) for part in element.args)
    return element.op == "number" or (element.op == "where" and all(_is_choice(part) for part in element.args[1:]))


def numbers(element: Element) -> list[float]:
    """All numbers that a choice or a sum is made of."""
    if element.op == "number":
        return [element.value]
    parts = element.args[1:] if element.op == "where" else element.args if element.op == "add" else ()
    return [number for part in parts for number in numbers(part)]


def _sorted_out(conditions: Sequence[Element | None]) -> tuple[bool, Element]:
    """Whether one of the conditions is causal, and all the others."""
    causal, rest = False, TRUE
    pending = [condition for condition in conditions if condition is not None]
    while pending:
        condition = pending.pop(0)
        if condition.op == "and":
            pending = [*condition.args, *pending]
        elif _is_causal(condition):
            causal = True
        else:
            rest = both(rest, condition)
    return causal, rest


def _is_causal(condition: Element) -> bool:
    """``query >= key``."""
    if condition.op != "ge" or any(arg.op != "index" for arg in condition.args):
        return False
    return condition.args[0].position - condition.args[1].position == QUERY - KEY
