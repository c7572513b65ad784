"""Bring ai.onnx to opset 24 (newer ones stay what they are: they only added types and operators).

From opset 18 on onnxscript converts; what is older is brought there first.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.canonical.upgrade import OPSET, upgrade
from xopt.ir.contrib import adopt
from xopt.ir.shapes import infer_shapes
from xopt.ir.untrusted import check_opset

CANONICAL = 24
PER_CHANNEL = 21
"""Opset from which on GroupNormalization scales channels, not groups."""
IR_VERSION = 10
"""Version of the file format that knows functions and all common element types, ..."""
NEWEST_IR = 13
"""... and the one that knows all which are supported: what later ones added, no canonical model has."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Convert ``model`` to the canonical opset when it is older."""
    adopt(model)
    version = model.opset_imports.pop("ai.onnx", None) or model.opset_imports.get("", 0)
    model.opset_imports[""] = version
    check_opset(version)
    if version < CANONICAL:
        _convert(model)
        report.rewrote("convert-opset")
    model.ir_version = min(max(model.ir_version, IR_VERSION), NEWEST_IR)
    for node in model.graph.all_nodes():
        node.version = None


def _convert(model: ir.Model) -> None:
    from onnxscript import version_converter

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    was = model.opset_imports[""]
    if was < OPSET:
        upgrade(model, was)
    if was < PER_CHANNEL and any(node.op_type == "GroupNormalization" for node in model.graph.all_nodes()):
        infer_shapes(model, names=False)
        _check_groups(model)
    try:
        version_converter.convert_version(model, CANONICAL)
    except Exception as error:
        raise InputError(
            "E-UNSUPPORTED-OP",
            f"opset {was} cannot be converted to {CANONICAL}: {error}",
            cure="export the model with a newer opset",
        ) from error


def _check_groups(model: ir.Model) -> None:
    """The converter leaves a GroupNormalization that it cannot convert as it is, and it then means another thing."""
    for node in model.graph.all_nodes():
        shape = node.inputs[0].shape if node.op_type == "GroupNormalization" and node.inputs[0] is not None else None
        if node.op_type == "GroupNormalization" and (shape is None or not isinstance(shape[1], int)):
            what = "the number of channels of a GroupNormalization is not known"
            cure = "export the model with opset 21 or newer"
            raise InputError("E-UNSUPPORTED-OP", what, where=f"node {node.name!r}", cure=cure)
