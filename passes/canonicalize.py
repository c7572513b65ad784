"""Canonicalize: rewrite exporters' dialects into the few ops that all other passes rely on.

    before   MatMul, Mul(scale), Add(mask), Softmax, MatMul, Erf, ReduceMean, Pow, Sqrt, ...
    after    Attention, LayerNormalization, RMSNormalization, RotaryEmbedding, Gelu, Swish, MatMul + Add

Refuses  with the reasons of :func:`xopt.ir.canonicalize`; what is refused stays as it is and still runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

import xopt.ir
from xopt.pipeline.base import Effect, Pass, PassReport, Refusal
from xopt.pipeline.context import PassContext


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring the graph into canonical form; idempotent."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        found = xopt.ir.canonicalize(model)
        report.rewrote(count=sum(found.counts.values()))
        report.refused = [Refusal(f"{refused.what} {refused.node}", refused.reason) for refused in found.refused]
        report.matched = report.rewritten + len(report.refused)
        report.numbers = {**found.counts, "attention-sites": len(found.attention)}
        return report
