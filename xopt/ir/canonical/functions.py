"""Inline model-local functions, and give every value and node a name of its own.

    before   y = pkg::Layer(x)          after   y = Add(MatMul(x, w), b)
Calls of xopt's own ops stay: passes and kernels know them by name, when the body is the one that xopt gives them.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, NameFixPass, RemoveUnusedFunctionsPass

from xopt.errors import InputError
from xopt.ir.canonical.foreign import counted_names
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.io import check_nodes
from xopt.ir.ops.meaning import is_own


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Inline every function but xopt's own."""
    if model.functions:
        _inline(model, report)
    NameFixPass()(model)
    for node in model.graph.all_nodes():
        node.domain = "" if node.domain == "ai.onnx" else node.domain


def _inline(model: ir.Model, report: CanonicalizeReport) -> None:
    inline = InlinePass(criteria=lambda body: not is_own(body))
    try:
        with counted_names():
            result = inline(model)
    except Exception as error:
        raise InputError(
            "E-FORMAT", f"local functions cannot be inlined: {error}", cure="export the model without them"
        ) from error
    report.rewrote("inline-function", sum(getattr(result, "id_count", {}).values()))
    check_nodes(
        model
    )  # bodies now have the attributes of their calls, of whatever type, and ops of no meaning may come to light
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
