"""``xopt::MergeTokensMCTF``: N tokens in, N - r out, merged where they are alike, uninformative and small.

    MergeTokensMCTF(x [B, N, D], importance [B, N, 1], size [B, N, 1]) -> x' [B, N - r, D], size' [B, N - r, 1]

As ``xopt::MergeTokens``, with two differences. Edges go both ways, r // 2 from A to B, then the others from B to what
is left of A, by the attraction

    ((cos(x_a, x_b) + 1) / 2)^(1/tau_sim) * (u_a u_b)^(1/tau_info) * (v_a v_b)^(1/tau_size)

with u and v the inverses of importance and size over their maximum; averages are weighted by importance * size.
Protected tokens are never given away, but may take others in. r is at least 2; a tau of infinity leaves its factor
out.

Source  MCTF (Lee et al., CVPR 2024).
"""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir.ops.matching import (
    END,
    Op,
    best_edges,
    build,
    columns,
    contains,
    count,
    edges,
    even,
    halves,
    ints,
    is_protected,
    number,
    odd,
    one_over,
    pool,
    protected_tokens,
    survivors,
    take,
    unit,
)

_TINY = 1e-12
"""Smallest importance: keeps its inverse finite."""


def function() -> ir.Function:
    """Body of ``xopt::MergeTokensMCTF``."""
    taus = {"tau_sim": 1.0, "tau_info": 20.0, "tau_size": 40.0}
    return build("MergeTokensMCTF", _body, ("x", "importance", "size"), {"r": [2], "protected": 0, **taus})


def _body(op: Op, x: ir.Value, importance: ir.Value, size: ir.Value) -> tuple[ir.Value, ir.Value]:
    r, protected = edges(op), protected_tokens(op)
    importance = op.Max(importance, number(op, _TINY))
    attraction = _attraction(op, x, importance, size)
    fixed_a, fixed_b = halves(op, is_protected(op, x, protected))
    forward = op.Div(r, ints(op, 2))
    first, to_b = best_edges(op, op.Where(fixed_a, number(op, -1.0), attraction), forward)
    a_is_left = op.Unsqueeze(op.Not(contains(op, first, count(op, fixed_a))), ints(op, 2))
    allowed = op.And(a_is_left, op.Not(op.Transpose(fixed_b, perm=[0, 2, 1])))
    reverse = op.Transpose(op.Where(allowed, attraction, number(op, -1.0)), perm=[0, 2, 1])
    second, to_a = best_edges(op, reverse, op.Sub(r, forward))

    first, second = even(op, first), odd(op, second)
    weight = op.Mul(importance, size)
    sums = op.Concat(op.Mul(x, weight), weight, size, axis=-1)
    sums = pool(op, sums, first, odd(op, to_b))
    sums = pool(op, sums, second, even(op, to_a))
    kept = take(op, sums, survivors(op, size, op.Concat(first, second, axis=1), protected, r))
    return op.Div(columns(op, kept, 0, -2), columns(op, kept, -2, -1)), columns(op, kept, -1, END)


def _attraction(op: Op, x: ir.Value, importance: ir.Value, size: ir.Value) -> ir.Value:
    """[B, A, B'] of MCTF's equation; the factors of one token are multiplied into it first."""
    a, b = halves(op, unit(op, x))
    cosine = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))
    closeness = op.Max(op.Mul(op.Add(cosine, number(op, 1.0)), number(op, 0.5)), number(op, 0.0))
    factors = []
    for quantity, tau in ((importance, "tau_info"), (size, "tau_size")):
        inverse = op.Reciprocal(quantity)
        relative = op.Div(inverse, op.ReduceMax(inverse, ints(op, 1), keepdims=1))
        factors.append(op.Pow(relative, one_over(op, tau)))
    factor_a, factor_b = halves(op, op.Mul(*factors))
    pair = op.Mul(factor_a, op.Transpose(factor_b, perm=[0, 2, 1]))
    return op.Mul(op.Pow(closeness, one_over(op, "tau_sim")), pair)
