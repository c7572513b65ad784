"""What the sizes of a graph's axes must fulfil so that its operators fit together, and sizes that do.

    Concat(past [b,h,p,d], key [c,h,s,d])  Add(scores [b,h,s,p+s], mask [b,1,1,t])     ->     b = c,  p + s = t
An operator that broadcasts takes an axis of 1 as well; and an axis that is indexed by positions must have these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import onnx_ir as ir

from xopt.ir.canonical.elements import Reader
from xopt.ir.edit import input_at
from xopt.ir.poly import ONE, ZERO, Poly, product
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import BROADCASTING, Dims, axes_of, integer, operands, split_sizes
from xopt.ir.symbolic import Symbols


@dataclass(frozen=True)
class Relation:
    """Two sizes that are equal; where not ``certain``, other sizes may do as well."""

    left: Poly
    right: Poly
    certain: bool = True


def certain(graph: ir.Graph, symbols: Symbols) -> Iterator[Relation]:
    """What no input can evade: the relations that every run of ``graph`` fulfils."""
    return (relation for relation in _relations(graph, symbols, _CERTAIN) if relation.certain)


def fitting_sizes(graph: ir.Graph, given: Mapping[str, int], usual: int) -> dict[str, int]:
    """A size for every named axis of the inputs: as ``given``, as the graph demands, else the ``usual`` one."""
    axes = {name: _only(Poly.axis(name)) for name in _names(graph)}
    solved = {axes[name]: Poly.of(size) for name, size in given.items() if name in axes}
    symbols = Symbols(graph)
    for relation in [*certain(graph, symbols), *_relations(graph, symbols, _CERTAIN | _LIKELY)] if axes else ():
        found = solution(relation, list(axes.values()), solved)
        if found is not None:
            solved = {symbol: size.replaced(found) for symbol, size in solved.items()} | found
    rest = dict.fromkeys(axes.values(), Poly.of(usual))
    sizes = {name: solved.get(symbol, Poly.of(symbol)).replaced(rest).constant for name, symbol in axes.items()}
    return {name: usual if size is None or size < 1 else size for name, size in sizes.items()}


def solution(relation: Relation, free: Sequence[str], solved: Mapping[str, Poly]) -> dict[str, Poly] | None:
    """The symbol that a relation tells, and what it must be, after ``solved``: rather a sum than a difference of
    others, and rather one that comes late in ``free``.
    """
    difference = _without_common_factors((relation.left - relation.right).replaced(solved))
    if not difference.symbols or not difference.symbols <= set(free):
        return None
    choices: list[tuple[bool, int, Poly]] = []
    for monomial, coefficient in difference.terms:
        alone = len(monomial) == 1 and sum(monomial[0] in other for other, _ in difference.terms) == 1
        size = (difference - Poly(((monomial, coefficient),))).exactly(-coefficient) if alone else None
        if size is not None:
            choices.append((size.at_least(1, 1), free.index(monomial[0]), size))
    if not choices:
        return None
    _, place, size = max(choices, key=lambda choice: choice[:2])
    return {free[place]: size}


def _without_common_factors(sum_: Poly) -> Poly:
    """A sum that is 0 where ``sum_`` is, when no axis is empty."""
    common = [Counter(monomial) for monomial, _ in sum_.terms]
    shared = reduce(lambda a, b: a & b, common) if common else Counter[str]()
    factor = Poly(((tuple(sorted(shared.elements())), math.gcd(*(number for _, number in sum_.terms))),))
    return sum_.exactly(factor) or sum_


def _names(graph: ir.Graph) -> list[str]:
    """The names of the inputs' axes, in order."""
    dims = (dim for value in graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim))
    return list(dict.fromkeys(dim.value for dim in dims if dim.value))


def _relations(graph: ir.Graph, symbols: Symbols, rules: Mapping[str, Rule]) -> Iterator[Relation]:
    """What ``rules`` say of all nodes, but for what known sizes fulfil anyway."""
    for node in graph:
        rule = rules.get(op_of(node))
        try:
            found = list(rule(symbols, node)) if rule is not None else []
        except (IndexError, TypeError, ValueError, ZeroDivisionError):
            continue  # a node that lacks an input or contradicts its shapes teaches nothing
        yield from (relation for relation in found if relation.left != relation.right)


def _only(axis: Poly) -> str:
    return next(iter(axis.symbols))


def _known(s: Symbols, node: ir.Node) -> list[Dims]:
    """The dimensions of a node's inputs, where all ranks are known."""
    found = [s.dims(value) for value in node.inputs if value is not None]
    return [] if None in found else found  # type: ignore[return-value]


