"""Bipartite matching of tokens: what the bodies of ``xopt::MergeTokens`` and ``xopt::MergeTokensMCTF`` share.

Each function adds nodes through ``op``, onnxscript's builder of a function body. N tokens lie along axis 1; those at
even positions are set A, those at odd positions set B. All tensors are float32, all positions int64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir
from onnxscript import build_function

OPSET = 24
END = 2**31 - 1
_TINY = 1e-12
"""Smallest norm: keeps the direction of a zero vector from becoming NaN."""


class Op(Protocol):
    """Builder of a function body: ``op.Add(a, b)`` adds a node and returns its output."""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]: ...


def build(
    name: str, body: Callable[..., tuple[ir.Value, ir.Value]], inputs: Sequence[str], attributes: Mapping[str, Any]
) -> ir.Function:
    """Function ``xopt::name`` with the nodes that ``body(op, *inputs)`` adds."""
    function: ir.Function = build_function(
        body,
        [ir.Value(name=value) for value in inputs],
        domain="xopt",
        name=name,
        attributes=ir.convenience.convert_attributes(attributes),
        opset_imports={"": OPSET},
    )
    return function


def top(op: Op, x: ir.Value, k: ir.Value, axis: int, *, largest: int) -> ir.Value:
    """Positions of the k largest or smallest elements along an axis, in order; ties go to the lower position."""
    outputs: Any = op.TopK(x, k, axis=axis, largest=largest, _outputs=2)
    positions: ir.Value = outputs[1]
    return positions


def best_edges(op: Op, scores: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of ``scores [B, from, to]``: the ``count`` rows with the largest maxima [B, count], and where these are."""
    best = op.ReduceMax(scores, ints(op, 2), keepdims=0)
    partner = op.ArgMax(scores, axis=2, keepdims=0)
    source = top(op, best, count, 1, largest=1)
    return source, op.GatherElements(partner, source, axis=1)


def pool(op: Op, sums: ir.Value, source: ir.Value, target: ir.Value) -> ir.Value:
    """Add the rows ``source [B, r]`` of ``sums [B, N, C]`` to its rows ``target [B, r]``; sources stay as they are."""
    positions = op.Unsqueeze(positions_of(op, sums), ints(op, 0, 2))
    lands = op.Cast(op.Equal(positions, op.Unsqueeze(target, ints(op, 1))), to=ir.DataType.FLOAT)
    return op.Add(sums, op.MatMul(lands, take(op, sums, source)))


def survivors(op: Op, size: ir.Value, source: ir.Value, protected: ir.Value, r: ir.Value) -> ir.Value:
    """Positions [B, N - r] of the tokens that are left, in the order of the output.

    The order of all N does not depend on the data; a running count of those left gives each its place.
    """
    positions, n = positions_of(op, size), count(op, size)
    after_a = op.Mul(op.Mod(positions, ints(op, 2)), n)
    key = op.Where(op.Less(positions, protected), op.Sub(positions, n), op.Add(positions, after_a))
    order = top(op, key, n, 0, largest=0)
    left = op.Gather(op.Cast(op.Not(contains(op, source, n)), to=ir.DataType.INT64), order, axis=1)
    place = op.Mul(op.Sub(op.CumSum(left, scalar(op, 1)), ints(op, 1)), left)
    some = op.Squeeze(op.Slice(size, r, ints(op, END), ints(op, 1)), ints(op, 2))
    empty = op.Cast(op.Mul(some, number(op, 0.0)), to=ir.DataType.INT64)
    return op.ScatterElements(empty, place, op.Mul(order, left), axis=1, reduction="add")


def contains(op: Op, chosen: ir.Value, count: ir.Value) -> ir.Value:
    """Bool [B, count]: whether each position is among ``chosen [B, r]``."""
    positions = op.Range(scalar(op, 0), op.Squeeze(count), scalar(op, 1))
    hits = op.Equal(op.Unsqueeze(positions, ints(op, 0, 2)), op.Unsqueeze(chosen, ints(op, 1)))
    # A sum, since the largest of none chosen would be the lowest integer, which is true.
    return op.Cast(op.ReduceSum(op.Cast(hits, to=ir.DataType.INT32), ints(op, 2), keepdims=0), to=ir.DataType.BOOL)


def is_protected(op: Op, x: ir.Value, protected: ir.Value) -> ir.Value:
    """Bool [1, N, 1]."""
    return op.Unsqueeze(op.Less(positions_of(op, x), protected), ints(op, 0, 2))


def positions_of(op: Op, x: ir.Value) -> ir.Value:
    """Int64 [N]: 0, 1, ..."""
    return op.Range(scalar(op, 0), op.Squeeze(count(op, x)), scalar(op, 1))


def count(op: Op, x: ir.Value) -> ir.Value:
    """Int64 [1]: size of axis 1."""
    return op.Shape(x, start=1, end=2)


def halves(op: Op, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Even and odd positions of axis 1."""
    end, axis, step = ints(op, END), ints(op, 1), ints(op, 2)
    return op.Slice(x, ints(op, 0), end, axis, step), op.Slice(x, ints(op, 1), end, axis, step)


def even(op: Op, index: ir.Value) -> ir.Value:
    """Positions of members ``index`` of A."""
    return op.Mul(index, ints(op, 2))


def odd(op: Op, index: ir.Value) -> ir.Value:
    """Positions of members ``index`` of B."""
    return op.Add(op.Mul(index, ints(op, 2)), ints(op, 1))


def unit(op: Op, x: ir.Value) -> ir.Value:
    """``x`` with rows of length 1."""
    return op.Div(x, op.Max(op.ReduceL2(x, ints(op, -1), keepdims=1), number(op, _TINY)))


def take(op: Op, x: ir.Value, index: ir.Value) -> ir.Value:
    """Rows ``index [B, r]`` of ``x [B, N, C]``."""
    return op.GatherND(x, op.Unsqueeze(index, ints(op, 2)), batch_dims=1)


def columns(op: Op, x: ir.Value, start: int, end: int) -> ir.Value:
    """``x[:, :, start:end]``."""
    return op.Slice(x, ints(op, start), ints(op, end), ints(op, 2))


def ints(op: Op, *values: int) -> ir.Value:
    return op.Constant(value_ints=values)


def scalar(op: Op, value: int) -> ir.Value:
    return op.Constant(value_int=value)


def number(op: Op, value: float) -> ir.Value:
    return op.Constant(value_float=value)


def edges(op: Op) -> ir.Value:
    """Attribute ``r`` as int64 [1]."""
    return op.Constant(value_ints=ir.RefAttr("value_ints", "r", ir.AttributeType.INTS))


def protected_tokens(op: Op) -> ir.Value:
    """Attribute ``protected`` as int64 []."""
    return op.Constant(value_int=ir.RefAttr("value_int", "protected", ir.AttributeType.INT))


def one_over(op: Op, name: str) -> ir.Value:
    """1 / attribute ``name`` as float32 []; 0 for infinity."""
    return op.Reciprocal(op.Constant(value_float=ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)))
