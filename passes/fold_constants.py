"""Fold constants: compute now what does not depend on the inputs, shape arithmetic over fixed dimensions included.

    before   Reshape(x, Concat(Gather(Shape(x), 0), [12, 64]))        after   Reshape(x, [8, 12, 64])
             (x is [8, 768])

A node whose result could be large is left alone (see :mod:`xopt.ir.canonical.constants` for the limits), so a small
file cannot ask for a large computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from xopt.ir.canonical import constants
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace constant expressions by initializers."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        found = CanonicalizeReport()
        constants.rewrite(model, found)
        report.matched = sum(found.counts.values())
        report.rewrote(count=report.matched)
        return report
