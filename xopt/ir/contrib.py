"""Operators of onnxruntime's own domain, ``com.microsoft``: what each may carry.

onnxruntime's optimizers and quantizers write them. They are known when a model is loaded, and canonicalizing puts
standard operators in their place (`xopt.ir.canonical.contrib`). What is written here is taken from the schemas that
onnxruntime registers; a test compares the two.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir.schema import Form

DOMAIN = "com.microsoft"
_CONV = "auto_pad='NOTSET' dilations:ints? group=1 kernel_shape:ints? pads:ints? strides:ints?"
_FUSED_MATMUL = "alpha=1.0 transA=0 transB=0 transBatchA=0 transBatchB=0"
_EXPERTS = (
    "activation_alpha=1.0 activation_beta=0.0 activation_type='relu' k=1 normalize_routing_weights=0 swiglu_fusion=0"
    " swiglu_limit:float? use_sparse_mixer=0"
)

OPERATORS: dict[str, str] = {
    "Attention": "input weights bias? mask_index? past? attention_bias? past_sequence_length? -> output present?"
    " | num_heads:int mask_filter_value=-10000.0 scale=0.0 unidirectional=0 qkv_hidden_sizes:ints? do_rotary=0"
    " rotary_embedding_dim=0 past_present_share_buffer=0",
    "BiasAdd": "X bias skip -> Y",
    "BiasDropout": "data bias residual? ratio? training_mode? -> output mask? | seed:int?",
    "BiasGelu": "A B -> C",
    "BiasSoftmax": "data bias -> output | axis=1 is_inner_broadcast:int",
    "BiasSplitGelu": "X bias -> Y",
    "BranchwiseRMSNorm": "X scale? -> Y | num_branches=0 epsilon=1e-5",
    "CDist": "A B -> C | metric='sqeuclidean'",
    "CausalConvWithState": "input weight bias? past_state? -> output present_state"
    " | activation='none' channels_last=0 dilation=1 ndim=1 state_window=0",
    "ComplexMul": "A B -> C",
    "ComplexMulConj": "A B -> C",
    "CropAndResize": "X rois batch_indices crop_size -> Y | extrapolation_value=0.0 mode='bilinear'",
    "DecoderMaskedMultiHeadAttention": "query key? value? mask_index? attention_bias? past_key? past_value?"
    " past_sequence_length? beam_width? cache_indirection? bias? -> output present_key? present_value? qk?"
    " | num_heads:int mask_filter_value=-10000.0 output_qk=0 past_present_share_buffer=0 scale=0.0",
    "DequantizeLinear": "x x_scale x_zero_point? -> y | axis:int?",
    "DynamicQuantizeLSTM": "X W R B? sequence_lens? initial_h? initial_c? P? W_scale W_zero_point R_scale R_zero_point"
    " -> Y? Y_h? Y_c? | activation_alpha:floats? activation_beta:floats? activations:strs? clip:float?"
    " direction='forward' hidden_size:int? input_forget=0",
    "DynamicQuantizeMatMul": "A B b_scale b_zero_point? bias? -> Y",
    "EmbedLayerNormalization": "input_ids segment_ids? word_embedding position_embedding segment_embedding? gamma beta"
    " mask? position_ids? -> output mask_index? embedding_sum? | epsilon=1e-12 mask_index_type=0",
    "ExpandDims": "X axis -> Y",
    "FastGelu": "X bias? -> Y",
    "FusedConv": f"X W B? Z? -> Y | activation='' activation_params:floats? {_CONV}",
    "FusedGemm": "A B C? -> Y | activation='' activation_alpha:float? activation_beta:float? activation_gamma:float?"
    " alpha=1.0 beta=1.0 transA=0 transB=0",
    "FusedMatMul": f"A B -> Y | {_FUSED_MATMUL}",
    "FusedMatMulActivation": f"A B -> Y | activation:str! activation_alpha:float? activation_axis:int? "
    f"activation_beta:float? activation_gamma:float? {_FUSED_MATMUL}",
    "GatedAdd": "X Y gate -> output",
    "GatedRMSNorm": "X scale gate -> Y | activation='silu' epsilon=1e-5",
    "GatedRelativePositionBias": "query_layer query_bias rel_pos weight bias eco_a token_offset? -> output"
    " | num_heads:int",
    "GatherBlockQuantized": "data indices scales zero_points? -> output"
    " | bits=4 block_size=128 quantize_axis=1 gather_axis=0",
    "GatherND": "data indices -> output",
    "Gelu": "X -> Y",
    "GemmFastGelu": "X W bias? -> Y",
    "GemmaRotaryEmbedding": "emb q q_rot k k_rot -> output1 output2",
    "GridSample": "X Grid -> Y | align_corners=0 mode='bilinear' padding_mode='zeros'",
    "GroupNorm": "X gamma beta -> Y | activation:int channels_last=1 epsilon=1e-5 groups:int",
    "GroupQueryAttention": "query key? value? past_key? past_value? seqlens_k total_sequence_length cos_cache?"
    " sin_cache? position_ids? attention_bias? head_sink? k_scale? v_scale? q_norm_weight? k_norm_weight?"
    " -> output present_key? present_value? output_qk?"
    " | num_heads:int kv_num_heads:int scale=0.0 softcap=0.0 local_window_size=-1 do_rotary=0 rotary_interleaved=0"
    " causal=1 smooth_softmax=-1 qk_output=0 qk_norm_epsilon=1e-6 sliding_window_cache=0 kv_cache_bit_width:int?"
    " k_quant_type='NONE' v_quant_type='NONE'",
    "Irfft": "X -> Y | normalized=0 onesided=1 signal_ndim:int",
    "LayerNormalization": "X Scale B? -> Y Mean? InvStdDev? | axis=-1 epsilon=1e-5 stash_type=1",
    "LinearAttention": "query key value past_state? decay? beta? -> output present_state"
    " | chunk_size=64 kv_num_heads:int q_num_heads:int scale=0.0 state_window=0 update_rule='gated_delta'",
    "LinearAttentionGate": "a dt_bias decay_scale b? -> decay beta?",
    "MRotaryEmbedding": "input position_ids cos_cache sin_cache -> output | interleaved=0 is_packed_batching=0"
    " mrope_layout=0 mrope_section:ints! num_heads=0 rotary_embedding_dim=0 scale=1.0",
    "MatMulBnb4": "A B absmax -> Y | K:int N:int block_size:int quant_type:int training_mode=0 transB=1",
    "MatMulInteger16": "A B -> Y",
    "MatMulIntegerToFloat": "A B a_scale b_scale a_zero_point? b_zero_point? bias? -> Y",
    "MatMulNBits": "A B scales zero_points? g_idx? bias? -> Y"
    " | K:int N:int bits=4 block_size:int accuracy_level=0 weight_prepacked=0",
    "MoE": "input router_probs fc1_experts_weights fc1_experts_bias? fc2_experts_weights fc2_experts_bias?"
    f" fc3_experts_weights? fc3_experts_bias? -> output | {_EXPERTS}",
    "MulInteger": "A A_zero_point? B B_zero_point? -> C",
    "MultiHeadAttention": "query key? value? bias? key_padding_mask? attention_bias? past_key? past_value?"
    " past_sequence_length? cache_indirection? -> output present_key? present_value? qk?"
    " | num_heads:int mask_filter_value=-10000.0 scale=0.0 unidirectional=0",
    "NhwcConv": f"X W B? -> Y | {_CONV}",
    "NhwcFusedConv": f"X W B? Z? -> Y | activation='' activation_params:floats? {_CONV}",
    "NhwcMaxPool": "x -> y | auto_pad='NOTSET' ceil_mode=0 dilations:ints? kernel_shape:ints! pads:ints? strides:ints?",
    "Pad": "data pads value? -> output | mode='constant'",
    "QAttention": "input weight bias input_scale weight_scale mask_index? input_zero_point? weight_zero_point? past?"
    " -> output present? | num_heads:int mask_filter_value=-10000.0 scale=0.0 unidirectional=0 do_rotary=0"
    " past_present_share_buffer=0",
    "QEmbedLayerNormalization": "input_ids segment_ids? word_embedding_quant position_embedding_quant"
    " segment_embedding? gamma_quant beta_quant mask? word_embedding_scale position_embedding_scale"
    " segment_embedding_scale? gamma_scale beta_scale word_embedding_zero_point position_embedding_zero_point"
    " segment_embedding_zero_point? gamma_zero_point beta_zero_point -> layernorm_out mask_index_out | epsilon=1e-12",
    "QGemm": "A a_scale a_zero_point B b_scale b_zero_point C? y_scale? y_zero_point? -> Y"
    " | alpha=1.0 transA=0 transB=0",
    "QLinearAdd": "A A_scale A_zero_point? B B_scale B_zero_point? C_scale C_zero_point? -> C",
    "QLinearAveragePool": "X x_scale x_zero_point? y_scale y_zero_point? -> Y | auto_pad='NOTSET' ceil_mode=0"
    " channels_last=0 count_include_pad=0 kernel_shape:ints! pads:ints? strides:ints?",
    "QLinearConcat": "Y_scale Y_zero_point inputs* -> Y | axis:int",
    "QLinearConv": "x x_scale x_zero_point w w_scale w_zero_point y_scale y_zero_point B? -> y"
    f" | channels_last=0 {_CONV}",
    "QLinearGlobalAveragePool": "X x_scale x_zero_point y_scale y_zero_point -> Y | channels_last=0",
    "QLinearLeakyRelu": "X X_scale X_zero_point? Y_scale Y_zero_point? -> Y | alpha=0.01",
    "QLinearMul": "A A_scale A_zero_point? B B_scale B_zero_point? C_scale C_zero_point? -> C",
    "QLinearReduceMean": "data data_scale data_zero_point? reduced_scale reduced_zero_point? -> reduced"
    " | axes:ints! keepdims:int",
    "QLinearSigmoid": "X X_scale X_zero_point? Y_scale Y_zero_point? -> Y",
    "QLinearSoftmax": "X X_scale x_zero_point? y_scale y_zero_point -> Y | axis=-1 opset:int",
    "QLinearWhere": "condition X x_scale x_zero_point Y y_scale y_zero_point z_scale z_zero_point -> Z",
    "QMoE": "input router_probs fc1_experts_weights fc1_scales? fc1_experts_bias? fc2_experts_weights fc2_scales?"
    " fc2_experts_bias? fc3_experts_weights? fc3_scales? fc3_experts_bias? fc1_zero_points? fc2_zero_points?"
    " fc3_zero_points? router_weights? fc1_global_scale? fc2_global_scale? fc1_act_scale? fc2_act_scale?"
    " fc1_act_block_scale? fc2_act_block_scale? -> output | accuracy_level=0 block_size:int? expert_weight_bits=4"
    " fc1_expert_weight_bits:int? fc2_expert_weight_bits:int? fc3_expert_weight_bits:int? quant_type='int'"
    f" weights_prepacked=-1 {_EXPERTS}",
    "QuantizeLinear": "x y_scale y_zero_point? -> y | axis:int?",
    "QuickGelu": "X -> Y | alpha=1.702",
    "Range": "start limit delta? -> Y",
    "ReduceSumInteger": "data -> reduced | axes:ints! keepdims:int",
    "RelativePositionBias": "bias_table query_length key_length -> output | is_bidirectional=0 max_distance:int",
    "Rfft": "X -> Y | normalized=0 onesided=1 signal_ndim=1",
    "RotaryEmbedding": "input position_ids cos_cache sin_cache -> output"
    " | interleaved=0 is_packed_batching=0 num_heads=0 rotary_embedding_dim=0 scale=1.0",
    "ScaledSiLU": "X scale? -> Y | alpha=1.0",
    "SimplifiedLayerNormalization": "X scale -> Y inv_std_var? | axis=-1 epsilon=1e-5 stash_type=1",
    "SkipGroupNorm": "X gamma beta skip bias? -> Y S? | activation:int channels_last=1 epsilon=1e-5 groups:int",
    "SkipLayerNormalization": "input skip gamma beta? bias? -> output mean? inv_std_var? input_skip_bias_sum?"
    " | epsilon=1e-12",
    "SkipSimplifiedLayerNormalization": "input skip gamma bias? -> output mean? inv_std_var? input_skip_bias_sum?"
    " | epsilon=1e-12",
    "TorchEmbedding": "weight indices padding_idx? scale_grad_by_freq? -> Y",
    "TransposeMatMul": "A B -> Y | alpha=1.0 transA=0 transB=0",
    "Trilu": "X k? -> Y | upper=1",
    "UnfoldTensor": "input -> output | dim=-1 size:int step=1",
    "Unique": "x -> y idx counts",
}
"""By operator: inputs, outputs and attributes, each optional one marked by ``?`` (an input that repeats by ``*``).

