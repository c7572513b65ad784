"""Rotary embeddings: rotations of queries and keys by position as ``RotaryEmbedding``.

    y = x * cos + concat(-x[..., d/2:], x[..., :d/2]) * sin                          (Llama, GPT-NeoX)
    y = concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)                             (the same, by halves)
    y = stack(x[..., 0::2] * cos - x[..., 1::2] * sin, ...).flatten(-2)              (interleaved: GPT-J, llama2.c)
                                                        ->   RotaryEmbedding(x, cos [1|B,S,d/2], sin [1|B,S,d/2],
                                                        interleaved)
Halves are recognized by the positions they hold, so slices, splits, reshapes and gathers are all the same. On
[B,H,S,d] the op is 4-D; on [B,S,H,d] it is 3-D between two reshapes. A rotation of the first part of the heads sets
rotary_embedding_dim.
Refuses  "cos-repeats": the two halves of cos or sin are not provably equal;  "cos-axes": cos is not one of [.., S, d]
per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.caches import Caches, RotaryRefusedError
from xopt.ir.canonical.layout import Axes, axis, before, columns, is_read, width
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import initializer, insert, is_op, producer, remove_dead, replace_uses, scalar
from xopt.ir.poly import Poly
from xopt.ir.shape_rules import integer
from xopt.ir.symbolic import Symbols


@dataclass(frozen=True)
class Rotation:
    """``x`` [.., 2n] rotated by ``cos`` and ``sin``: of width n, or 2n with every value twice (``repeated``)."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    repeated: bool


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Find rotations by their last node; then those of a part of the heads."""
    symbols = Symbols(model.graph)
    caches = Caches(symbols)
    for node in list(model.graph):
        if not is_op(node, "Add", "Concat", "Reshape") or not is_read(node.outputs[0]):
            continue
        rotation = _by_sum(symbols, node) if node.op_type == "Add" else _by_halves(symbols, node)
        if rotation is None:
            continue
        try:
            _replace(symbols, caches, node, rotation)
            report.rewrote("rotary")
        except RotaryRefusedError as reason:
            report.refuse("rotary", node.name, str(reason))
    for node in list(model.graph):
        if is_op(node, "Concat") and _partial(symbols, node):
            report.rewrote("rotary-partial")
    remove_dead(model)


def _by_sum(symbols: Symbols, node: ir.Node) -> Rotation | None:
    """``x * cos + turned(x) * sin`` with ``turned(x) = join(-second, first)``."""
    one, two = _product(node.inputs[0]), _product(node.inputs[1])
    if one is None or two is None:
        return None
    for plain, turned in ((one, two), (two, one)):
        for x, cos in (plain, plain[::-1]):
            for other, sin in (turned, turned[::-1]):
                joined = _joined(symbols, other)
                first = _negated(joined[0]) if joined is not None else None
                if joined is None or first is None:
                    continue
                halves = _halves(symbols, joined[1], first)
                if halves is not None and halves[0] is x and halves[1] == joined[2]:
                    return Rotation(x, cos, sin, joined[2], True)
    return None


def _by_halves(symbols: Symbols, node: ir.Node) -> Rotation | None:
    """``join(first * cos - second * sin, second * cos + first * sin)``."""
    joined = _joined(symbols, node.outputs[0])
    real, imaginary = (producer(joined[0], "Sub"), producer(joined[1], "Add")) if joined is not None else (None, None)
    if joined is None or real is None or imaginary is None:
        return None
    a, b = _product(real.inputs[0]), _product(real.inputs[1])
    sums = [_product(value) for value in imaginary.inputs]
    if a is None or b is None or sums[0] is None or sums[1] is None:
        return None
    crossed = {frozenset(pair) for pair in sums if pair is not None}
    for first, cos in (a, a[::-1]):
        for second, sin in (b, b[::-1]):
            if crossed != {frozenset((second, cos)), frozenset((first, sin))}:
                continue
            halves = _halves(symbols, first, second)
            if halves is not None and halves[1] == joined[2]:
                return Rotation(halves[0], cos, sin, joined[2], False)
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    node = producer(value, "Mul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0], node.inputs[1]


def _negated(value: ir.Value) -> ir.Value | None:
    """``x`` when ``value`` is -x."""
    node = producer(value, "Neg")
    if node is not None:
        return node.inputs[0]
    node = producer(value, "Mul")
    return node.inputs[0] if node is not None and scalar(node.inputs[1]) == -1 else None


def _joined(symbols: Symbols, value: ir.Value) -> tuple[ir.Value, ir.Value, bool] | None:
    """``(a, b, interleaved)`` when ``value`` is a and b one after the other, or element by element, along the last
    axis.
    """
    reshape = producer(value, "Reshape")
    concat = producer(reshape.inputs[0] if reshape is not None else value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    rank = symbols.rank(concat.outputs[0])
    if rank is None or integer(concat, "axis", 0) not in (-1, rank - 1):
        return None
    a, b = concat.inputs
    if reshape is None:
        return (a, b, False) if a is not None and b is not None else None
    dims, flat = symbols.dims(concat.outputs[0]), symbols.dims(value)
    inner = [_without_last(symbols, part) for part in (a, b)]
    if (
        dims is None
        or len(dims) < 2
        or flat is None
        or flat != (*dims[:-2], dims[-2] * dims[-1])
        or inner[0] is None
        or inner[1] is None
    ):
        return None
    return inner[0], inner[1], True


def _without_last(symbols: Symbols, value: ir.Value | None) -> ir.Value | None:
    """``x`` [..., n] when ``value`` is x [..., n, 1]."""
    node = producer(value, "Unsqueeze", "Reshape")
    source = node.inputs[0] if node is not None else None
    dims, inner = symbols.dims(value), symbols.dims(source)
    return source if dims is not None and inner is not None and dims == (*inner, Poly.of(1)) else None


def _halves(symbols: Symbols, first: ir.Value, second: ir.Value) -> tuple[ir.Value, bool] | None:
    """``(x, interleaved)`` when the values are the two halves, or the even and odd elements, of x's last axis."""
    others = {x: places for x, places, _ in _parts(symbols, second)}
    rank = symbols.rank(first)
    for x, places, total in sorted(_parts(symbols, first), key=lambda part: symbols.rank(part[0]) != rank):
        n = len(places)
        if x not in others or len(others[x]) != n or total != 2 * n:
            continue
        for interleaved, low, high in (
            (False, np.arange(n), n + np.arange(n)),
            (True, 2 * np.arange(n), 1 + 2 * np.arange(n)),
        ):
            if np.array_equal(places, low) and np.array_equal(others[x], high):
                return x, interleaved
    return None