def _concat(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    shapes = _known(s, node)
    joined = integer(node, "axis", 0) % len(shapes[0])
    for place, sizes in enumerate(zip(*shapes)):
        if place != joined:
            yield from (Relation(one, other) for one, other in pairwise(sizes))


def _matmul(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    a, b = _known(s, node)
    yield Relation(a[-1], b[-2] if len(b) > 1 else b[-1])
    yield from _equal_where_wide([a[:-2], b[:-2]])


def _gemm(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    a, b = _known(s, node)[:2]
    yield Relation(a[0 if integer(node, "transA", 0) else 1], b[1 if integer(node, "transB", 0) else 0])


def _reshape(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    dims, target = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    written = target is not None and not any((size.constant or 0) < 1 for size in target if not size.symbols)
    if dims is not None and target is not None and written and not integer(node, "allowzero", 0):
        yield Relation(product(dims), product(target))


def _squeeze(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    dims = s.dims(node.inputs[0])
    yield from (Relation(dims[axis], ONE) for axis in axes_of(s, node) or [] if dims is not None)


def _split(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    dims = s.dims(node.inputs[0])
    if dims is not None and ("split" in node.attributes or input_at(node, 1) is not None):
        size = dims[integer(node, "axis", 0)]
        yield Relation(size, sum(split_sizes(s, node, size), ZERO))


def _conv(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    x, weight = _known(s, node)[:2]
    yield Relation(x[1], weight[1] * integer(node, "group", 1))


def _attention(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    q, k, v = (s.dims(value) for value in node.inputs[:3])
    if q is None or k is None or v is None:
        return
    yield from (Relation(q[0], other[0]) for other in (k, v))
    yield Relation(k[-2], v[-2])
    mask = s.dims(input_at(node, 3))
    if mask is not None and input_at(node, 4) is None:
        yield from _equal_where_wide([(q[0], ONE, q[-2], k[-2]), mask])


def _broadcast(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    yield from _equal_where_wide(_known(s, node))


def _expand(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    dims, target = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    if dims is not None and target is not None:
        yield from _equal_where_wide([dims, target])


def _equal_where_wide(shapes: list[Dims]) -> Iterator[Relation]:
    """Axes that meet when shapes are broadcast, and that are not 1."""
    rank = max(map(len, shapes), default=0)
    for sizes in zip(*((ONE,) * (rank - len(dims)) + tuple(dims) for dims in shapes)):
        wide = dict.fromkeys(_uncut(size) for size in sizes if size != ONE)
        yield from (Relation(one, other, False) for one, other in pairwise(wide))


def _uncut(size: Poly) -> Poly:
    """A size without the ends of tables that it is cut to: ``p+s`` for ``min(64,p+s)``."""
    found = dict[str, Poly]()
    for symbol in size.symbols:
        open_ = [part for part in operands(Poly.of(symbol), "min") if not part.isdecimal()]
        if len(open_) == 1 and open_[0] != symbol and "(" not in open_[0]:
            terms = (term.split("*") for term in open_[0].split("+"))
            found[symbol] = sum((product(_factor(one) for one in term) for term in terms), ZERO)
    return size.replaced(found)


def _factor(text: str) -> Poly:
    return Poly.of(int(text) if text.lstrip("-").isdecimal() else text)


def _gather(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    dims = s.dims(node.inputs[0])
    if dims is not None:
        yield from _reached(s, node.inputs[1], (), dims[integer(node, "axis", 0)])


def _gather_nd(s: Symbols, node: ir.Node) -> Iterator[Relation]:
    dims, indices = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if dims is not None and indices is not None and not integer(node, "batch_dims", 0):
        for place in range(indices[-1].constant or 0):
            yield from _reached(s, node.inputs[1], (Poly.of(place),), dims[place])


def _reached(s: Symbols, indices: ir.Value | None, last: tuple[Poly, ...], size: Poly) -> Iterator[Relation]:
    """The axis of ``size`` ends where the highest of the positions in ``indices`` [..., *last] is."""
    dims = s.dims(indices)
    if dims is None or indices is None or size.constant is not None:
        return
    outer = dims[: len(dims) - len(last)]
    at = tuple(Poly.of(f"@{place}") for place in range(len(outer)))
    ranges = {_only(index): dim for index, dim in zip(at, outer)}
    found = Reader(s, ranges).element(indices, (*at, *last))
    if found.op == "index":
        highest = found.position.replaced({symbol: dim - 1 for symbol, dim in ranges.items()})
        yield Relation(size, highest + 1, False)


Rule = Callable[[Symbols, ir.Node], Iterator[Relation]]
_CERTAIN: dict[str, Rule] = {
    "Concat": _concat,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Split": _split,
    "Conv": _conv,
    "Attention": _attention,
}
_LIKELY: dict[str, Rule] = {
    **dict.fromkeys(BROADCASTING, _broadcast),
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
}