An attribute has its default behind ``=``, or its type behind ``:``; of lists, ``!`` marks those that must be there. A
default is that of onnxruntime's kernels where the schema has none.
"""

_TYPES = {
    "int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT, "str": ir.AttributeType.STRING,
    "ints": ir.AttributeType.INTS, "floats": ir.AttributeType.FLOATS, "strs": ir.AttributeType.STRINGS,
}  # fmt: skip
_ONNX_LATER = {"LayerNormalization": 17, "SimplifiedLayerNormalization": 1 << 31}
"""Operators that onnxruntime files under ai.onnx already before the opset in which ONNX has them."""


@functools.cache
def form_of(op_type: str) -> Form | None:
    """What an operator of ``com.microsoft`` may carry; None when it is not known here."""
    if op_type not in OPERATORS:
        return None
    signature, _, attributes = OPERATORS[op_type].partition(" | ")
    inputs, outputs = (side.split() for side in signature.split(" -> "))
    optional = [place for place, name in enumerate(inputs) if name.endswith(("?", "*"))]
    return Form(
        {_attribute(text)[0]: _attribute(text)[2] for text in attributes.split()},
        tuple(name.rstrip("?*") for name in inputs),
        optional[0] if optional else len(inputs),
        tuple(name.rstrip("?") for name in outputs),
    )


def _attribute(text: str) -> tuple[str, ir.AttributeType, Any, bool]:
    """Name, type, default and whether it has to be there."""
    name, given, default = text.partition("=")
    if given:
        value = ast.literal_eval(default)
        return name, _TYPES[type(value).__name__], value, False
    name, _, kind = text.partition(":")
    required = kind.endswith("!") or (not kind.endswith("?") and kind == "int")
    return name, _TYPES[kind.rstrip("?!")], None, required


def adopt(model: ir.Model) -> None:
    """Move norms that onnxruntime wrote under ONNX's own domain, where that opset has none, to ``com.microsoft``."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx") and opset < _ONNX_LATER.get(node.op_type, 0):
            node.domain = DOMAIN
            model.opset_imports.setdefault(DOMAIN, 1)


