"""Exporters' dialects rewritten into the canonical form.

Each step is a module with ``rewrite(model, report) -> None``, in place. The order matters: a step may rely on what the
ones before it establish (constants are initializers, shapes are known, casts that do nothing are gone…).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import onnx_ir as ir

from xopt.ir.canonical.foreign import rare_collection
from xopt.ir.canonical.report import CanonicalizeReport, Refused
from xopt.ir.shapes import infer_shapes, symbolic_dims

__all__ = ["CanonicalizeReport", "Refused", "canonicalize", "sized"]

STEPS = (
    "functions",
    "opset",
    "contrib",
    "constants",
    "cleanup",
    "branches",
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
    "softmax",
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
        _run(STEPS, model, report)
        infer_shapes(model)
    report.attention = [node.name or "" for node in model.graph if node.op_type == "Attention" and not node.domain]
    return report


def sized(model: ir.Model) -> ir.Model:
    """The model, or a copy in which open axes of the inputs have the sizes and names that only its nodes tell: what
    data must be like.

    Raises:
        InputError: as ``canonicalize``.
    """
    if not symbolic_dims(model):
        return model
    told = model.clone()
    with rare_collection():
        _run(STEPS[: STEPS.index("fixed") + 1], told, CanonicalizeReport())
    pairs = (pair for a, b in zip(model.graph.inputs, told.graph.inputs) for pair in zip(a.shape or (), b.shape or ()))
    sizes = {old.value: new for old, new in pairs if isinstance(old, ir.SymbolicDim) and old.value and old != new}
    if not sizes:
        return model
    copy = model.clone()
    for value in (*copy.graph.inputs, *copy.graph.outputs):
        if value.shape is not None:
            dims = list(value.shape)
            value.shape = ir.Shape([sizes.get(d.value or "", d) if isinstance(d, ir.SymbolicDim) else d for d in dims])
    return copy


def _run(steps: Sequence[str], model: ir.Model, report: CanonicalizeReport) -> None:
    for step in steps:
        import_module(f"xopt.ir.canonical.{step}").rewrite(model, report)
