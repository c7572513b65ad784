"""Which axis of each value runs over the samples of a batch, followed from the inputs through the graph.

Samples are independent where no node sums, normalizes, sorts or reads across that axis. An axis may also be a part of a
larger one: windows of all images side by side, or the tokens of all samples as the rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from xopt.ir import walk
from xopt.ir.batch_rules import RULES, Followed, NotFollowedError, Place, SamplesMeetError
from xopt.ir.poly import ZERO, Poly
from xopt.ir.symbolic import Symbols

MOST_DROPPED = 16
"""Inputs that are tried, one after the other, without a batch axis where samples would meet otherwise."""
_BATCH_NAMES = frozenset({"b", "n", "bs", "bsz", "bz", "batch", "batchsize", "nbatch", "samples"})


@dataclass
class Follow:
    """The walk over one graph: where the batch lies in each value, and the nodes where that ends.

    Attributes:
        symbols: dimensions of the values.
        size: of the batch: a number or a symbol.
        places: of the values that run over the batch.
        meeting: nodes at which samples surely meet, with the reason.
        lost: nodes whose operator is not understood, with the reason.
    """

    symbols: Symbols
    size: Poly
    places: dict[ir.Value, Place]
    meeting: dict[ir.Node, str] = field(default_factory=dict)
    lost: dict[ir.Node, str] = field(default_factory=dict)
    _beyond: set[ir.Value] = field(default_factory=set)

    def visit(self, node: ir.Node) -> None:
        """Learn where the batch lies in the outputs of a node."""
        read = [*node.inputs, *_captured(node)]
        if any(value in self._beyond for value in read):
            self._beyond.update(node.outputs)
            return
        if not any(value in self.places for value in read):
            self._made(node)
            return
        try:
            rule = RULES.get((node.domain, node.op_type))
            if rule is None:
                raise NotFollowedError(f"not-followed-through-{node.op_type.lower()}")
            found: Followed = rule(self, node)
        except SamplesMeetError as error:
            self.meeting[node] = str(error)
            self._beyond.update(node.outputs)
        except (NotFollowedError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, NotFollowedError) else "shape-not-known"
            self.lost[node] = reason
            self._beyond.update(node.outputs)
        else:
            self.places.update({value: place for value, place in zip(node.outputs, found) if place is not None})

    def _made(self, node: ir.Node) -> None:
        """What is made from sizes alone runs over the batch where a dimension is a multiple of its symbol."""
        if self.size.constant is not None or node.op_type in ("Shape", "Size"):
            return
        for value in node.outputs:
            for axis, dim in enumerate(self.symbols.dims(value) or ()):
                inner = dim.exactly(self.size)
                if inner is not None and inner != ZERO:
                    self.places[value] = Place(axis, inner=inner)
                    break


def _captured(node: ir.Node) -> Iterator[ir.Value | None]:
    """What the nodes in the branches and bodies of a node read."""
    for graph in walk.graphs(node):
        for inner in graph.all_nodes():
            yield from inner.inputs


def follow(graph: ir.Graph, axes: Mapping[str, int | None], size: Poly, symbols: Symbols | None = None) -> Follow:
    """Follow the batch through ``graph``.

    Args:
        graph: its shapes should be inferred.
        axes: the batch axis of each input that has one.
        size: of that axis.
        symbols: of the graph, where they are known already.
    """
    starts = {value: Place(axis) for value in graph.inputs if (axis := axes.get(str(value.name))) is not None}
    found = Follow(symbols if symbols is not None else Symbols(graph), size, starts)
    for node in graph:
        found.visit(node)
    return found


@dataclass(frozen=True)
class BatchAxes:
    """Which axis of each input and output of a model runs over samples.

    Attributes:
        inputs, outputs: by name; None for what all samples of a run share.
        size: how many samples one run takes where the model fixes that, else None.
    """

    inputs: Mapping[str, int | None]
    outputs: Mapping[str, int | None]
    size: int | None


def batch_axes(model: ir.Model) -> BatchAxes:
    """The batch axes of a model, by the names and sizes of its inputs' axes, and by where samples stay apart.

    Symbols that are called like a batch come first, then first axes, then second ones ([sequence, batch, ...]); the
    first choice under which no two samples meet is taken, and rather one that could be followed to the outputs. Inputs
    without the axis (scalars, timesteps, masks over tokens alone) are shared by the samples of a run.
    """
    graph = model.graph
    symbols = Symbols(graph)
    best: Follow | None = None
    for axes, size in _hypotheses(graph):
        found = follow(graph, axes, size, symbols)
        if found.meeting:
            found = _without_shared(found, graph, axes, size) or found
        if best is None or (bool(found.meeting), bool(found.lost)) < (bool(best.meeting), bool(best.lost)):
            best = found
        if not best.meeting and not best.lost:
            break
    return _axes(graph, best if best is not None else follow(graph, {}, Poly.unknown(), symbols))


def fed_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs that a caller must feed: those without an initializer."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


Hypothesis = tuple[dict[str, int | None], Poly]


def _hypotheses(graph: ir.Graph) -> Iterator[Hypothesis]:
    inputs = [value for value in fed_inputs(graph) if value.shape is not None and len(value.shape)]
    named = dict.fromkeys(name for value in inputs for name in _names(value) if is_batch_name(name))
    for name in named:
        yield _of_symbol(inputs, name)
    for axis in (0, 1):
        there = [value for value in inputs if len(value.shape or ()) > axis]
        open_ = [value for value in there if isinstance(_dim(value, axis), ir.SymbolicDim)]
        names = dict.fromkeys(str(_dim(value, axis).value) for value in open_)  # type: ignore[union-attr]
        if len(names) > 1 and axis == 0:
            yield {str(value.name): axis for value in open_}, Poly.axis(next(iter(names)))
        for name in names:
            yield _of_symbol(inputs, name)
        if there and isinstance(size := _dim(there[0], axis), int):
            same: dict[str, int | None] = {str(value.name): axis for value in there if _dim(value, axis) == size}
            if axis == 1:  # masks are [batch, sequence] where tokens are [sequence, batch, ...]
                firsts = (value for value in inputs if _dim(value, 0) == size)
                yield {**{str(value.name): 0 for value in firsts}, **same}, Poly.of(size)
            yield same, Poly.of(size)


def _of_symbol(inputs: Iterable[ir.Value], name: str) -> Hypothesis:
    return {str(v.name): _names(v).index(name) for v in inputs if name in _names(v)}, Poly.axis(name)


def _names(value: ir.Value) -> list[str]:
    return [str(dim.value) if isinstance(dim, ir.SymbolicDim) else "" for dim in value.shape or ()]


def is_batch_name(name: str) -> bool:
    """Whether an axis is called as people call the batch."""
    plain = "".join(letter for letter in name.lower() if letter.isalpha())
    return plain in _BATCH_NAMES or "batch" in plain


def _dim(value: ir.Value, axis: int) -> int | ir.SymbolicDim:
    assert value.shape is not None
    return value.shape[axis]


def _without_shared(found: Follow, graph: ir.Graph, axes: Mapping[str, int | None], size: Poly) -> Follow | None:
    """The same with one input fewer after the other, of those behind the first, until no samples meet; else None."""
    left = dict(axes)
    for name in list(left)[:0:-1][:MOST_DROPPED]:
        fewer = {other: axis for other, axis in left.items() if other != name}
        now = follow(graph, fewer, size, found.symbols)
        if not now.meeting:
            return now
        if len(now.meeting) < len(found.meeting):
            left, found = fewer, now
    return None


def _axes(graph: ir.Graph, found: Follow) -> BatchAxes:
    inputs = {str(v.name): found.places[v].axis if v in found.places else None for v in fed_inputs(graph)}
    sizes = [_dim(v, found.places[v].axis) for v in fed_inputs(graph) if v in found.places]
    fixed = [size for size in sizes if isinstance(size, int)]
    outputs: dict[str, int | None] = {}
    for value in graph.outputs:
        place = found.places.get(value)
        whole = place is not None and place.outer.constant == 1 and place.inner.constant == 1
        outputs[str(value.name)] = place.axis if place is not None and whole else _guess(found, value)
    return BatchAxes(inputs, outputs, fixed[0] if fixed else None)


def _guess(found: Follow, value: ir.Value) -> int | None:
    """The first axis of an output that was not followed, where its size may be that of the batch."""
    dims = found.symbols.dims(value)
    lost = bool(found.lost or found.meeting)
    return (
        0
        if lost and (dims is None or (len(dims) > 0 and (dims[0] == found.size or dims[0].constant is None)))
        else None
    )
