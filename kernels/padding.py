"""Batches without padding: the tokens that a mask shows, one sequence behind the other, and back.

    Layout   starts [B + 2]   where each sequence starts among the packed tokens, their number T, the longest sequence
             place [B * S]    where a token of the padded batch lies among the packed ones, -1 if it is padding
             total [1]        T again, as the shape of what is packed
    Pack     Y[place] = X     rows of X [B, S, C] to Y [T, C]
    Unpack   Y = X[place]     rows of X [T, C] to Y [B, S, C], zeros for padding

Source    Zhai et al. (IPDPS 2023), ByteTransformer: the padding-free algorithm, by a prefix sum over the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    bind,
    dim,
    flat,
    i64,
    load,
    local,
    parallel,
    partial_load,
    partial_store,
    prim_func,
    put,
    serial,
    splat,
    store,
    when,
)
from xopt.kernels.fixed import Config as Config
from xopt.kernels.fixed import heuristic as heuristic
from xopt.kernels.fixed import space as space
from xopt.kernels.isa import Isa

VERSION = 1


@dataclass(frozen=True)
class Workload:
    """One step.

    Args:
        step: "layout", "pack" or "unpack".
        width: C, for packing and unpacking float32 rows.
    """

    step: str
    width: int = 0


def name(workload: Workload, config: Config, isa: Isa) -> str:
    return f"padding_{workload.step}_{workload.width}_{isa.token}"


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (mask bool [B, S], starts, place, total), (X, place, Y) or (X, place, Y); indices are int64."""
    bodies = {"layout": _layout, "pack": _pack, "unpack": _unpack}
    return prim_func(name(workload, config, isa), lambda: bodies[workload.step](workload, isa))


def _layout(workload: Workload, isa: Isa) -> None:
    batch, length = dim(None, "batch"), dim(None, "length")
    mask = argument("mask", (batch, length), "bool")
    starts = argument("starts", (batch + 2,), "int64")
    place = argument("place", (batch * length,), "int64")
    total = argument("total", (1,), "int64")
    count, longest = local((1,), "int64"), local((1,), "int64")
    put(count, i64(0), 0)
    put(longest, i64(0), 0)
    with serial(batch) as b:
        put(starts, count[i64(0)], b)
        with serial(length) as s:
            shown = bind(tirx.Select(mask[b, s], i64(1), i64(0)))
            put(place, tirx.Select(shown == 1, count[i64(0)], i64(-1)), b * length + s)
            put(count, count[i64(0)] + shown, 0)
        put(longest, tirx.max(longest[i64(0)], count[i64(0)] - starts[b]), 0)
    put(starts, count[i64(0)], batch)
    put(starts, longest[i64(0)], batch + 1)
    put(total, count[i64(0)], 0)


def _pack(workload: Workload, isa: Isa) -> None:
    batch, length, tokens = dim(None, "batch"), dim(None, "length"), dim(None, "tokens")
    padded = argument("x", (batch, length, workload.width))
    place = argument("place", (batch * length,), "int64")
    packed = argument("y", (tokens, workload.width))
    rows = flat(padded, (batch * length, workload.width))
    with parallel(batch * length) as row:
        target = bind(place[row])
        when(target >= 0, lambda: _copy(rows, row, packed, target, workload.width, isa))


def _unpack(workload: Workload, isa: Isa) -> None:
    batch, length, tokens = dim(None, "batch"), dim(None, "length"), dim(None, "tokens")
    packed = argument("x", (tokens, workload.width))
    place = argument("place", (batch * length,), "int64")
    padded = argument("y", (batch, length, workload.width))
    rows = flat(padded, (batch * length, workload.width))
    with parallel(batch * length) as row:
        source = bind(place[row])
        when(
            source >= 0,
            lambda: _copy(packed, source, rows, row, workload.width, isa),
            lambda: _clear(rows, row, workload.width, isa),
        )


def _copy(source: Buffer, from_row: Expr, target: Buffer, to_row: Expr, width: int, isa: Isa) -> None:
    lanes = isa.lanes
    whole, tail = divmod(width, lanes)
    if whole:
        with serial(whole) as v:
            store(target, load(source, from_row, v * lanes, lanes=lanes), to_row, v * lanes, lanes=lanes)
    if tail:
        value = partial_load(source, from_row, whole * lanes, count=tail, lanes=lanes)
        partial_store(target, value, to_row, whole * lanes, count=tail, lanes=lanes)


def _clear(target: Buffer, row: Expr, width: int, isa: Isa) -> None:
    lanes = isa.lanes
    whole, tail = divmod(width, lanes)
    if whole:
        with serial(whole) as v:
            store(target, splat(0.0, lanes), row, v * lanes, lanes=lanes)
    if tail:
        partial_store(target, splat(0.0, lanes), row, whole * lanes, count=tail, lanes=lanes)
