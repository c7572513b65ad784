"""``MoE`` and ``QMoE``: each token goes to the experts that a router chooses for it, whose results are summed.

    gates = softmax(router) where among the k largest, else 0;   y = sum over e of gates[:, e] * expert_e(x)
Notation: T tokens, D width, E experts, I neurons. All experts are computed for all tokens, as products of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from xopt.ir import edit
from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.blocks import Array, stored, unpacked
from xopt.ir.canonical.contrib.site import Attributes, Site

Weight = Callable[[str], ir.Value | None]
"""A matrix [E,K,N] of experts by its name, fc1 to fc3, as real numbers."""


def _moe(site: Site) -> Results:
    gates = _gates(site, None, bool(site.attr("normalize_routing_weights")))
    return [_mixed(site, lambda name: _turned(site, site.given(f"{name}_experts_weights")), gates)]


def _turned(site: Site, weight: ir.Value | None) -> ir.Value | None:
    """[E,N,K] as [E,K,N]."""
    if weight is None:
        return None
    array = edit.constant(weight)
    if array is not None and array.ndim == 3:
        return site.array("experts", np.ascontiguousarray(array.transpose(0, 2, 1)))
    return site.op("Transpose", weight, perm=[0, 2, 1])


def _mixed(site: Site, weight: Weight, gates: ir.Value) -> ir.Value:
    """The sum of the experts' results, weighted by gates [T,E]."""
    site.only(use_sparse_mixer=0)
    x = site.value("input")
    up, down = (weight(name) for name in ("fc1", "fc2"))
    assert up is not None and down is not None
    width = site.size(x, -1)
    if site.size(up, 1) != width or site.size(down, 2) != width:
        raise site.refused("its weights are not [experts, outputs, inputs]")
    tokens = site.op("Reshape", x, site.ints(1, -1, width))
    hidden = _layer(site, tokens, up, "fc1")
    other = weight("fc3")
    hidden = _activated(site, hidden, None if other is None else _layer(site, tokens, other, "fc3"))
    results = _layer(site, hidden, down, "fc2")
    shares = site.op("Unsqueeze", site.op("Transpose", gates, perm=[1, 0]), site.ints(2))
    total = site.op("ReduceSum", site.op("Mul", results, shares), site.ints(0), keepdims=0)
    return site.op("Reshape", total, site.op("Shape", x))


