"""Indices inside what they index: known ones are checked now, a model input's by the session, all others as they come.

ONNX counts negative indices from the end and allows none beyond. Kernels clamp what they read and write by; that an
index was outside is counted beside them, and ends the run (see `xopt.targets.checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import te, tirx

from xopt.kernels.emit import i64
from xopt.targets.ops.call import Call, harmless, label
from xopt.targets.symbolic import Array, Dim


def valid(index: Any, dim: Dim) -> Any:
    """An ONNX index as a position: negative ones count from the end, and no index leaves the tensor."""
    index = index.astype("int64")
    return inside(tirx.Select(index < 0, index + i64(dim), index), dim)


def inside(index: Any, dim: Dim) -> Any:
    """The nearest position of an axis."""
    return tirx.max(tirx.min(index, i64(dim) - 1), i64(0))


def check_indices(call: Call, position: int, extents: Sequence[Dim]) -> None:
    """Refuse indices that leave what they index.

    Args:
        call: the node.
        position: the input that holds the indices: any shape for one extent, else [..., len(extents)].
        extents: how many elements they choose from.

    Raises:
        InputError: E-UNSUPPORTED-OP, an index that is known now is outside whatever the sizes of the inputs are.
    """
    sizes = ", ".join(harmless(str(call.dims.readable(extent))) for extent in extents)
    what = f"an index is outside of the {sizes} elements that it chooses from"
    for extent in extents:
        call.require(extent >= 1, "it chooses from an axis without elements")
    known = call.const(position) if call.const(position) is not None else call.known(position)
    if known is not None:
        for extent, column in zip(extents, known.reshape(-1, len(extents)).T):
            for index in _extremes(column):
                call.require(index >= -extent, what)
                call.require(index < extent, what)
    elif len(extents) > 1 or not checked_before(call, call.input(position), extents[0]):
        refuse_rows(call, position, len(extents), lambda row: _any_outside(row, extents), what)


def _extremes(indices: Array) -> list[Any]:
    """The smallest and the largest of constant indices; all of those that depend on dimensions."""
    if indices.dtype != object or all(isinstance(index, int) for index in indices):
        return [int(indices.min()), int(indices.max())] if indices.size else []
    return list(indices)


def refuse_rows(call: Call, position: int, width: int, wrong: Callable[[list[Any]], Any], what: str) -> None:
    """End the run when a row of an integer input is wrong.

    Args:
        call: the node.
        position: the input, of rows of ``width`` elements.
        width: 1, or the last dimension of the input.
        wrong: whether a row, given as its elements, is.
        what: what is wrong with it.
    """
    tensor = call.x(position)
    shape = call.lowering.shape_of(tensor)
    rows = call.dims.product(shape if width == 1 else shape[:-1])
    row = te.reduce_axis((i64(0), i64(rows)), "row_of_indices")

    def element(x: Any, _: Any) -> Any:
        found = wrong([x(row, tirx.const(k, "int64")) for k in range(width)])
        return te.sum(tirx.Select(found, i64(1), i64(0)), axis=[row])

    count = call.lowering.compute("outside", [1], element, call.lowering.reshape(tensor, [rows, width]))
    call.lowering.outside.append((count, f"{label(call.node)}: {what}"))


def _any_outside(row: Sequence[Any], extents: Sequence[Dim]) -> Any:
    return reduce(tirx.Or, [_is_outside(index, i64(extent)) for index, extent in zip(row, extents)])


def _is_outside(index: Any, extent: Any) -> Any:
    index = index.astype("int64")
    return tirx.Or(index < -extent, index >= extent)


# -- indices that are checked before the model runs ----------------------------------------------------------------
def checked_before(call: Call, indices: ir.Value, dim: Dim) -> bool:
    """Whether the session refuses indices outside of ``dim``: values of a model input, or positions up to a length."""
    if call.lowering.within:
        return False  # of a graph that may not run
    ranged, counted = _note_range(call, indices, dim), _note_positions(call, indices, dim)
    return ranged or counted


def _note_range(call: Call, indices: ir.Value, dim: Dim) -> bool:
    """Remember that a model input indexes ``dim`` rows, so that the session can refuse values outside."""
    producer = indices.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        indices = producer.inputs[0]
    if not indices.is_graph_input() or not isinstance(dim, int) or not _is_integer(indices):
        return False
    low, high = call.lowering.ranges.get(indices, (-dim, dim - 1))
    call.lowering.ranges[indices] = (max(low, -dim), min(high, dim - 1))
    return True


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and np.issubdtype(value.dtype.numpy(), np.integer)


def _note_positions(call: Call, indices: ir.Value, dim: Dim) -> bool:
    """Positions 0, 1, ... up to a dynamic length, read from a table of ``dim`` rows, limit that length."""
    producer = indices.producer()
    while producer is not None and producer.op_type in ("Unsqueeze", "Reshape", "Expand", "Cast", "Identity"):
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    if producer is None or producer.op_type != "Range":
        return False
    first, last, step = (call.lowering.known(value) for value in producer.inputs)
    if first is None or last is None or step is None or not _is_one(step) or not isinstance(dim, int):
        return False
    limit = last.reshape(-1)[0]
    if isinstance(limit, tirx.Var):
        call.dims.limit(limit, dim)
    else:
        call.require(limit <= dim, f"it reads more positions than the {dim} that there are")
    return call.dims.proves(first.reshape(-1)[0] >= 0)


def _is_one(step: Array) -> bool:
    return isinstance(step.reshape(-1)[0], int) and int(step.reshape(-1)[0]) == 1
