"""Free the batch: a model that was exported for a fixed number of samples takes any number of them.

    before   x [2, 196, 768] ─▶ … ─▶ Reshape(…, [2, 196, 12, 64]) ─▶ … ─▶ y [2, 1000]
    after    x [batch, 196, 768] ─▶ … ─▶ Reshape(…, [-1, 196, 12, 64]) ─▶ … ─▶ y [batch, 1000]

The batch axis is followed from the inputs through every node. Where its size was written down it is asked for when the
model runs: targets of Reshape, Expand and Resize, ends of Slice, tokens and masks that were repeated for each sample.
Then the model is run on one, two and three samples, which must come out as they did from the original one by one.

Refuses  "not-fixed": the model takes any number of samples, or none.
         "along-the-batch", "summed-along-the-batch", "attends-along-the-batch", "batch-on-two-axes", …: a node computes
         one sample from another.
         "not-followed-through-<op>", "reshape-splits-the-batch", "shape-not-known", …: the axis is lost at a node.
         "differs-between-samples": a constant is another one for each sample of the batch.
         "two-open-axes": a Reshape leaves two sizes open.
         "output-without-batch": samples lie between others in an output.
         "changes-the-outputs": the freed model computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir import edit, infer_shapes, walk
from xopt.ir.batch import BatchAxes, Follow, batch_axes, follow
from xopt.ir.batch_rules import Place
from xopt.ir.poly import ONE, Poly
from xopt.ir.shape_rules import BROADCASTING
from xopt.ir.shapes import symbolic_dims
from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.rounding import rounding_bound
from xopt.runtime.reference import ReferenceSession

TRIED = (1, 2, 3)
"""Numbers of samples that a freed model is run on."""
END = np.iinfo(np.int64).max


class NotFreedError(Exception):
    """The batch cannot be freed at ``node``; the message is the reason."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class FreeBatch(Pass):
    """Let a model that was exported for a fixed batch take any number of samples."""

    name: ClassVar[str] = "free-batch"
    effect: ClassVar[Effect] = Effect.EXACT
    widens: ClassVar[bool] = True

    axis: str = "batch"
    """What the open axis is called."""

    def check(self) -> None:
        if not self.axis.isidentifier():
            cure = "give a word of letters, digits and underscores"
            raise InputError("E-OPTION", f"{self.axis!r} is no name of an axis", where="option axis", cure=cure)

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        axes = batch_axes(model)
        if axes.size is None:
            report.accepts("batch", "not-fixed")
            return report
        trial = model.clone()
        try:
            changed = _free(trial, axes, self.axis)
        except NotFreedError as error:
            report.accepts(error.node, str(error))
            return report
        samples = context.samples.fitted(model)
        same = _same_by_sample(model, trial, axes, samples)
        if report.accepts(f"batch of {axes.size}", None if same else "changes-the-outputs"):
            _free(model, axes, self.axis)
            report.rewrote("batch")
            report.numbers = {"batch": axes.size, "nodes": changed}
        return report


def _free(model: ir.Model, axes: BatchAxes, name: str) -> int:
    """Free the batch of ``model`` in place, and count the nodes that were changed; NotFreedError where that fails."""
    assert axes.size is not None
    found = follow(model.graph, axes.inputs, Poly.of(axes.size))
    for node, reason in (*found.meeting.items(), *found.lost.items()):
        raise NotFreedError(node, reason)
    for value in model.graph.outputs:
        place = found.places.get(value)
        if place is not None and not place.alone:
            raise NotFreedError(_maker(value), "output-without-batch")
    surgery = _Surgery(model.graph, found, axes.size)
    changed = sum([surgery.free(node) for node in list(model.graph)])
    taken = symbolic_dims(model)
    while name in taken:
        name += "_"
    for value in (*model.graph.inputs, *model.graph.outputs):
        place = found.places.get(value)
        if place is not None and value.shape is not None:
            dims: list[int | str | ir.SymbolicDim] = list(value.shape)
            dims[place.axis] = name
            value.shape = ir.Shape(dims)
    edit.remove_dead(model)
    infer_shapes(model)
    return changed


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # inputs have their batch alone on an axis
    return node


