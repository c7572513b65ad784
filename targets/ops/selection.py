"""Operators that choose elements by what they are: how many there are is known when the model runs.

chosen bool [N] ─▶ places int64 [N], count ─▶ a dimension ─▶ what lies at the first ``count`` places
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import relax, te, tirx

from xopt.kernels import selection
from xopt.kernels.emit import i64
from xopt.runtime.device import CPU
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

ZERO = i64(0)


def chosen(call: Call, flags: relax.Expr, size: Dim) -> tuple[relax.Expr, Dim]:
    """Places (int64 [size]) of the flags (bool [size]) that are set, and their number, a dimension.

    Raises:
        InputError: E-UNSUPPORTED-OP, the target is not a CPU.
    """
    if call.lowering.target.device != CPU:
        raise call.unsupported("a size that the data decides, on this target")
    places, count = call.lowering.call_for_all(
        selection.NAME, selection.build, [flags], [[size], [1]], ["int64", "int64"]
    )
    return places, call.lowering.decide(count, 1)[0]


def _nonzero(call: Call) -> Value:
    """int64 [rank, count]: a column of indices for each element that is not 0."""
    shape = call.shape()
    size = call.dims.product(shape)
    flat = call.lowering.reshape(call.x(), [size])
    dtype = str(flat.ty.dtype)
    zero = tirx.const(0, dtype)
    flags = flat if dtype == "bool" else call.lowering.compute("nonzero", [size], lambda x, i: x(i) != zero, flat)
    places, count = chosen(call, flags, size)
    if not shape:
        return call.lowering.compute("columns", [0, count], lambda *i: ZERO)

    def element(where: Any, axis: Any, column: Any) -> Any:
        rest, result = where(column), ZERO
        for place in reversed(range(len(shape))):
            result = tirx.Select(axis == place, tirx.floormod(rest, shape[place]), result)
            rest = tirx.floordiv(rest, shape[place])
        return result

    return call.lowering.compute("columns", [len(shape), count], element, places)


def _compress(call: Call) -> Value:
    """The slices of an axis, or the elements, whose condition is set; conditions that are missing are not."""
    shape = call.shape()
    given = call.attr("axis")
    x = call.x()
    if given is None:
        shape = [call.dims.product(shape)]
        x = call.lowering.reshape(x, shape)
    axis = call.axes([0 if given is None else int(given)], len(shape))[0]
    conditions = call.shape(1)[0]
    call.require(conditions <= shape[axis], "it has more conditions than elements to choose from")
    places, count = chosen(call, call.x(1), conditions)

    def element(data: Any, where: Any, *index: Any) -> Any:
        return data(*index[:axis], where(index[axis]), *index[axis + 1 :])

    return call.lowering.compute("compress", [*shape[:axis], count, *shape[axis + 1 :]], element, x, places)


# -- equal elements ------------------------------------------------------------------------------------------------
def _unique(call: Call) -> list[Value]:
    """The slices of an axis (or the elements) that are the first of their kind, and how they are spread.

    Every slice finds the first that equals it. In order (``sorted``) the rank of a kind is the number of kinds whose
    slice is smaller, compared element by element.
    """
    shape, given = call.shape(), call.attr("axis")
    x = call.x()
    ordered = bool(call.attr("sorted", 1))
    axis = None if given is None else call.axes([int(given)], len(shape))[0]
    rows = call.dims.product(shape) if axis is None else shape[axis]
    order = [] if axis is None else [axis, *(other for other in range(len(shape)) if other != axis)]
    moved = x if not order or order == sorted(order) else call.emit(relax.op.permute_dims(x, order))
    width = 1 if axis is None else call.dims.product([dim for other, dim in enumerate(shape) if other != axis])
    table = call.lowering.reshape(moved, [rows, width])
    first = _first_equal(call, table, rows, width)
    flags = call.lowering.compute("firsts", [rows], lambda f, i: f(i) == i, first)
    places, count = chosen(call, flags, rows)
    if ordered:
        places = _in_order(call, table, places, count, width)
    indices = call.lowering.compute("indices", [count], lambda p, i: p(i), places)
    inverse = _number_of(call, first, indices, rows, count)
    counts = _how_often(call, inverse, rows, count)

    def element(data: Any, where: Any, *index: Any) -> Any:
        if axis is None:
            return data(where(index[0]), ZERO)
        inner = [i for other, i in enumerate(index) if other != axis]
        column: Any = ZERO
        for i, dim in zip(inner, [dim for other, dim in enumerate(shape) if other != axis]):
            column = column * dim + i
        return data(where(index[axis]), column)

    result = [count] if axis is None else [count if other == axis else dim for other, dim in enumerate(shape)]
    values = call.lowering.compute("unique", result, element, table, indices)
    return [values, indices, inverse, counts]


def _axis(extent: Dim, name: str) -> Any:
    return te.reduce_axis((ZERO, i64(extent)), name)


def _first_equal(call: Call, table: relax.Expr, rows: Dim, width: Dim) -> relax.Expr:
    """int64 [rows]: the first row that equals each."""
    other, column = _axis(rows, "other"), _axis(width, "column")
    differs = call.lowering.compute(
        "differences",
        [rows, rows],
        lambda x, i, j: te.sum((x(i, column) != x(j, column)).astype("int64"), axis=[column]),
        table,
    )
    last = i64(rows)
    return call.lowering.compute(
        "first_equal", [rows], lambda d, i: te.min(tirx.Select(d(i, other) == 0, other, last), axis=[other]), differs
    )


def _in_order(call: Call, table: relax.Expr, places: relax.Expr, count: Dim, width: Dim) -> relax.Expr:
    """``places`` of distinct rows in the order of the rows: a row comes behind those that are smaller."""
    column, other = _axis(width, "column"), _axis(count, "other")
    end = i64(width)

    def first_difference(x: Any, where: Any, i: Any, j: Any) -> Any:
        unequal = x(where(i), column) != x(where(j), column)
        return te.min(tirx.Select(unequal, column, end), axis=[column])

    found = call.lowering.compute("first_difference", [count, count], first_difference, table, places)

    def smaller(x: Any, where: Any, at: Any, i: Any, j: Any) -> Any:
        place = tirx.min(at(i, j), end - 1)
        return (x(where(j), place) < x(where(i), place)).astype("int64")

    less = call.lowering.compute("smaller", [count, count], smaller, table, places, found)
    rank = call.lowering.compute("rank", [count], lambda s, i: te.sum(s(i, other), axis=[other]), less)

    def at_rank(where: Any, ranks: Any, i: Any) -> Any:
        return te.sum(tirx.Select(ranks(other) == i, where(other), ZERO), axis=[other])

    return call.lowering.compute("in_order", [count], at_rank, places, rank)


def _number_of(call: Call, first: relax.Expr, kinds: relax.Expr, rows: Dim, count: Dim) -> relax.Expr:
    """int64 [rows]: which of the kinds each row is of."""
    other = _axis(count, "other")
    return call.lowering.compute(
        "inverse",
        [rows],
        lambda f, k, i: te.sum(tirx.Select(k(other) == f(i), other, ZERO), axis=[other]),
        first,
        kinds,
    )


def _how_often(call: Call, inverse: relax.Expr, rows: Dim, count: Dim) -> relax.Expr:
    row = _axis(rows, "row")
    return call.lowering.compute(
        "counts", [count], lambda n, i: te.sum((n(row) == i).astype("int64"), axis=[row]), inverse
    )


OPS: dict[str, Emitter] = {"NonZero": _nonzero, "Compress": _compress, "Unique": _unique}
"""Emitters by operator type."""
