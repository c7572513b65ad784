"""What a node carries beyond what its operator requires, and which of it the rewrites of this package read.

ONNX gives operators new attributes, optional inputs and outputs from opset to opset. A rule that looks at the operator
alone would take a node that has one for a node that has none. So rules ask for the operator by :func:`op_of` (or what
is made of it: `edit.is_op`, `edit.producer`, `edit.sweep`), which knows no node that carries anything outside
:data:`READ`: to rules it is an operator that they have never heard of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir

STANDARD = ("", "ai.onnx", "ai.onnx.preview")
"""The domains of ONNX's operators on tensors."""
READ: dict[str, str] = {
    "ArgMax": "axis keepdims select_last_index", "ArgMin": "axis keepdims select_last_index",
    "Attention": "attn_mask q_num_heads kv_num_heads scale is_causal softcap qk_matmul_output_mode",
    "AveragePool": "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides",
    "BatchNormalization": "epsilon momentum", "BitShift": "direction", "Cast": "to", "CastLike": "", "Celu": "alpha",
    "Clip": "min max", "Concat": "axis",
    "Constant": "value value_float value_floats value_int value_ints value_string value_strings",
    "ConstantOfShape": "value", "Conv": "B auto_pad dilations group kernel_shape pads strides",
    "CumSum": "exclusive reverse", "DequantizeLinear": "x_zero_point axis",
    "Dropout": "ratio training_mode seed", "DynamicQuantizeLinear": "y_scale y_zero_point",
    "Einsum": "equation", "Elu": "alpha", "EyeLike": "dtype k",
    "Flatten": "axis", "Gather": "axis", "GatherElements": "axis", "GatherND": "batch_dims", "Gelu": "approximate",
    "Gemm": "C alpha beta transA transB", "GridSample": "align_corners mode padding_mode",
    "GroupNormalization": "epsilon num_groups", "HardSigmoid": "alpha beta",
    "Hardmax": "axis", "IsInf": "detect_negative detect_positive", "InstanceNormalization": "epsilon",
    "LayerNormalization": "B axis epsilon",
    "LeakyRelu": "alpha", "LogSoftmax": "axis", "LpNormalization": "axis p",
    "MatMulInteger": "a_zero_point b_zero_point",
    "MaxPool": "auto_pad ceil_mode dilations kernel_shape pads storage_order strides", "Mod": "fmod",
    "OneHot": "axis", "Pad": "constant_value axes mode",
    "QLinearConv": "B auto_pad dilations group kernel_shape pads strides", "QLinearMatMul": "",
    "QuantizeLinear": "y_zero_point axis",
    "RMSNormalization": "axis epsilon", "Range": "",
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
                    "axes keepdims noop_with_empty_axes"),
    "Reshape": "allowzero",
    "Resize": "scales sizes antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside "
    "extrapolation_value keep_aspect_ratio_policy mode nearest_mode",
     "RotaryEmbedding": "position_ids interleaved num_heads rotary_embedding_dim",
    "ScatterElements": "axis reduction", "ScatterND": "reduction", "Selu": "alpha gamma", "Shape": "start end",
    "Slice": "axes steps", "Softmax": "axis", "Split": "split axis num_outputs", "Squeeze": "axes", "Swish": "alpha",
    "ThresholdedRelu": "alpha", "TopK": "Indices axis largest sorted", "Transpose": "perm", "Trilu": "k upper",
}  # fmt: skip
"""By operator, what rules read of the attributes and the optional inputs and outputs that ONNX gives it, or may pass
over: whatever it is, what they conclude stays right."""

MEANS_NOTHING: dict[tuple[str, str], tuple[Any, ...]] = {
    ("Attention", "softmax_precision"): (0, 1),
}
"""Values of other attributes that say what is done anyway: narrow floats are computed in float32."""


@dataclass(frozen=True)
class Form:
    """What an operator of ai.onnx may carry, in its newest version.

    Attributes:
        defaults: of each attribute, None where there is none.
        inputs, outputs: names of all, and of the first how many each node has to have; the last of ``inputs`` stands
            for the others too where it is variadic.
    """

    defaults: dict[str, Any]
    inputs: tuple[str, ...]
    required: int
    outputs: tuple[str, ...]


class Carried(NamedTuple):
    """One thing that a node carries: its ONNX name, and its place among the inputs or outputs (None: an attribute)."""

    name: str
    input: int | None = None
    output: int | None = None


@functools.cache
def form_of(op_type: str) -> Form | None:
    """The newest version of an operator of ai.onnx; None when there is no such operator."""
    try:
        schema = onnx.defs.get_schema(op_type)
    except onnx.defs.SchemaError:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Optional
    required = next((i for i, given in enumerate(schema.inputs) if given.option == single), len(schema.inputs))
    variadic = any(given.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for given in schema.inputs)
    several = any(given.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for given in schema.outputs)
    return Form(
        {name: _default(attribute) for name, attribute in schema.attributes.items()},
        tuple(given.name for given in schema.inputs),
        1 << 31 if variadic else required,
        () if several else tuple(given.name for given in schema.outputs),
    )


def _default(attribute: onnx.defs.OpSchema.Attribute) -> Any:
    proto = attribute.default_value
    return ir.from_proto(proto).value if proto is not None and proto.name else None


def carried(node: ir.Node, form: Form | None = None) -> Iterator[Carried]:
    """Attributes with other values than their defaults, optional inputs that are given, later outputs that are used.

    Of an operator that ONNX does not define, and whose ``form`` is not given: all attributes, inputs and later outputs.
    """
    form = form_of(node.op_type) if node.domain in ("", "ai.onnx") else form
    for name, attribute in node.attributes.items():
        default = form.defaults.get(name) if form is not None else None
        if attribute.is_ref() or default is None or not _equal(attribute, default):
            yield Carried(name)
    for place, value in enumerate(node.inputs):
        if value is not None and (form is None or place >= form.required):
            yield Carried(_named(form.inputs if form is not None else (), place, "input"), input=place)
    for place, value in enumerate(node.outputs[1:], 1):
        if (form is None or form.outputs) and (value.uses() or value.is_graph_output()):
            yield Carried(_named(form.outputs if form is not None else (), place, "output"), output=place)


def _named(names: tuple[str, ...], place: int, kind: str) -> str:
    return names[place] if place < len(names) else f"{kind} {place}"


def _equal(attribute: ir.Attr, default: Any) -> bool:
    """Whether an attribute says what is its default; of tensors that is not asked."""
    value = attribute.value
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return False
    return list(value) == list(default) if isinstance(value, (list, tuple)) else bool(value == default)


def unread(node: ir.Node) -> list[str]:
    """What a node of ai.onnx carries that rules do not read, by ONNX's names."""
    names = READ.get(node.op_type, "").split()
    return [item.name for item in carried(node) if item.name not in names and not _means_nothing(node, item)]


def _means_nothing(node: ir.Node, item: Carried) -> bool:
    harmless = MEANS_NOTHING.get((node.op_type, item.name), ())
    return item.input is None and item.output is None and node.attributes[item.name].value in harmless


def op_of(node: ir.Node | None) -> str:
    """The operator of a node of ai.onnx that carries nothing which rules do not read; else ""."""
    return node.op_type if node is not None and node.domain == "" and not unread(node) else ""
