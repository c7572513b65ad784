"""Constants become initializers, and what only constants decide is computed now.

    before   c = Constant(); y = Reshape(x, Concat(Gather(Shape(x), 0), c))      after   y = Reshape(x, [0, 12, 64])
Folding is onnxscript's, bounded: a node whose result could be large (or is unknown) is not evaluated, whatever the file
claims, so a hostile ``ConstantOfShape`` costs nothing.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
)

from xopt.errors import InputError
from xopt.ir.canonical.foreign import no_origins
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.shapes import infer_shapes
from xopt.ir.untrusted import NATIVE_MEMORY, bounded_memory

LARGEST_INPUT = 1 << 12
"""Elements of an operand beyond which a node is not folded (weights are no business of this step)."""
LARGEST_OUTPUT = 1 << 22
"""Elements of a result beyond which a node is not folded: a causal mask over 2048 tokens still is."""
GROWING = ("ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "EyeLike", "Pad")
"""Ops whose small operands can ask for a result of any size."""
_COSTLY_NAMES = """
    Conv ConvTranspose ConvInteger QLinearConv DeformConv Einsum Loop Scan If SequenceMap RNN GRU LSTM Attention
    MaxPool AveragePool LpPool MaxUnpool RoiAlign MaxRoiPool GridSample Resize Upsample AffineGrid Col2Im ImageDecoder
    CenterCropPad DFT STFT MelWeightMatrix HannWindow HammingWindow BlackmanWindow NonMaxSuppression Det LRN
    TfIdfVectorizer StringNormalizer RegexFullMatch StringSplit StringConcat SplitToSequence
"""
COSTLY = frozenset(_COSTLY_NAMES.split())
"""Ops that can work much longer than it takes to read their operands and write their result; none computes shapes."""


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Lift constants to initializers of the main graph and fold constant expressions."""
    before = sum(1 for _ in model.graph.all_nodes())
    try:
        for step in (
            RemoveInitializersFromInputsPass(),
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            LiftSubgraphInitializersToMainGraphPass(),
        ):
            step(model)
    except (ir.passes.PassError, TypeError, ValueError) as error:
        raise InputError(
            "E-FORMAT", "a constant cannot be read", where=str(error.__cause__ or error), cure="export the model again"
        ) from error
    infer_shapes(model)
    _name_types(model)
    _fold(model)
    report.rewrote("fold-constant", max(0, before - sum(1 for _ in model.graph.all_nodes())))


def _name_types(model: ir.Model) -> None:
    """Casts to the type of a value are casts to a type; the folder would forget how they round."""
    for node in model.graph.all_nodes():
        like = node.inputs[1] if node.op_type == "CastLike" and not node.domain else None
        if like is not None and like.dtype is not None:
            node.op_type = "Cast"
            node.attributes["to"] = ir.AttrInt64("to", like.dtype.value)
            node.resize_inputs(1)


def _fold(model: ir.Model) -> None:
    from onnxscript.optimizer import fold_constants

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    functions = dict(model.functions)
    model.functions.clear()  # bodies of xopt ops stay as their authors wrote them
    try:
        # A number that has no value in its new type is left to run time: what numpy makes of it is its own affair.
        with bounded_memory(), no_origins(), np.errstate(invalid="raise"):
            fold_constants(
                model,
                onnx_shape_inference=True,
                input_size_limit=LARGEST_INPUT,
                output_size_limit=LARGEST_OUTPUT,
                should_fold=_may_fold,
            )
    except Exception as error:
        raise _uncomputable(error) from error
    finally:
        model.functions.update(functions)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _uncomputable(error: Exception) -> InputError:
    cause = error.__cause__ or error
    if isinstance(cause, MemoryError) or "bad_alloc" in str(cause):
        what = f"its constant expressions come to more than {NATIVE_MEMORY >> 30} GiB"
    else:
        what = f"a constant expression cannot be computed: {cause}"
    return InputError("E-FORMAT", what, cure="check how the model was exported")


def _may_fold(node: ir.Node) -> bool | None:
    """None leaves the decision to the folder's own limits; False forbids it, True demands it."""
    if node.op_type == "DequantizeLinear":
        return _is_vector(node)
    if node.op_type == "QuantizeLinear":
        return True
    if node.op_type in COSTLY:
        return False
    if node.op_type not in GROWING:
        return None
    shape = node.outputs[0].shape
    if shape is None or not shape.is_static():
        return False
    return math.prod(shape.numpy()) <= LARGEST_OUTPUT


def _is_vector(node: ir.Node) -> bool:
    """Whether a constant is a quantized bias: it becomes floating, while weights stay in 8 bits."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return shape is not None and len(shape) < 2
