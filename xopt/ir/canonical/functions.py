"""Inline model-local functions.

    before   y = pkg::Layer(x)          after   y = Add(MatMul(x, w), b)
Calls of the domain ``xopt`` stay: their bodies define xopt's own ops, and passes and kernels know them by name.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass

from xopt.errors import InputError
from xopt.ir.canonical.report import CanonicalizeReport


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Inline every function but xopt's own."""
    if not model.functions:
        return
    try:
        result = InlinePass(criteria=lambda function: function.domain != "xopt")(model)
    except Exception as error:
        raise InputError(
            "E-FORMAT", f"local functions cannot be inlined: {error}", cure="export the model without them"
        ) from error
    report.rewrote("inline-function", sum(getattr(result, "id_count", {}).values()))
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
