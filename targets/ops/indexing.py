"""Operators that read or write by computed indices, and the ones that search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.lowering import Value


def valid(index: Any, dim: Dim) -> Any:
    """An ONNX index as a position: negative ones count from the end, and no index leaves the tensor."""
    extent = tirx.const(dim, "int64") if isinstance(dim, int) else dim
    index = index.astype("int64")
    index = tirx.Select(index < 0, index + extent, index)
    return tirx.max(tirx.min(index, extent - 1), tirx.const(0, "int64"))


def _gather(call: Call) -> Value:
    shape = call.shape()
    axis = call.axis(0, len(shape))
    known = call.known(1)
    if known is not None and known.size == 1:
        return _one_slice(call, axis, known.reshape(-1)[0], known.ndim)
    note_range(call, call.input(1), shape[axis])
    note_positions(call, call.input(1), shape[axis])
    indices = call.shape(1)
    result = [*shape[:axis], *indices, *shape[axis + 1 :]]

    def element(data: Any, where: Any, *index: Any) -> Any:
        inner = where(*index[axis : axis + len(indices)])
        return data(*index[:axis], valid(inner, shape[axis]), *index[axis + len(indices) :])

    return call.lowering.compute("gather", result, element, call.x(0), call.x(1))


def _one_slice(call: Call, axis: int, position: Dim, rank: int) -> Value:
    """Gather at one known index: a part of the tensor, read in place of an index tensor."""
    shape = call.shape()
    if isinstance(position, int) and position < 0:
        position = call.dims.simplify(shape[axis] + position)
    result = [*shape[:axis], *([1] * rank), *shape[axis + 1 :]]

    def element(data: Any, *index: Any) -> Any:
        return data(*index[:axis], position, *index[axis + rank :])

    return call.lowering.compute("gather_one", result, element, call.x(0))


def note_range(call: Call, indices: ir.Value, dim: Dim) -> None:
    """Remember that a model input indexes ``dim`` rows, so that the session can refuse values outside."""
    producer = indices.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        indices = producer.inputs[0]
    if indices.is_graph_input() and isinstance(dim, int):
        low, high = call.lowering.ranges.get(indices, (-dim, dim - 1))
        call.lowering.ranges[indices] = (max(low, -dim), min(high, dim - 1))


def note_positions(call: Call, indices: ir.Value, dim: Dim) -> None:
    """Positions 0, 1, ... up to a dynamic length, read from a table of ``dim`` rows, limit that length."""
    producer = indices.producer()
    while producer is not None and producer.op_type in ("Unsqueeze", "Reshape", "Expand", "Cast", "Identity"):
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    if producer is not None and producer.op_type == "Range" and isinstance(dim, int):
        limit = call.lowering.known(producer.inputs[1])
        if limit is not None:
            call.dims.limit(limit.reshape(-1)[0], dim)


def _gather_elements(call: Call) -> Value:
    shape = call.shape()
    axis = call.axis(0, len(shape))

    def element(data: Any, where: Any, *index: Any) -> Any:
        return data(*index[:axis], valid(where(*index), shape[axis]), *index[axis + 1 :])

    return call.lowering.compute("gather_elements", call.shape(1), element, call.x(0), call.x(1))


def _gather_nd(call: Call) -> Value:
    shape, indices = call.shape(0), call.shape(1)
    batch, depth = int(call.attr("batch_dims", 0)), int(indices[-1])
    outer = len(indices) - 1
    result = [*indices[:-1], *shape[batch + depth :]]

    def element(data: Any, where: Any, *index: Any) -> Any:
        at = [valid(where(*index[:outer], tirx.const(i, "int64")), shape[batch + i]) for i in range(depth)]
        return data(*index[:batch], *at, *index[outer:])

    return call.lowering.compute("gather_nd", result, element, call.x(0), call.x(1))


def _one_hot(call: Call) -> Value:
    depth = call.ints(1)
    indices, values = call.x(0), call.x(2)
    shape = call.shape(0)
    axis = int(call.attr("axis", -1)) % (len(shape) + 1)
    assert depth is not None
    result = [*shape[:axis], depth[0], *shape[axis:]]

    def element(where: Any, choice: Any, *index: Any) -> Any:
        inner = where(*index[:axis], *index[axis + 1 :]).astype("int64")
        inner = tirx.Select(inner < 0, inner + depth[0], inner)
        on, off = choice(tirx.const(1, "int64")), choice(tirx.const(0, "int64"))
        return tirx.Select(inner == index[axis], on, off)

    return call.lowering.compute("one_hot", result, element, indices, values)


def _scatter_nd(call: Call) -> Value:
    reduction = {"none": "update"}.get(call.attr("reduction", "none"), call.attr("reduction", "none"))
    return call.emit(relax.op.scatter_nd(call.x(0), call.x(1), call.x(2), reduction))


def _scatter_elements(call: Call) -> Value:
    reduction = {"none": "update"}.get(call.attr("reduction", "none"), call.attr("reduction", "none"))
    axis = call.axis(0, len(call.shape()))
    return call.emit(relax.op.scatter_elements(call.x(0), call.x(1), call.x(2), axis, reduction))


def _arg(largest: bool) -> Emitter:
    def emit(call: Call) -> Value:
        shape = call.shape()
        axis, keep = call.axis(0, len(shape)), bool(call.attr("keepdims", 1))
        function = relax.op.argmax if largest else relax.op.argmin
        if not call.attr("select_last_index", 0):
            return call.emit(function(call.x(), axis, keep))
        reverse = call.lowering.compute(
            "reverse",
            shape,
            lambda data, *i: data(*i[:axis], shape[axis] - 1 - i[axis], *i[axis + 1 :]),
            call.x(),
        )
        position = call.emit(function(reverse, axis, keep))
        extent = shape[axis] - 1
        return call.lowering.compute(
            "from_end", call.lowering.shape_of(position), lambda data, *i: extent - data(*i), position
        )

    return emit


def _top_k(call: Call) -> list[Value]:
    count = call.numbers(1)
    if count is None:
        raise call.unsupported("k is missing")
    axis = call.axis(-1, len(call.shape()))
    largest = bool(call.attr("largest", 1))
    pair = call.emit(relax.op.topk(call.x(), count[0], axis, "both", largest, "int64"))
    return [call.emit(relax.TupleGetItem(pair, index)) for index in range(2)]


def _cumulative_sum(call: Call) -> Value:
    axis = call.numbers(1)
    if axis is None or call.attr("reverse", 0):
        raise call.unsupported("reverse cumulative sums are not compiled")
    x = call.x()
    exclusive = bool(call.attr("exclusive", 0))
    return call.emit(relax.op.cumsum(x, axis[0] % len(call.shape()), str(x.ty.dtype), exclusive))


def _eye_like(call: Call) -> Value:
    rows, columns = call.shape()
    offset = int(call.attr("k", 0))
    kind = call.attr("dtype")
    dtype = str(call.x().ty.dtype) if kind is None else ir.DataType(kind).numpy().name
    one, zero = tirx.const(np.array(1, dtype).item(), dtype), tirx.const(np.array(0, dtype).item(), dtype)
    return call.lowering.compute("eye", [rows, columns], lambda i, j: tirx.Select(j - i == offset, one, zero))


OPS: dict[str, Emitter] = {
    "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd, "OneHot": _one_hot,
    "ScatterND": _scatter_nd, "ScatterElements": _scatter_elements, "ArgMax": _arg(True), "ArgMin": _arg(False),
    "TopK": _top_k, "CumSum": _cumulative_sum, "EyeLike": _eye_like,
}  # fmt: skip
"""Emitters by operator type."""
