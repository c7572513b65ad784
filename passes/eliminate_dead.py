"""Eliminate dead: remove what nothing reads.

    before   x ─▶ MatMul ─▶ y        after   x ─▶ MatMul ─▶ y
             └──▶ Softmax
             initializer w2

Nodes, initializers, functions and opset imports that no output depends on go; inputs and outputs of the model stay,
also those that nothing reads, because callers know them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from xopt.ir import edit
from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove nodes, weights and functions that no output depends on."""

    name: ClassVar[str] = "eliminate-dead"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        before = _sizes(model)
        edit.remove_dead(model)
        RemoveUnusedOpsetsPass()(model)
        removed = {what: count - _sizes(model)[what] for what, count in before.items()}
        report.matched = sum(count for what, count in removed.items() if what != "bytes")
        report.rewrote(count=report.matched)
        report.numbers.update(removed)
        return report


def _sizes(model: ir.Model) -> dict[str, int]:
    weights = [value.const_value for value in model.graph.initializers.values()]
    return {
        "nodes": sum(1 for _ in model.graph.all_nodes()),
        "initializers": len(weights),
        "functions": len(model.functions),
        "bytes": sum(tensor.nbytes for tensor in weights if tensor is not None),
    }
