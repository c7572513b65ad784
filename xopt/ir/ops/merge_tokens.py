"""``xopt::MergeTokens``: N tokens in, N - r out, the most alike averaged.

    MergeTokens(x [B, N, D], metric [B, N, m], size [B, N, 1]) -> x' [B, N - r, D], size' [B, N - r, 1]

Tokens at even positions are set A, those at odd positions set B. Each token of A has an edge to the token of B with
the largest cosine of ``metric``; along the r best edges the token of A is averaged into that of B, weighted by
``size``, the number of original tokens that each stands for. Of what is left, A comes before B, each in the old order;
the ``protected`` first tokens stay in front, take nothing in and are never given away. Ties go to the lower position.
All tensors are float32. Attribute ``r`` is a list of one integer, which shape inference can follow into the body.

Source  ToMe (Bolya et al., ICLR 2023).
"""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir.ops.matching import (
    END,
    Op,
    best_edges,
    build,
    columns,
    edges,
    even,
    halves,
    is_protected,
    number,
    odd,
    pool,
    protected_tokens,
    survivors,
    take,
    unit,
)


def function() -> ir.Function:
    """Body of ``xopt::MergeTokens``."""
    return build("MergeTokens", _body, ("x", "metric", "size"), {"r": [1], "protected": 0})


def _body(op: Op, x: ir.Value, metric: ir.Value, size: ir.Value) -> tuple[ir.Value, ir.Value]:
    r, protected = edges(op), protected_tokens(op)
    a, b = halves(op, unit(op, metric))
    scores = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))
    fixed_a, fixed_b = halves(op, is_protected(op, x, protected))
    fixed = op.Or(fixed_a, op.Transpose(fixed_b, perm=[0, 2, 1]))
    source, target = best_edges(op, op.Where(fixed, number(op, -2.0), scores), r)
    source, target = even(op, source), odd(op, target)
    sums = pool(op, op.Concat(op.Mul(x, size), size, axis=-1), source, target)
    kept = take(op, sums, survivors(op, size, source, protected, r))
    merged_size = columns(op, kept, -1, END)
    return op.Div(columns(op, kept, 0, -1), merged_size), merged_size