def _parts(symbols: Symbols, value: ir.Value) -> Iterator[tuple[ir.Value, np.ndarray, int]]:
    """Tensors of which ``value`` is a part of the last axis, nearest first, with the positions it holds and the width.

    The last axis may be in two pieces, such as [n, 2].
    """
    dims = symbols.dims(value)
    if dims is None:
        return
    start: Axes = tuple(axis(f"axis{i}", dim) for i, dim in enumerate(dims))
    moved: tuple[ir.Value, Axes] | None = (value, start)
    last = f"axis{len(start) - 1}"
    while moved is not None:
        source, axes = moved
        lead, inner = axes[: len(start) - 1], axes[len(start) - 1 :]
        row = inner[0] if len(inner) == 1 else (*inner[0], *inner[1]) if len(inner) == 2 else None
        if row is not None and lead == start[:-1] and {digit.label for digit in row} <= {"", last}:
            places = columns(row, ("", last))
            if places is not None and width(row).constant is not None:
                yield source, places, width(row).constant or 0
        moved = before(symbols, source, axes)


def _replace(symbols: Symbols, caches: Caches, node: ir.Node, rotation: Rotation) -> None:
    x = _in_one_piece(symbols, node, rotation.x)
    dims = symbols.dims(x)
    if dims is None or len(dims) != 4:
        raise RotaryRefusedError("rank")
    size = dims[3].constant
    place = caches.head_axis(rotation.cos, x)
    if size is None or place != caches.head_axis(rotation.sin, x):
        raise RotaryRefusedError("cos-axes")
    tables = [
        caches.table(node, value, place, rotation.interleaved, size // 2, rotation.repeated)
        for value in (rotation.cos, rotation.sin)
    ]
    attributes = {"interleaved": int(rotation.interleaved)}
    out = node.outputs[0]
    if place == 1:
        y = _insert(symbols, node, "RotaryEmbedding", [x, *tables], attributes)
    else:
        heads = dims[2].constant
        if heads is None:
            raise RotaryRefusedError("head-count")
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        joined = initializer(graph, "joined_heads", np.asarray([0, 0, -1], np.int64))
        flat = _insert(symbols, node, "Reshape", [x, joined], {})
        turned = _insert(symbols, node, "RotaryEmbedding", [flat, *tables], attributes | {"num_heads": heads})
        apart = initializer(graph, "per_head", np.asarray([0, 0, -1, size], np.int64))
        y = _insert(symbols, node, "Reshape", [turned, apart], {})
    y.shape = out.shape
    replace_uses(out, y)


def _in_one_piece(symbols: Symbols, site: ir.Node, x: ir.Value) -> ir.Value:
    """``x`` [.., .., .., n, 2] as [.., .., .., 2n]."""
    graph = site.graph
    if symbols.rank(x) != 5 or not isinstance(graph, ir.Graph):
        return x
    return _insert(symbols, site, "Reshape", [x, initializer(graph, "whole", np.asarray([0, 0, 0, -1], np.int64))], {})


def _insert(symbols: Symbols, site: ir.Node, op: str, inputs: list[ir.Value], attributes: dict[str, int]) -> ir.Value:
    return symbols.learn(insert(site, op, inputs, attributes))


def _partial(symbols: Symbols, node: ir.Node) -> bool:
    """``concat(rotary(x[..., :r]), x[..., r:])`` is a rotary of the first r elements of x's heads."""
    turned = producer(node.inputs[0], "RotaryEmbedding") if len(node.inputs) == 2 else None
    rank = symbols.rank(node.outputs[0])
    if turned is None or node.inputs[1] is None or turned.inputs[0] is None or rank != 4:
        return False
    if integer(node, "axis", 0) not in (-1, 3) or symbols.rank(turned.inputs[0]) != 4:
        return False
    rest = {x: places for x, places, _ in _parts(symbols, node.inputs[1])}
    for x, places, total in _parts(symbols, turned.inputs[0]):
        if x not in rest or symbols.rank(x) != 4 or total != len(places) + len(rest[x]):
            continue
        if not np.array_equal(np.concatenate([places, rest[x]]), np.arange(total)):
            continue
        attributes = {"interleaved": integer(turned, "interleaved", 0), "rotary_embedding_dim": len(places)}
        inputs = [x, *(value for value in turned.inputs[1:] if value is not None)]
        replace_uses(node.outputs[0], _insert(symbols, node, "RotaryEmbedding", inputs, attributes))
        return True
    return False
