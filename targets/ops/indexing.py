"""Operators that read or write by computed indices, and the ones that search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from xopt.kernels import scatter
from xopt.kernels.emit import i64
from xopt.runtime.device import CPU
from xopt.targets.ops.bounds import check_indices, inside, refuse_rows, valid
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.fusion import static
from xopt.targets.ops.layout import FAR, strided
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def _gather(call: Call) -> Value:
    shape = call.shape()
    axis = call.axis(0, len(shape))
    known = call.known(1)
    if known is not None and known.size == 1:
        return _one_slice(call, axis, known.reshape(-1)[0], known.ndim)
    check_indices(call, 1, [shape[axis]])
    indices = call.shape(1)
    result = [*shape[:axis], *indices, *shape[axis + 1 :]]

    def element(data: Any, where: Any, *index: Any) -> Any:
        inner = where(*index[axis : axis + len(indices)])
        return data(*index[:axis], valid(inner, shape[axis]), *index[axis + len(indices) :])

    return call.lowering.compute("gather", result, element, call.x(0), call.x(1))


def _one_slice(call: Call, axis: int, position: Dim, rank: int) -> Value:
    """Gather at one known index: a part of the tensor, read in place of an index tensor."""
    shape = call.shape()
    check_indices(call, 1, [shape[axis]])
    if call.dims.proves(position < 0):
        position = call.dims.simplify(shape[axis] + position)
    else:
        call.require(position >= 0, "an index is negative")
    result = [*shape[:axis], *([1] * rank), *shape[axis + 1 :]]

    def element(data: Any, *index: Any) -> Any:
        return data(*index[:axis], position, *index[axis + rank :])

    return call.lowering.compute("gather_one", result, element, call.x(0))


def _gather_elements(call: Call) -> Value:
    shape, result = call.shape(), call.shape(1)
    axis = call.axis(0, len(shape))
    _require_within(call, result, shape, axis)
    check_indices(call, 1, [shape[axis]])

    def element(data: Any, where: Any, *index: Any) -> Any:
        return data(*index[:axis], valid(where(*index), shape[axis]), *index[axis + 1 :])

    return call.lowering.compute("gather_elements", result, element, call.x(0), call.x(1))


def _require_within(call: Call, indices: list[Dim], data: list[Dim], axis: int) -> None:
    """Indices of elements have the rank of the data, and but for the axis that they choose from no larger dimension."""
    if len(indices) != len(data):
        raise call.unsupported(f"its indices have rank {len(indices)}, its data rank {len(data)}")
    for other, (size, most) in enumerate(zip(indices, data)):
        if other != axis:
            call.require(size <= most, f"dimension {other} of the indices is larger than that of the data")


def _gather_nd(call: Call) -> Value:
    shape, indices = call.shape(0), call.shape(1)
    batch, depth = int(call.attr("batch_dims", 0)), _depth(call, indices)
    if not 0 <= batch < len(indices) or batch + depth > len(shape):
        raise call.unsupported(f"{batch} batch dimensions and indices of {depth} do not fit data of rank {len(shape)}")
    check_indices(call, 1, shape[batch : batch + depth])
    where = call.lowering.recast(call.x(1), [*shape[:batch], *indices[batch:]])
    outer = len(indices) - 1
    result = [*shape[:batch], *indices[batch:-1], *shape[batch + depth :]]

    def element(data: Any, where: Any, *index: Any) -> Any:
        at = [valid(where(*index[:outer], tirx.const(i, "int64")), shape[batch + i]) for i in range(depth)]
        return data(*index[:batch], *at, *index[outer:])

    return call.lowering.compute("gather_nd", result, element, call.x(0), where)


def _depth(call: Call, indices: list[Dim]) -> int:
    """How many axes each row of indices chooses from."""
    if not indices or not isinstance(indices[-1], int) or indices[-1] < 1:
        raise call.unsupported("the last dimension of its indices is no positive number")
    return indices[-1]


def _one_hot(call: Call) -> Value:
    depth = call.ints(1)
    if depth is None or len(depth) != 1:
        raise call.unsupported("its depth is no single number")
    return one_hot(call, int(depth[0]) if isinstance(depth[0], float) else depth[0])


def one_hot(call: Call, depth: Dim) -> Value:
    """The second of two values where the new axis has the place that input 0 names, the first everywhere else."""
    call.require(depth >= 1, "its depth is not positive")
    indices, values = call.x(0), call.x(2)
    if not call.dims.same_shape(call.shape(2), [2]):
        raise call.unsupported("its values are not two")
    shape = call.shape(0)
    axis = call.axis(-1, len(shape) + 1)
    result = [*shape[:axis], depth, *shape[axis:]]

    def element(where: Any, choice: Any, *index: Any) -> Any:
        inner = where(*index[:axis], *index[axis + 1 :]).astype("int64")
        inner = tirx.Select(inner < 0, inner + depth, inner)
        on, off = choice(tirx.const(1, "int64")), choice(tirx.const(0, "int64"))
        return tirx.Select(inner == index[axis], on, off)

    return call.lowering.compute("one_hot", result, element, indices, values)


def _scatter_nd(call: Call) -> Value:
    """Rows of updates into rows of data: the indices of each row become the number of a row of the flat data."""
    shape, indices = call.shape(0), call.shape(1)
    depth = _depth(call, indices)
    if depth > len(shape):
        raise call.unsupported(f"indices of {depth} do not fit data of rank {len(shape)}")
    check_indices(call, 1, shape[:depth])
    rows, width = call.dims.product(shape[:depth]), call.dims.product(shape[depth:])
    count = call.dims.product(indices[:-1])
    updates = call.lowering.recast(call.x(2), [*indices[:-1], *shape[depth:]])

    def row(where: Any, index: Any) -> Any:
        number: Any = tirx.const(0, "int64")
        for k, dim in enumerate(shape[:depth]):
            number = number * dim + valid(where(index, tirx.const(k, "int64")), dim)
        return number

    where = call.lowering.compute("rows", [count], row, call.lowering.reshape(call.x(1), [count, depth]))
    return scattered(call, call.x(0), where, updates, (rows, width), str(call.attr("reduction", "none")))


def _scatter_elements(call: Call) -> Value:
    """Elements of updates into elements of the flat data."""
    shape, indices = call.shape(0), call.shape(1)
    axis = call.axis(0, len(shape))
    _require_within(call, indices, shape, axis)
    check_indices(call, 1, [shape[axis]])
    updates = call.lowering.recast(call.x(2), indices)

    def position(where: Any, *index: Any) -> Any:
        number: Any = tirx.const(0, "int64")
        for k, dim in enumerate(shape):
            number = number * dim + (valid(where(*index), dim) if k == axis else index[k])
        return number

    where = call.lowering.compute("positions", indices, position, call.x(1))
    where = call.lowering.reshape(where, [call.dims.product(indices)])
    flat = (call.dims.product(shape), 1)
    return scattered(call, call.x(0), where, updates, flat, str(call.attr("reduction", "none")))


def scattered(
    call: Call, data: relax.Expr, where: relax.Expr, updates: relax.Expr, flat: tuple[Dim, Dim], reduction: str
) -> Value:
    """``data`` with updates [N, width] in, or combined with, rows ``where`` [N] of its flat form [rows, width].

    Args:
        call: the node.
        data: the tensor.
        where: int64, inside.
        updates: of the type of the data.
        flat: rows and width.
        reduction: how an element and its update are combined, by ONNX's name.
    """
    lowering, shape = call.lowering, call.lowering.shape_of(data)
    count = lowering.shape_of(where)[0]
    rows = lowering.reshape(data, flat)
    updates = lowering.reshape(updates, [count, flat[1]])
    if str(updates.ty.dtype) != str(data.ty.dtype):
        raise call.unsupported("its updates have another type than its data")
    if reduction not in scatter.REDUCTIONS:
        raise call.unsupported("there is no such reduction")
    if lowering.target.device != CPU:
        mode = "update" if reduction == "none" else reduction
        return lowering.reshape(
            call.emit(relax.op.scatter_nd(rows, lowering.reshape(where, [count, 1]), updates, mode)), shape
        )
    workload = scatter.Workload(static([flat[1]])[0], str(data.ty.dtype), reduction)
    name = scatter.name(workload)
    result = lowering.call(name, lambda: scatter.build(workload), [rows, where, updates], flat, workload.dtype)
    return lowering.reshape(result, shape)


def _arg(largest: bool) -> Emitter:
    def emit(call: Call) -> Value:
        shape = call.shape()
        axis, keep = call.axis(0, len(shape)), bool(call.attr("keepdims", 1))
        function = relax.op.argmax if largest else relax.op.argmin
        if not call.attr("select_last_index", 0):
            return call.emit(function(call.x(), axis, keep))
        position = call.emit(function(_turned(call, call.x(), axis), axis, keep))
        extent = shape[axis] - 1
        return call.lowering.compute(
            "from_end", call.lowering.shape_of(position), lambda data, *i: extent - data(*i), position
        )

    return emit


def _top_k(call: Call) -> list[Value]:
    """The first k in order; all are sorted where k is a dynamic size, as exporters write a sort."""
    counts = call.ints(1)
    if counts is None or len(counts) != 1:
        raise call.unsupported("k is no single number")
    shape, count = call.shape(), counts[0]
    axis = call.axis(-1, len(shape))
    call.pass_over("sorted")  # any order is right without it
    if isinstance(count, int) and count < 1:
        raise call.unsupported(f"k is {count}")
    if not call.dims.equal(shape[axis], count):
        call.require(shape[axis] >= count, f"there are fewer than k = {count} elements")
    first = count if isinstance(count, int) else -1
    parts = in_order(call, first, axis)
    return [strided(call, part, {axis: (0, count, 1)}) for part in parts]


def in_order(call: Call, count: int, axis: int) -> list[relax.Expr]:
    """The first ``count`` elements of input 0 along an axis (-1: all), by ``largest``, and where they stand.

    TVM's sort knows neither unsigned integers nor those of 16 bits: they are sorted as int64 of the same order.
    """
    x, lowering = call.x(), call.lowering
    dtype = str(x.ty.dtype)
    other, top = dtype in ("int16", "uint16", "uint32", "uint64"), tirx.const(-(1 << 63), "int64")

    def there(value: Any) -> Any:
        return tirx.reinterpret("int64", value) ^ top if dtype == "uint64" else value.astype("int64")

    def back(value: Any) -> Any:
        return tirx.reinterpret("uint64", value ^ top) if dtype == "uint64" else value.astype(dtype)

    keys = lowering.compute("keys", call.shape(), lambda t, *i: there(t(*i)), x) if other else x
    pair = call.emit(relax.op.topk(keys, count, axis, "both", bool(call.attr("largest", 1)), "int64"))
    values, places = (call.emit(relax.TupleGetItem(pair, index)) for index in range(2))
    if other:
        values = lowering.compute("values", lowering.shape_of(values), lambda t, *i: back(t(*i)), values)
    return [values, places]


def _cumulative_sum(call: Call) -> Value:
    axis = call.numbers(1)
    if axis is None or len(axis) != 1:
        raise call.unsupported("its axis is no single number")
    return sums_along(call, call.axes(axis, len(call.shape()))[0])


def sums_along(call: Call, axis: int) -> relax.Expr:
    """Input 0 summed up (CumProd: multiplied) along an axis, from the end or without the element itself."""
    x, exclusive = call.x(), bool(call.attr("exclusive", 0))
    backwards = bool(call.attr("reverse", 0))
    if backwards:
        x = _turned(call, x, axis)
    scan = relax.op.cumprod if call.node.op_type == "CumProd" else relax.op.cumsum
    sums = call.emit(scan(x, axis, str(x.ty.dtype), exclusive))
    return _turned(call, sums, axis) if backwards else sums


def _turned(call: Call, x: relax.Expr, axis: int) -> relax.Expr:
    shape = call.lowering.shape_of(x)
    return call.lowering.compute(
        "reverse", shape, lambda data, *i: data(*i[:axis], shape[axis] - 1 - i[axis], *i[axis + 1 :]), x
    )


def _reverse_sequence(call: Call) -> Value:
    """The first elements of each sequence turned round, as many as its length says."""
    shape = call.shape()
    batch, time = (
        call.axes([int(call.attr(name, k))], len(shape))[0] for name, k in (("batch_axis", 1), ("time_axis", 0))
    )
    if batch == time:
        raise call.unsupported("its axes of time and of batches are one")
    lengths = call.lowering.recast(call.x(1), [shape[batch]])
    what = "a length is negative, or more than there is"
    refuse_rows(call, 1, 1, lambda row: tirx.Or(row[0] < 0, row[0] > i64(shape[time])), what)

    def element(x: Any, length: Any, *index: Any) -> Any:
        turned = length(index[batch]) - 1 - index[time]
        place = inside(tirx.Select(turned >= 0, turned, index[time]), shape[time])
        return x(*index[:time], place, *index[time + 1 :])

    return call.lowering.compute("reverse_sequence", shape, element, call.x(0), lengths)


def _tensor_scatter(call: Call) -> Value:
    """A cache [B, ..., S, ...] with an update [B, ..., L, ...] in it, in each sample from an index of its own on."""
    shape, update, mode = call.shape(0), call.shape(1), str(call.attr("mode", "linear"))
    axis = call.axis(-2, len(shape))
    if mode not in ("linear", "circular") or axis == 0 or len(update) != len(shape):
        raise call.unsupported("there is no such mode, or its axis is that of the batch")
    call.require(update[axis] <= shape[axis], "its update is longer than its cache")
    operands = [call.x(0), call.lowering.recast(call.x(1), [*shape[:axis], update[axis], *shape[axis + 1 :]])]
    if call.has(2):
        operands.append(call.lowering.recast(call.x(2), [shape[0]]))
        most = i64(call.dims.simplify(shape[axis] - (update[axis] if mode == "linear" else 1)))
        refuse_rows(call, 2, 1, lambda row: tirx.Or(row[0] < 0, row[0] > most), "its update leaves its cache")

    def element(x: Any, new: Any, *rest: Any) -> Any:
        starts, index = rest[: len(operands) - 2], rest[len(operands) - 2 :]
        place = index[axis]
        for start in starts:
            place = place - start(index[0])
        if mode == "circular":
            place = tirx.floormod(place, i64(shape[axis]))
        taken = tirx.And(place >= 0, place < i64(update[axis]))
        near = inside(place, update[axis])
        return tirx.if_then_else(taken, new(*index[:axis], near, *index[axis + 1 :]), x(*index))

    return call.lowering.compute("tensor_scatter", shape, element, *operands)


def _eye_like(call: Call) -> Value:
    rows, columns = call.shape()
    offset = tirx.const(max(min(int(call.attr("k", 0)), FAR), -FAR), "int64")
    kind = call.attr("dtype")
    dtype = str(call.x().ty.dtype) if kind is None else ir.DataType(kind).numpy().name
    one, zero = tirx.const(np.array(1, dtype).item(), dtype), tirx.const(np.array(0, dtype).item(), dtype)
    return call.lowering.compute("eye", [rows, columns], lambda i, j: tirx.Select(j - i == offset, one, zero))


OPS: dict[str, Emitter] = {
    "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd, "OneHot": _one_hot,
    "ScatterND": _scatter_nd, "ScatterElements": _scatter_elements, "ArgMax": _arg(True), "ArgMin": _arg(False),
    "ReverseSequence": _reverse_sequence, "TensorScatter": _tensor_scatter,
    "TopK": _top_k, "CumSum": _cumulative_sum, "CumProd": _cumulative_sum, "EyeLike": _eye_like,
}  # fmt: skip
"""Emitters by operator type."""
