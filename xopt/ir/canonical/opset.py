"""Bring ai.onnx to opset 24 (25 stays 25).

Opsets 18 and up convert in onnxscript, lower ones through ONNX's own converter (without the weights, so any size).
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.untrusted import check_opset

CANONICAL = 24
IR_VERSION = 10
"""Version of the file format that knows all element types, and functions."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Convert ``model`` to the canonical opset when it is older."""
    version = model.opset_imports.pop("ai.onnx", None) or model.opset_imports.get("", 0)
    model.opset_imports[""] = version
    check_opset(version)
    if version < CANONICAL:
        _convert(model)
        report.rewrote("convert-opset")
    model.ir_version = max(model.ir_version, IR_VERSION)
    for node in model.graph.all_nodes():
        node.version = None


def _convert(model: ir.Model) -> None:
    from onnxscript import version_converter

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    was = model.opset_imports[""]
    try:
        version_converter.convert_version(model, CANONICAL, fallback=True)
    except Exception as error:
        raise InputError(
            "E-UNSUPPORTED-OP",
            f"opset {was} cannot be converted to {CANONICAL}: {error}",
            cure="export the model with a newer opset",
        ) from error
    if model.opset_imports.get("") != CANONICAL:
        raise InputError(
            "E-UNSUPPORTED-OP",
            f"opset {was} cannot be converted to {CANONICAL}",
            cure="export the model with opset 18 or newer",
        )
