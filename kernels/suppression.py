"""Non-maximum suppression: of boxes that overlap much, the one with the best score.

    for batch, class:                                   in order
        until ``most`` are taken:
            best = the box of the best score over ``least`` that is neither taken nor hidden; end if there is none
            take it, hide those whose intersection over union with it is over ``overlap``

References: Neubeck and Van Gool, Efficient Non-Maximum Suppression, ICPR 2006.
"""

from __future__ import annotations

from functools import reduce

from tvm import tirx

from xopt.kernels.emit import (
    Buffer,
    Expr,
    PrimFunc,
    argument,
    bind,
    dim,
    i64,
    let,
    local,
    prim_func,
    put,
    serial,
    when,
    workspace,
)

VERSION = 1


def name(centred: bool) -> str:
    return f"suppression_{'centred' if centred else 'corners'}"


def build(centred: bool) -> PrimFunc:
    """The kernel.

    Args:
        centred: whether boxes are given as (x, y, width, height) of their centres, not as two corners (y, x, y, x).

    Returns:
        (boxes f32 [B,N,4], scores f32 [B,C,N], most int64 [1], overlap f32 [1], least f32 [1],
        taken int64 [B*C*N,3], count int64 [1]); rows of ``taken`` behind ``count`` are left as they are.
    """

    def body() -> None:
        batches, classes, boxes = (dim(None, n) for n in ("batches", "classes", "boxes"))
        where = argument("where", (batches, boxes, 4))
        scores = argument("scores", (batches, classes, boxes))
        most, overlap, least = (argument("most", (1,), "int64"), argument("overlap", (1,)), argument("least", (1,)))
        taken = argument("taken", (batches * classes * boxes, 3), "int64")
        count = argument("count", (1,), "int64")
        hidden = workspace((boxes,), "int8")
        put(count, i64(0), 0)
        with serial(batches * classes) as pair:
            batch, kind = bind(tirx.floordiv(pair, classes)), bind(tirx.floormod(pair, classes))
            with serial(boxes) as box:
                put(hidden, tirx.const(0, "int8"), box)
            with serial(tirx.max(tirx.min(most[i64(0)], boxes), i64(0))):
                best = _best(scores, hidden, batch, kind, boxes, least[i64(0)])

                def take(batch: Expr = batch, kind: Expr = kind, best: Expr = best) -> None:
                    row = bind(count[i64(0)])
                    for place, number in enumerate((batch, kind, best)):
                        put(taken, number, row, place)
                    put(count, row + 1, 0)
                    _hide(where, hidden, batch, best, boxes, overlap[i64(0)], centred)

                when(best >= 0, take)

    return prim_func(name(centred), body)


def _best(scores: Buffer, hidden: Buffer, batch: Expr, kind: Expr, boxes: Expr, least: Expr) -> Expr:
    """The first box of the best score that is there still, or -1."""
    found, top = local((1,), "int64"), local((1,))
    put(found, i64(-1), 0)
    put(top, least, 0)
    with serial(boxes) as box:
        score = let(scores[batch, kind, box])
        better = tirx.And(hidden[box] == 0, score > top[i64(0)])

        def note() -> None:
            put(found, i64(box), 0)
            put(top, score, 0)

        when(better, note)
    return bind(found[i64(0)])


def _hide(
    where: Buffer, hidden: Buffer, batch: Expr, best: Expr, boxes: Expr, overlap: Expr, centred: bool
) -> None:  # fmt: skip
    """Hide a box, and all that lie over it."""
    one = _corners(where, batch, best, centred)
    put(hidden, tirx.const(1, "int8"), best)
    with serial(boxes) as box:
        other = _corners(where, batch, box, centred)
        sides = [let(tirx.min(one[k + 2], other[k + 2]) - tirx.max(one[k], other[k])) for k in range(2)]
        areas = [let((box_[2] - box_[0]) * (box_[3] - box_[1])) for box_ in (one, other)]
        common = let(sides[0] * sides[1])
        union = let(areas[0] + areas[1] - common)
        positive = [value > 0.0 for value in (*sides, *areas, union)]
        over = reduce(tirx.And, positive, common / union > overlap)
        when(over, lambda box=box: put(hidden, tirx.const(1, "int8"), box))  # type: ignore[misc]


def _corners(where: Buffer, batch: Expr, box: Expr, centred: bool) -> list[Expr]:
    """The least y and x of a box, and the largest."""
    a, b, c, d = (let(where[batch, box, i64(place)]) for place in range(4))
    if centred:
        return [let(value) for value in (b - d / 2.0, a - c / 2.0, b + d / 2.0, a + c / 2.0)]
    return [let(value) for value in (tirx.min(a, c), tirx.min(b, d), tirx.max(a, c), tirx.max(b, d))]