def give_back(model: ir.Model) -> None:
    """Undo :func:`adopt`: onnxruntime knows these norms under ONNX's own domain only."""
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and node.op_type in _ONNX_LATER:
            node.domain = ""


_KINDS = {"ai.onnx.ml": "is for trees and tables", "ai.onnx.preview.training": "is for training"}
"""What the operators of ONNX's other domains are for."""


def check_node(node: ir.Node) -> None:
    """Check a node of a domain other than ONNX's: that its operator is known, and that it has what the operator needs.

    Raises:
        InputError: ``E-UNSUPPORTED-OP`` (no such operator), ``E-FORMAT`` (other inputs, outputs or attributes).
    """
    if node.domain != DOMAIN or node.op_type not in OPERATORS:
        raise InputError(
            "E-UNSUPPORTED-OP",
            f"op {node.domain}::{node.op_type} {_KINDS.get(node.domain, 'is not standard ONNX')}",
            where=f"node {node.name!r}",
            cure=_cure(node),
        )
    if wrong := _misfit(node, OPERATORS[node.op_type]):
        what, cure = f"{DOMAIN}::{node.op_type} {wrong}", "export or optimize the model again"
        raise InputError("E-FORMAT", what, where=f"node {node.name!r}", cure=cure)


def _cure(node: ir.Node) -> str:
    if node.domain == "ai.onnx.ml":
        return "export the network without the classic machine learning (trees, encoders, tables) around it"
    if node.domain in ("com.microsoft.nchwc", "com.ms.internal.nhwc"):
        return "save the optimized model with ORT_ENABLE_EXTENDED: what onnxruntime does beyond it is for one machine"
    if node.domain == DOMAIN:
        return "optimize the model without the fusion that makes this operator, or take the model as it was exported"
    return "export the model without optimizations for one runtime"


def _misfit(node: ir.Node, text: str) -> str:
    """What a node has too much or too little of; "" when it fits."""
    signature, _, attributes = text.partition(" | ")
    inputs, outputs = (side.split() for side in signature.split(" -> "))
    if len(node.inputs) > len(inputs) and not inputs[-1].endswith("*"):
        return f"has {len(node.inputs)} inputs, not {len(inputs)}"
    if len(node.outputs) > len(outputs):
        return f"has {len(node.outputs)} outputs, not {len(outputs)}"
    for place, name in enumerate(inputs):
        if not name.endswith(("?", "*")) and (place >= len(node.inputs) or node.inputs[place] is None):
            return f"lacks its input {name}"
    if any(value is None for value in node.inputs[len(inputs) :]):
        return "lacks one of its inputs"
    known = {name: (kind, required) for name, kind, _, required in map(_attribute, attributes.split())}
    for name, attribute in node.attributes.items():
        if name not in known:
            return f"has an attribute {name!r}"
        if attribute.is_ref() or attribute.type != known[name][0]:
            return f"has an attribute {name!r} of another type"
    missing = [name for name, (_, required) in known.items() if required and name not in node.attributes]
    return f"lacks its attribute {missing[0]}" if missing else ""
