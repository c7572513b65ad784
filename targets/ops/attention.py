"""Attention as its ONNX definition in Relax operators: for targets and forms without a fused kernel.

Narrow floats are stored after each step as ONNX's function body stores them, and computed with in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

op = relax.op
RAW, CAPPED, BIASED, WEIGHTS = range(4)
"""What the fourth output holds, by ``qk_matmul_output_mode``."""


def _attention(call: Call) -> list[Value]:
    """Output, present keys and values, and the scores in the stage asked for; the latter only where they are read."""
    if call.has(4) != call.has(5) or (call.has(4) and call.has(6)):
        raise call.unsupported("past keys, past values and nonpad_kv_seqlen do not go together")
    q, k, v = (_heads(call, index) for index in range(3))
    if call.has(4):
        k, v = (_joined(call, index, new) for index, new in ((4, k), (5, v)))
    y, scores = _Composed(call, q, k, v).outputs()
    if len(call.shape(0)) == 3:
        batch, heads, length, size = call.lowering.shape_of(y)
        merged = call.emit(op.permute_dims(y, [0, 2, 1, 3]))
        y = call.lowering.reshape(merged, [batch, length, call.dims.product([heads, size])])
    return [y, k, v, *([] if scores is None else [scores])]


def _heads(call: Call, index: int) -> relax.Expr:
    """Input ``index`` as [B, H, S, d]."""
    shape, name = call.shape(index), "q_num_heads" if index == 0 else "kv_num_heads"
    heads = int(call.attr(name, 0))
    if len(shape) == 4:
        return call.x(index)
    if len(shape) != 3 or heads < 1:
        raise call.unsupported(f"input {index} has rank {len(shape)} and {heads} heads")
    call.require(call.dims.same(shape[2] % heads, 0), f"input {index} is not {heads} heads")
    split = call.lowering.reshape(call.x(index), [shape[0], shape[1], heads, call.dims.quotient([shape[2]], [heads])])
    return call.emit(op.permute_dims(split, [0, 2, 1, 3]))


def _joined(call: Call, index: int, new: relax.Expr) -> relax.Expr:
    """Past keys or values with the new ones behind."""
    shape = call.lowering.shape_of(new)
    past = call.lowering.recast(call.x(index), [*shape[:2], call.shape(index)[2], shape[3]])
    return call.emit(op.concat([past, new], 2))


@dataclass
class _Composed:
    """softmax(q kT scale + mask) v on [B, H, S, d]; grouped queries read their key head repeated."""

    call: Call
    q: relax.Expr
    k: relax.Expr
    v: relax.Expr

    def __post_init__(self) -> None:
        lowering = self.call.lowering
        self.dtype = str(self.q.ty.dtype)
        self.batch, self.heads, self.length, self.size = lowering.shape_of(self.q)
        self.keys = lowering.shape_of(self.k)[2]

    def outputs(self) -> tuple[relax.Expr, relax.Expr | None]:
        """The mixed values, and the scores where somebody reads them."""
        call, mode = self.call, int(self.call.attr("qk_matmul_output_mode", RAW))
        if mode not in (RAW, CAPPED, BIASED, WEIGHTS):
            raise call.unsupported(f"there is no qk_matmul_output_mode {mode}")
        k, v = self._grouped(self.k), self._grouped(self.v)
        stages = [self._product(k)]
        cap = float(call.attr("softcap", 0.0))
        stages.append(self._capped(stages[RAW], cap) if cap > 0 else stages[RAW])
        biased, hides = self._biased(stages[CAPPED])
        stages += [biased, self._weights(biased, hides)]
        y = self._stored(op.matmul(stages[WEIGHTS], self._stored(v)))
        outputs = call.node.outputs
        shown = len(outputs) > 3 and (outputs[3].uses() or outputs[3].is_graph_output())
        return y, stages[mode] if shown else None

    def _stored(self, x: relax.Expr) -> relax.Expr:
        """An operand or a step's result, in the type of the queries."""
        x = x if isinstance(x, relax.Var) else self.call.emit(x)
        return self.call.emit(op.astype(x, self.dtype)) if str(x.ty.dtype) != self.dtype else x

    def _grouped(self, x: relax.Expr) -> relax.Expr:
        """Keys or values [B, H, T, d], each head repeated for the query heads that share it."""
        batch, shared, keys, size = self.call.lowering.shape_of(x)
        if self.call.dims.equal(shared, self.heads):
            return x
        if not isinstance(shared, int) or not isinstance(self.heads, int) or self.heads % shared:
            raise self.call.unsupported(f"{self.heads} query heads do not share {shared} key heads")
        repeats = self.heads // shared

        def element(data: Any, b: Any, h: Any, s: Any, d: Any) -> Any:
            return data(b, tirx.floordiv(h, repeats), s, d)

        return self.call.lowering.compute("repeat_heads", [batch, self.heads, keys, size], element, x)

    def _product(self, k: relax.Expr) -> relax.Expr:
        """Q kT, scaled."""
        call = self.call
        default = None if "scale" in call.node.attributes else float(self.size) ** -0.5
        scale = float(call.attr("scale", default))
        lead = call.lowering.shape_of(self.q)[:2]
        k = call.lowering.recast(k, [*lead, self.keys, self.size])
        turned = call.emit(op.permute_dims(self._stored(k), [0, 1, 3, 2]))
        return self._stored(op.multiply(op.matmul(self.q, turned), relax.const(scale, self.dtype)))

    def _capped(self, scores: relax.Expr, cap: float) -> relax.Expr:
        number = relax.const(cap, self.dtype)
        return self._stored(op.multiply(op.tanh(op.divide(scores, number)), number))

    def _biased(self, scores: relax.Expr) -> tuple[relax.Expr, bool]:
        """The scores with -inf for keys that are hidden, and whether a row may have no other."""
        call = self.call
        mask, visible = self._mask(), self._visible()
        if mask is not None and str(mask.ty.dtype) == "bool":
            shown = mask
        elif mask is not None:
            scores = self._stored(op.add(*call.aligned(scores, self._stored(mask))))
            shown = call.emit(op.not_equal(mask, relax.const(-np.inf, str(mask.ty.dtype))))
        if mask is not None:
            visible = shown if visible is None else call.emit(op.logical_and(*call.aligned(shown, visible)))
        if visible is None:
            return scores, False
        lowest = relax.const(-np.inf, self.dtype)
        return call.emit(op.where(*call.aligned(visible, scores), lowest)), True

    def _weights(self, scores: relax.Expr, hides: bool) -> relax.Expr:
        """The softmax over the keys; a row that sees none has weights of 0."""
        call, kind = self.call, self._precision()
        scores = call.emit(op.astype(scores, kind)) if str(scores.ty.dtype) != kind else scores
        weights = call.emit(op.nn.softmax(scores, 3))
        if hides:
            shown = call.emit(op.astype(op.not_equal(scores, relax.const(-np.inf, kind)), "int8"))
            sees = call.emit(op.astype(op.max(shown, 3, True), "bool"))
            weights = call.emit(op.where(*call.aligned(sees, weights), relax.const(0.0, kind)))
        return self._stored(weights)

    def _precision(self) -> str:
        """The type in which the softmax is computed: at least as wide as the model asks for."""
        wanted = int(self.call.attr("softmax_precision", 0))
        if wanted not in (0, *(kind.value for kind in (ir.DataType.FLOAT, *HALVES, ir.DataType.DOUBLE))):
            raise self.call.unsupported(f"a softmax in type {wanted}")
        return "float64" if wanted == ir.DataType.DOUBLE else self.dtype

    def _mask(self) -> relax.Expr | None:
        """The mask, as long as the keys: those beyond its end are hidden."""
        call = self.call
        if not call.has(3):
            return None
        mask, shape = call.x(3), call.shape(3)
        if not 1 <= len(shape) <= 4:
            raise call.unsupported(f"its mask has rank {len(shape)}")
        kind, known = str(mask.ty.dtype), shape[-1]
        if kind not in ("bool", self.dtype):
            raise call.unsupported(f"a mask of {kind}")
        if call.dims.equal(known, self.keys):
            return mask
        call.require(known <= self.keys, "its mask is longer than its keys")
        hidden = tirx.const(False if kind == "bool" else -np.inf, kind)

        def element(data: Any, *index: Any) -> Any:
            return tirx.if_then_else(index[-1] < known, data(*index), hidden)

        return call.lowering.compute("mask_to_keys", [*shape[:-1], self.keys], element, mask)

    def _visible(self) -> relax.Expr | None:
        """Which keys [B or 1, 1, S, T] a query sees by its position: causal, in its window, no padding."""
        call, causal = self.call, bool(self.call.attr("is_causal", 0))
        left, right = (int(call.attr(f"{side}_window_size", -1)) for side in ("left", "right"))
        if min(left, right) < -1:
            raise call.unsupported("a window of negative size")
        right = 0 if causal else right
        padded = [call.lowering.recast(call.x(6), [self.batch])] if call.has(6) else []
        if not padded and left < 0 and right < 0:
            return None
        past: Dim = call.shape(4)[2] if call.has(4) else 0

        def element(*args: Any) -> Any:
            b, _, i, j = args[len(padded) :]
            filled = args[0](b).astype("int64") if padded else None
            at = i + (past if filled is None else filled - self.length)
            seen = [] if filled is None else [j < filled]
            seen += ([at - j <= left] if left >= 0 else []) + ([j - at <= right] if right >= 0 else [])
            return tirx.all(*seen)

        shape = [self.batch if padded else 1, 1, self.length, self.keys]
        return call.lowering.compute("visible_keys", shape, element, *padded)


HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


OPS: dict[str, Emitter] = {"Attention": _attention}
"""Emitters by operator type."""