@dataclass
class _Surgery:
    """Asks at run time for what was written down about the batch."""

    graph: ir.Graph
    found: Follow
    size: int

    def free(self, node: ir.Node) -> bool:
        """Change one node where it knows the batch; whether it did."""
        place = next((self.found.places[value] for value in node.outputs if value in self.found.places), None)
        if place is None or node.domain not in ("", "xopt"):
            return False
        if node.op_type in ("Reshape", "Flatten"):
            return node.op_type == "Reshape" and self._reshape(node, place)
        if node.op_type == "Expand":
            return self._vector(node, 1, place.axis, 1)
        if node.op_type == "Slice":
            return self._slice(node)
        if node.op_type == "Resize":
            return self._resize(node)
        return sum([self._operand(node, *one) for one in self._operands(node, place)]) > 0

    def _dims(self, value: ir.Value | None) -> tuple[Poly, ...]:
        return self.found.symbols.dims(value) or ()

    def _operands(self, node: ir.Node, place: Place) -> Iterator[tuple[int, int, Place, bool]]:
        """Operands that do not run over the batch, where they meet it: (index, axis, place, must be there in full)."""
        rank = len(self._dims(node.outputs[0]))
        for index, value in enumerate(node.inputs):
            if value is None or value in self.found.places:
                continue
            shift = rank - len(self._dims(value))
            if node.op_type in (*BROADCASTING, "Mean", "Gemm") or (
                node.op_type == "MatMul" and shift <= place.axis < rank - 2
            ):
                yield index, place.axis - shift, place, False
            elif node.op_type == "Concat":
                yield index, place.axis, place, True
            elif node.op_type == "Attention":
                yield index, 0 if index != 3 else place.axis - 4 + len(self._dims(value)), place, index != 3
            elif node.op_type == "RotaryEmbedding" and (len(node.inputs) < 4 or index == 3):
                yield index, 0, place, True
            elif node.op_type in ("LSTM", "GRU", "RNN") and index >= 4:
                yield index, 0 if index == 4 else 1, Place(1), True

    def _operand(self, node: ir.Node, index: int, axis: int, place: Place, whole: bool) -> bool:
        """Let an operand broadcast along the batch, or repeat it as often as there are samples; whether it changed."""
        value = edit.operand(node, index)
        dims = self._dims(value)
        if axis < 0 or axis >= len(dims) or (dims[axis] == ONE and not whole):
            return False
        repeated = edit.producer(value, "Expand", "Tile")
        if repeated is not None and edit.constant(edit.operand(repeated, 1)) is None:
            return False  # by a number that is asked for at run time already
        full = place.outer * self.size * place.inner
        if dims[axis] not in (ONE, full) or (dims[axis] == ONE and place.inner != ONE):
            return False  # it meets another part of the axis, which is no business of the batch
        single = value if dims[axis] == ONE else self._of_one_sample(node, value, axis, place)
        if whole or place.inner != ONE:
            single = self._repeated(node, single, axis)
        node.replace_input_with(index, single)
        return single is not value

    def _of_one_sample(self, node: ir.Node, value: ir.Value, axis: int, place: Place) -> ir.Value:
        """What a constant, or something that was repeated, is for one sample."""
        array = edit.constant(value)
        inner = place.inner.constant
        if array is not None and place.outer == ONE and inner is not None:
            moved = np.moveaxis(array, axis, 0)
            parts = moved.reshape(self.size, inner, *moved.shape[1:])
            if not (parts == parts[:1]).all():
                raise NotFreedError(node, "differs-between-samples")
            return edit.initializer(self.graph, f"{value.name}/one", np.moveaxis(parts[0], 0, axis))
        source = edit.producer(value, "Expand", "Tile")
        before = edit.operand(source, 0) if source is not None else value
        shift = len(self._dims(value)) - len(self._dims(before))
        if source is not None and axis >= shift and self._dims(before)[axis - shift] == ONE and place.alone:
            self._vector(source, 1, axis, 1)
            return value
        if self.size == 1 and place.outer == ONE:
            return value
        raise NotFreedError(node, "differs-between-samples")

    def _repeated(self, node: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        """``value`` once for each sample."""
        repeats = [edit.initializer(self.graph, "once", np.array([1], np.int64))] * len(self._dims(value))
        repeats[axis] = self._count(node)
        shape = edit.insert(node, "Concat", repeats, {"axis": 0}, dtype=ir.DataType.INT64)
        return edit.insert(node, "Tile", [value, shape], name=f"{value.name}/for_each")

    def _count(self, before: ir.Node) -> ir.Value:
        """The number of samples, as a vector of one element."""
        source = next(value for value in self.graph.inputs if value in self.found.places)
        axis = self.found.places[source].axis
        bounds = {"start": axis, "end": axis + 1}
        return edit.insert(before, "Shape", [source], bounds, dtype=ir.DataType.INT64, shape=[1])

    def _vector(self, node: ir.Node, index: int, axis: int, number: int) -> bool:
        """Write ``number`` at a place of a constant vector."""
        numbers = walk.ints(edit.input_at(node, index))
        if numbers is None or numbers[axis] == number:
            return False
        numbers[axis] = number
        vector = edit.initializer(self.graph, f"{node.name}/any_batch", np.array(numbers, np.int64))
        node.replace_input_with(index, vector)
        return True

    def _reshape(self, node: ir.Node, place: Place) -> bool:
        """Leave the axis of the batch open: 0 copies it, -1 is what is left."""
        target, before = self.found.symbols.numbers(node.inputs[1]), self._dims(node.inputs[0])
        start = self.found.places[edit.operand(node, 0)]
        after = self._dims(node.outputs[0])
        if target is None:
            raise NotFreedError(node, "target-not-known")
        numbers = [dim.constant if dim.constant is not None else -1 for dim in after]
        for axis, dim in enumerate(after):
            if axis == place.axis:
                numbers[axis] = 0 if start == place and walk.int_attribute(node, "allowzero", 0) == 0 else -1
            elif dim.constant is None and axis < len(before) and before[axis] == dim and axis != start.axis:
                numbers[axis] = 0
        if numbers.count(-1) > 1:
            raise NotFreedError(node, "two-open-axes")
        if numbers == walk.ints(node.inputs[1]):
            return False
        vector = edit.initializer(self.graph, f"{node.name}/any_batch", np.array(numbers, np.int64))
        node.replace_input_with(1, vector)
        return True

    def _slice(self, node: ir.Node) -> bool:
        """A Slice that takes all samples takes them to the end."""
        axes = self.found.symbols.integers(edit.input_at(node, 3))
        ends = walk.ints(edit.input_at(node, 2))
        rank, place = len(self._dims(node.inputs[0])), self.found.places[edit.operand(node, 0)]
        along = [axis % rank for axis in axes] if axes is not None else list(range(len(ends or ())))
        return place.axis in along and ends is not None and self._vector(node, 2, along.index(place.axis), END)

    def _resize(self, node: ir.Node) -> bool:
        """Sizes of the other axes, after the number of samples."""
        sizes = walk.ints(edit.input_at(node, 3))
        if sizes is None or "axes" in node.attributes:
            return False
        rest = edit.initializer(self.graph, f"{node.name}/sizes", np.array(sizes[1:], np.int64))
        first = edit.insert(node, "Shape", [node.inputs[0]], {"start": 0, "end": 1}, dtype=ir.DataType.INT64, shape=[1])
        node.replace_input_with(3, edit.insert(node, "Concat", [first, rest], {"axis": 0}, dtype=ir.DataType.INT64))
        return True


def _same_by_sample(before: ir.Model, after: ir.Model, axes: BatchAxes, samples: Dataset) -> bool:
    """Whether one, two and three samples come out of the freed model as they did from the original."""
    assert axes.size is not None
    original, freed = ReferenceSession(before), ReferenceSession(after)
    wanted: list[dict[str, np.ndarray]] = []
    chosen = np.arange(max(TRIED)) % (1 if samples.varying else len(samples))
    for index in chosen:  # each at the front of a run of its own, before others
        others = index + np.arange(axes.size)
        feeds = samples.feeds(others % (1 if samples.varying else len(samples)))
        wanted.append({n: _rows(a, axes.outputs[n], slice(0, 1)) for n, a in original.run(feeds).items()})
    bound = rounding_bound(before)
    for count in TRIED:
        for name, array in freed.run(samples.feeds(chosen[:count])).items():
            axis = axes.outputs[name]
            parts = [one[name] for one in wanted[:count]]
            expected = parts[0] if axis is None else np.concatenate(parts, axis)
            if not _close(expected, array, bound):
                return False
    return True


def _rows(array: np.ndarray, axis: int | None, part: slice) -> np.ndarray:
    return array if axis is None else array[(slice(None),) * axis + (part,)]


def _close(expected: np.ndarray, actual: np.ndarray, bound: float) -> bool:
    if expected.shape != actual.shape:
        return False
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    scale = float(np.abs(a[finite]).max(initial=0.0))
    return bool((np.abs(a - b)[finite] <= bound * scale).all()) and bool(
        ((a == b) | (np.isnan(a) & np.isnan(b)))[~finite].all()
    )