def _layer(site: Site, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
    """One layer of all experts, [E,T,N]."""
    bias = site.given(f"{name}_experts_bias")
    return site.plus(site.op("MatMul", x, weight), None if bias is None else site.op("Unsqueeze", bias, site.ints(1)))


def _gates(site: Site, mixing: ir.Value | None, normalized: bool) -> ir.Value:
    """[T,E]: how much of each expert's result a token takes; 0 of those that are not chosen.

    The router weights those that it chooses, or ``mixing`` [T,E] does.
    """
    router = site.value("router_probs")
    scores = site.op("Softmax", router, axis=-1)
    chosen = int(site.attr("k"))
    if not 1 <= chosen <= site.size(router, -1):
        raise site.refused(f"k is {chosen}")
    values, places = site.several("TopK", 2, scores, site.ints(chosen), axis=-1, dtype=site.dtype(router))
    places.type = ir.TensorType(ir.DataType.INT64)
    if mixing is not None:
        values = site.op("GatherElements", mixing, places, axis=-1)
    if normalized:
        values = site.op("Div", values, site.op("ReduceSum", values, site.ints(-1), keepdims=1))
    nothing = site.op("Mul", scores, site.number(0.0, scores))
    return site.op("ScatterElements", nothing, places, values, axis=-1)


def _activated(site: Site, x: ir.Value, other: ir.Value | None) -> ir.Value:
    """Hidden neurons; gated ones by a third layer, or where they lie beside their gates."""
    kind, fusion = str(site.attr("activation_type")), int(site.attr("swiglu_fusion"))
    if kind == "swiglu":
        return _swiglu(site, *_gate_and_value(site, x, other, fusion))
    site.pass_over("activation_alpha", "activation_beta", "swiglu_limit", "swiglu_fusion")
    rules: dict[str, Callable[[], ir.Value]] = {
        "relu": lambda: site.op("Relu", x),
        "gelu": lambda: site.op("Gelu", x, approximate="tanh"),
        "silu": lambda: site.op("Swish", x),
        "identity": lambda: x,
    }
    if kind not in rules:
        raise site.refused(f"activation_type is {kind!r}")
    return rules[kind]() if other is None else site.op("Mul", rules[kind](), other)


def _gate_and_value(site: Site, x: ir.Value, other: ir.Value | None, fusion: int) -> tuple[ir.Value, ir.Value]:
    """What is activated, and what it multiplies: of two layers, or of one, neuron by neuron (1) or in halves (2)."""
    if (other is None) == (fusion == 0) or fusion not in (0, 1, 2):
        raise site.refused(f"swiglu_fusion is {fusion} {'without' if other is None else 'with'} fc3")
    if other is not None:
        return x, other
    if fusion == 2:
        gate, value = site.several("Split", 2, x, axis=-1, num_outputs=2)
        return gate, value
    pairs = site.op("Reshape", x, site.ints(0, 0, -1, 2))
    return site.op("Gather", pairs, site.index(0), axis=-1), site.op("Gather", pairs, site.index(1), axis=-1)


def _swiglu(site: Site, gate: ir.Value, value: ir.Value) -> ir.Value:
    """``gate * sigmoid(alpha * gate) * (value + beta)``, both within a limit."""
    if (limit := site.attr("swiglu_limit")) is not None:
        most, least = site.number(float(limit), gate), site.number(-float(limit), gate)
        gate, value = site.op("Clip", gate, None, most), site.op("Clip", value, least, most)
    if beta := float(site.attr("activation_beta")):
        value = site.op("Add", value, site.number(beta, value))
    return site.op("Mul", site.op("Swish", gate, alpha=float(site.attr("activation_alpha"))), value)


def _quantized(site: Site) -> Results:
    """Weights of 2, 4 or 8 bits, scaled by column or in blocks.

    Whatever it is told, onnxruntime's kernel lets the router's weights sum up to 1.
    """
    site.only(quant_type="int")
    site.pass_over("weights_prepacked", "accuracy_level", "block_size", "expert_weight_bits")
    if int(site.attr("weights_prepacked")) > 0:
        raise site.refused("its weights are laid out for one machine")
    mixing, told = site.given("router_weights"), bool(site.attr("normalize_routing_weights"))
    return [_mixed(site, lambda name: _dequantized(site, name), _gates(site, mixing, told or mixing is None))]


def _dequantized(site: Site, name: str) -> ir.Value | None:
    """A weight [E,K,N] as a DequantizeLinear of integers, in blocks of K."""
    given, scales, zeros = (site.given(f"{name}_{part}") for part in ("experts_weights", "scales", "zero_points"))
    if given is None:
        return None
    if scales is None:
        raise site.refused(f"{name} has no scales")
    own = site.attr(f"{name}_expert_weight_bits")
    bits = int(own if own is not None else site.attr("expert_weight_bits"))
    packed, scale = site.constant(given, name), site.constant(scales, f"{name}_scales")
    if bits not in (2, 4, 8) or packed.ndim != 3 or packed.dtype != np.uint8 or scale.ndim not in (2, 3):
        raise site.refused(f"{name} of {bits} bits is not [experts, outputs, bytes]")
    integers = unpacked(packed, bits)
    scale = scale.reshape(*integers.shape[:2], -1)
    size = integers.shape[2] // scale.shape[2]
    if size * scale.shape[2] != integers.shape[2]:
        raise site.refused(f"{name} has {scale.shape[2]} scales for {integers.shape[2]} inputs")
    zero = np.full(scale.shape, 1 << (bits - 1), np.uint8)
    if zeros is not None:
        zero = _zeros(site.constant(zeros, f"{name}_zero_points"), bits, scale.shape)
    by_input = [array.transpose(0, 2, 1) for array in (integers, scale, zero)]
    tensors = (stored(by_input[0], bits), np.ascontiguousarray(by_input[1]), stored(by_input[2], bits))
    operands = [site.array("experts", tensor) for tensor in tensors]
    attributes: Attributes = {"axis": 1, "block_size": size}
    shape = (len(integers), integers.shape[2], integers.shape[1])
    weight = site.op("DequantizeLinear", *operands, dtype=operands[1].dtype, shape=shape, **attributes)
    return site.cast(weight, site.dtype(site.value("input")))


def _zeros(given: Array, bits: int, shape: Any) -> Array:
    """Zero points [E,N,blocks]; those of columns are packed along N, and rows fill whole bytes."""
    numbers = unpacked(given, bits)
    kept = numbers[:, : shape[1]] if given.ndim == 2 else numbers[..., : shape[2]]
    return kept.reshape(shape)


RULES = {"MoE": _moe, "QMoE": _quantized}
