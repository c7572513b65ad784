"""Layers that carry a state from token to token: linear attention, causal convolutions, quantized LSTMs.

Notation: B batch, T tokens, H key heads, G query heads of each, K and V sizes of a key and a value.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.heads import head_count
from xopt.ir.canonical.contrib.site import Attributes, Site

_RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}
"""Whether the state decays, and whether it is told only what it does not hold already."""


def _linear_attention(site: Site) -> Results:
    """A matrix [B,H,K,V] that every token adds to and every query reads, as a Scan over the tokens."""
    site.only(state_window=0)
    site.pass_over("chunk_size")
    heads, queries, rule = (
        head_count(site, "kv_num_heads"), head_count(site, "q_num_heads"), str(site.attr("update_rule")),
    )  # fmt: skip
    q, k, v = (site.value(name) for name in ("query", "key", "value"))
    if rule not in _RULES or queries % heads or site.dtype(q) != ir.DataType.FLOAT:
        raise site.refused(f"{rule!r} of {queries} queries to {heads} keys, of type {site.dtype(q).name.lower()}")
    sizes = site.size(k, -1) // heads, site.size(v, -1) // heads
    scale = float(site.attr("scale")) or sizes[0] ** -0.5
    steps = {
        "q": _by_token(site, site.op("Mul", q, site.number(scale, q)), heads, queries // heads, sizes[0]),
        "k": _by_token(site, k, heads, 1, sizes[0]),
        "v": _by_token(site, v, heads, 1, sizes[1]),
    }
    for name, key, used in zip(("decay", "beta"), "gb", _RULES[rule]):
        given = site.given(name)
        if used and given is None:
            raise site.refused(f"input {name} is missing")
        if used and given is not None:
            steps[key] = _by_token(site, given, heads if name == "decay" else -1, -1 if name == "decay" else 1, 1)
    state, results = _scan(site, _body(*_RULES[rule]), _first_state(site, k, heads, sizes), list(steps.values()))
    together = site.op("Transpose", results, perm=[1, 0, 2, 3, 4])
    return [site.op("Reshape", together, site.ints(0, 0, queries * sizes[1])), state]


def _by_token(site: Site, x: ir.Value, *sizes: int) -> ir.Value:
    """[B,T,...] as [T,B] and three axes more."""
    return site.op("Transpose", site.op("Reshape", x, site.ints(0, 0, *sizes)), perm=[1, 0, 2, 3, 4])


def _first_state(site: Site, like: ir.Value, heads: int, sizes: tuple[int, int]) -> ir.Value:
    given = site.given("past_state")
    if given is not None:
        return given
    shape = site.op("Concat", site.length(like, 0), site.ints(heads, *sizes), axis=0)
    return site.op("Expand", site.number(0.0, like), shape)


def _body(decays: bool, corrects: bool) -> str:
    """One token: the state [B,H,K,V] and its q [B,H,G,K], k [B,H,1,K], v [B,H,1,V], decay and rate."""
    given = "s, q, k, v" + ", g" * decays + ", b" * corrects
    inputs = ", ".join(f"float[b0, h, {name}1, {name}2] {name}" for name in given.split(", "))
    lines = ["e = Exp(g) d = Mul(s, e)" if decays else "d = Identity(s)"]
    lines += ["m = MatMul(k, d) n = Sub(v, m) u = Mul(n, b)" if corrects else "u = Identity(v)"]
    lines += ["t = Transpose <perm: ints = [0, 1, 3, 2]> (k) a = MatMul(t, u) z = Add(d, a) y = MatMul(q, z)"]
    return f"token ({inputs}) => (float[b0, h, i, j] z, float[b0, h, o, p] y) {{ {' '.join(lines)} }}"


def _scan(site: Site, body: str, state: ir.Value, steps: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """The last state, and what the body gives for each step."""
    graph = ir.from_proto(onnx.parser.parse_graph(body))
    attributes: Attributes = {"body": graph, "num_scan_inputs": len(steps)}
    last, results = site.several("Scan", 2, state, *steps, dtype=site.dtype(state), **attributes)
    last.shape = state.shape
    return last, results


def _gate(site: Site) -> Results:
    biased = site.op("Add", site.value("a"), site.value("dt_bias"))
    decay, b = site.op("Mul", site.op("Softplus", biased), site.value("decay_scale")), site.given("b")
    return [decay] if b is None else [decay, site.op("Sigmoid", b)]


def _causal_conv(site: Site) -> Results:
    """A depthwise convolution of [B,C,T] behind what went before, and the last places of both."""
    site.only(ndim=1, channels_last=0, state_window=0)
    x, weight, past = site.value("input"), site.value("weight"), site.given("past_state")
    channels, spread = site.size(weight, 0), int(site.attr("dilation"))
    length = (site.size(weight, 2) - 1) * spread
    kind = str(site.attr("activation"))
    if kind not in ("none", "silu", "swish") or length < 1:
        raise site.refused(f"activation is {kind!r}, its state {length} long")
    if past is None:
        whole = site.op("Pad", x, site.ints(0, 0, length, 0, 0, 0))
    else:
        whole = site.op("Concat", past, x, axis=2)
    result = site.op("Conv", whole, weight, site.given("bias"), group=channels, dilations=[spread])
    present = site.op("Slice", whole, site.ints(-length), site.ints(np.iinfo(np.int64).max), site.ints(2))
    return [result if kind == "none" else site.op("Swish", result), present]


def _quantized_lstm(site: Site) -> Results:
    """An LSTM whose weights are stored in 8 bits; what onnxruntime rounds of its activations is left as it is."""
    names = ("X", "B", "sequence_lens", "initial_h", "initial_c", "P")
    x, *rest = (site.value(name) if name == "X" else site.given(name) for name in names)
    weights = [_gates_of(site, name) for name in "WR"]
    kept = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")
    attributes: Attributes = {name: site.attr(name) for name in kept if site.attr(name) is not None}
    attributes.setdefault("hidden_size", site.size(weights[1], -1))
    return site.several("LSTM", 3, x, *weights, *rest, **attributes)


def _gates_of(site: Site, name: str) -> ir.Value:
    """A weight [directions, inputs, 4 * H] of integers as numbers, in the order of the operator: inputs last."""
    stored, scale, zero = (site.constant(site.value(key), key) for key in (name, f"{name}_scale", f"{name}_zero_point"))
    if stored.ndim != 3 or scale.ndim not in (1, 2) or scale.shape != zero.shape:
        raise site.refused(f"{name} has rank {stored.ndim}, its scales {scale.ndim}")
    shape = (len(stored), 1, -1)
    numbers = (stored.astype(np.int32) - zero.astype(np.int32).reshape(shape)) * scale.reshape(shape)
    return site.array(name, np.ascontiguousarray(numbers.astype(np.float32).transpose(0, 2, 1)))


RULES = {
    "CausalConvWithState": _causal_conv,
    "DynamicQuantizeLSTM": _quantized_lstm,
    "LinearAttention": _linear_attention,
    "LinearAttentionGate": _gate,
}
