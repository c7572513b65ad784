"""The parts of a tensor, cut by one ``Split`` with its sizes written.

    before   a, b = Split(y, num_outputs=2)                    after   a, b = Split(y, [n, n])
             a, b = Slice(y, 0, n), Slice(y, n, 2n)                    a, b = Split(y, [n, n])
``chunk`` is exported as the one or the other. Runs last: earlier steps follow slices as they are. Slices become a Split
where ``y`` is a projection, and they cover its last axis and overlap nowhere.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import attribute, constant, consumers, initializer, input_at, insert_many, remove_dead, replace, sweep
from xopt.ir.projection import projection_into
from xopt.ir.shape_rules import equal_parts
from xopt.ir.walk import shape_of


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Write the sizes of Splits; make one Split of the slices of a projection."""
    report.rewrote("split-sizes", sweep(model, ("Split",), _write_sizes))
    report.rewrote("slices-to-split", sweep(model, ("Slice",), _one_split))
    remove_dead(model)


def _write_sizes(node: ir.Node) -> bool:
    """Sizes of equal parts (the last may be smaller), for an axis of fixed size."""
    source, graph = input_at(node, 0), node.graph
    shape, axis = shape_of(source), int(attribute(node, "axis", 0) or 0)
    if input_at(node, 1) is not None or shape is None or not isinstance(graph, ir.Graph):
        return False
    total = shape[axis] if -len(shape) <= axis < len(shape) else None
    if total is None:
        return False
    sizes = equal_parts(total, len(node.outputs))
    if min(sizes) < 0:
        return False
    node.attributes.pop("num_outputs", None)
    node.resize_inputs(2)
    node.replace_input_with(1, initializer(graph, f"{node.name}/sizes", np.asarray(sizes, np.int64)))
    return True


def _one_split(node: ir.Node) -> bool:
    """Replace the slices of a projection by a Split, where the first of them (``node``) stands."""
    source, graph = input_at(node, 0), node.graph
    shape, found = shape_of(source), projection_into(source)
    if source is None or shape is None or not shape[-1] or found is None or found.part is not None:
        return False
    if found.output is not source or not isinstance(graph, ir.Graph):
        return False
    slices = [reader for reader in consumers(source, "Slice") if reader.graph is graph]
    spans = {reader: span for reader in slices if (span := _span(reader, len(shape), shape[-1])) is not None}
    ranked = sorted(spans, key=lambda reader: spans[reader])
    bounds = [spans[reader] for reader in ranked]
    ends = [0, *(end for _, end in bounds)]
    if len(ranked) < 2 or [start for start, _ in bounds] != ends[:-1] or ends[-1] != shape[-1]:
        return False
    sizes = initializer(graph, f"{source.name}/sizes", np.diff(ends).astype(np.int64))
    parts = insert_many(
        node, "Split", [source, sizes], {"axis": -1}, len(ranked), name=f"{source.name}/part", dtype=source.dtype
    )
    for reader, part in zip(ranked, parts):
        part.shape = reader.outputs[0].shape
    done = [replace(reader.outputs[0], part) for reader, part in zip(ranked, parts)]
    return all(done)


def _span(node: ir.Node, rank: int, size: int) -> tuple[int, int] | None:
    """Start and end of a Slice along the last axis alone, in steps of 1, that keeps something."""
    starts, ends, axes, steps = (constant(input_at(node, index)) for index in range(1, 5))
    if starts is None or ends is None or axes is None or not starts.size == ends.size == axes.size == 1:
        return None
    if int(axes.reshape(-1)[0]) not in (-1, rank - 1):
        return None
    if input_at(node, 4) is not None and (steps is None or steps.size != 1 or int(steps.reshape(-1)[0]) != 1):
        return None
    start, end, _ = slice(int(starts.reshape(-1)[0]), int(ends.reshape(-1)[0])).indices(size)
    return (start, end) if start < end else None
