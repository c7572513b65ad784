"""Exporters' dialects rewritten into the canonical form.

Each step is a module with ``rewrite(model, report) -> None``, in place. The order matters: a step may rely on what the
ones before it establish (constants are initializers, shapes are known, casts that do nothing are gone…).
"""

from __future__ import annotations

from importlib import import_module

import onnx_ir as ir

from xopt.ir.canonical.foreign import rare_collection
from xopt.ir.canonical.report import CanonicalizeReport, Refused
from xopt.ir.shapes import infer_shapes

__all__ = ["CanonicalizeReport", "Refused", "canonicalize"]

STEPS = (
    "functions",
    "opset",
    "contrib",
    "constants",
    "cleanup",
    "fixed",
    "dimensions",
    "constants",
    "branches",
    "cleanup",
    "integers",
    "pairs",
    "linear",
    "norm",
    "activation",
    "rotary",
    "attention",
    "cleanup",
    "linear",
    "parts",
)


def canonicalize(model: ir.Model) -> CanonicalizeReport:
    """Rewrite ``model`` in place into the canonical form; twice is the same as once.

    Raises:
        InputError: ``E-UNSUPPORTED-OP`` (an op or opset that nothing here can bring to the canonical opset),
            ``E-FORMAT`` (the graph contradicts itself).
    """
    report = CanonicalizeReport()
    with rare_collection():
        for step in STEPS:
            import_module(f"xopt.ir.canonical.{step}").rewrite(model, report)
        infer_shapes(model)
    report.attention = [node.name or "" for node in model.graph if node.op_type == "Attention" and not node.domain]
    return report
