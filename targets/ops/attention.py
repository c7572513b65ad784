"""Attention as its ONNX definition in Relax operators: for targets and forms without a fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tvm import relax, tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

MASKED = float(np.finfo(np.float32).min)
"""Score of a key that a boolean mask hides; far enough below every other that its weight is 0."""


def _attention(call: Call) -> Value:
    if len(call.node.outputs) > 1 and any(output.uses() for output in call.node.outputs[1:]):
        raise call.unsupported("only its first output can be compiled")
    if call.has(4) or call.has(5) or call.has(6):
        raise call.unsupported("past keys and values are not compiled")
    q, k, v = (_heads(call, index) for index in range(3))
    out = _composed(call, q, k, v)
    shape = call.lowering.shape_of(out)
    if len(call.shape(0)) == 4:
        return out
    merged = call.emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
    return call.lowering.reshape(merged, [shape[0], shape[2], call.dims.product([shape[1], shape[3]])])


def _heads(call: Call, index: int) -> relax.Expr:
    """Input ``index`` as [B, H, S, d]."""
    shape = call.shape(index)
    if len(shape) == 4:
        return call.x(index)
    heads = int(call.attr("q_num_heads" if index == 0 else "kv_num_heads"))
    split = call.lowering.reshape(call.x(index), [shape[0], shape[1], heads, call.dims.quotient([shape[2]], [heads])])
    return call.emit(relax.op.permute_dims(split, [0, 2, 1, 3]))


def _composed(call: Call, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> relax.Expr:
    """softmax(q kT scale + mask) v on [B, H, S, d]; grouped queries read their key head repeated."""
    op, lowering = relax.op, call.lowering
    batch, heads, length, size = lowering.shape_of(q)
    kv_heads, keys = lowering.shape_of(k)[1:3]
    repeats = int(heads) // int(kv_heads)
    if repeats > 1:
        k, v = (_repeated(call, x, repeats) for x in (k, v))
    scale = float(call.attr("scale", float(size) ** -0.5))
    transposed = op.permute_dims(k, [0, 1, 3, 2])
    scores = call.emit(op.multiply(op.matmul(q, transposed), relax.const(scale, str(q.ty.dtype))))
    cap = float(call.attr("softcap", 0.0))
    if cap:
        scores = op.multiply(op.tanh(op.divide(scores, relax.const(cap, "float32"))), relax.const(cap, "float32"))
        scores = call.emit(scores)
    visible = _visible(call, [batch, heads, length, keys])
    if call.has(3) and str(call.x(3).ty.dtype) != "bool":
        scores = call.emit(op.add(*call.aligned(scores, call.x(3))))
    if visible is not None:
        scores = call.emit(op.where(*call.aligned(visible, scores), relax.const(MASKED, "float32")))
    weights = call.emit(op.nn.softmax(scores, 3))
    if visible is not None and call.has(3) and str(call.x(3).ty.dtype) == "bool":
        # A row with nothing to attend to gives zeros, not the mean of the values.
        weights = call.emit(op.where(*call.aligned(visible, weights), relax.const(0.0, "float32")))
    return call.emit(op.matmul(weights, v))


def _repeated(call: Call, x: relax.Expr, repeats: int) -> relax.Expr:
    batch, heads, length, size = call.lowering.shape_of(x)
    return call.lowering.compute(
        "repeat_heads",
        [batch, int(heads) * repeats, length, size],
        lambda data, b, h, s, d: data(b, tirx.floordiv(h, repeats), s, d),
        x,
    )


def _visible(call: Call, shape: list[Dim]) -> relax.Expr | None:
    """The boolean mask and the causal one together; None when every key is visible."""
    mask = call.x(3) if call.has(3) and str(call.x(3).ty.dtype) == "bool" else None
    if not call.attr("is_causal", 0):
        return mask
    causal = call.lowering.compute("causal", [1, 1, *shape[2:]], lambda _a, _b, i, j: j <= i)
    return causal if mask is None else call.emit(relax.op.logical_and(*call.aligned(mask, causal)))


OPS: dict[str, Emitter] = {"Attention": _attention}
"""Emitters by operator type."""
