"""Small transformers in canonical form, with random weights, for the tests of every part.

Each function returns a fresh ``ir.Model`` (opset 24, shapes inferred, dynamic batch and, where it makes
sense, sequence); :func:`feeds` makes matching random inputs. Equal arguments give equal models, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.ir.net import Net

MASKED_TO = -1e9


def vit(
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    image: int = 16,
    patch: int = 4,
    channels: int = 3,
    classes: int | None = 10,
    class_token: bool = True,
    fused: bool = False,
    hidden: int | None = None,
    seed: int = 0,
) -> ir.Model:
    """Pre-norm vision transformer: patch convolution, class token, learned positions, LayerNorm, linear head.

    ``pixel_values [batch, channels, image, image]`` -> ``logits [batch, classes]``. Without a class token the
    tokens are averaged; ``classes=None`` leaves out the head. DeiT-S is
    ``vit(layers=12, width=384, heads=6, image=224, patch=16, classes=1000)``.
    """
    net = Net("vit", seed)
    hidden = hidden or 4 * width
    patches = (image // patch) ** 2
    pixels = net.input("pixel_values", ["batch", channels, image, image])
    kernel = net.weight("patch.weight", width, channels, patch, patch, scale=(channels * patch**2) ** -0.5)
    grid = net.op(
        "Conv", pixels, kernel, net.weight("patch.bias", width), strides=[patch] * 2, kernel_shape=[patch] * 2
    )
    x = net.op("Transpose", net.op("Reshape", grid, net.ints(0, width, -1)), perm=[0, 2, 1])
    if class_token:
        shape = net.op("Concat", net.dimension(pixels, 0), net.ints(1, width), axis=0)
        token = net.op("Expand", net.weight("class_token", 1, 1, width, scale=1.0), shape)
        x = net.op("Concat", token, x, axis=1)
    x = net.add(x, net.weight("positions", 1, patches + class_token, width, scale=0.5))
    for index in range(layers):
        name = f"layers.{index}"
        normed = net.layer_norm(x, f"{name}.norm1", width)
        x = net.add(x, net.self_attention(normed, f"{name}.attention", width, heads, fused=fused))
        x = net.add(x, net.feed_forward(net.layer_norm(x, f"{name}.norm2", width), f"{name}.ffn", width, hidden))
    x = net.layer_norm(x, "norm", width)
    if class_token:
        pooled = net.op("Gather", x, net.scalar(0), axis=1)
    else:
        pooled = net.op("ReduceMean", x, net.ints(1), keepdims=0)
    net.output(net.linear(pooled, "head", width, classes) if classes else pooled, "logits")
    return net.build()


def padding_mask(net: Net, attention_mask: ir.Value) -> ir.Value:
    """int64 [batch, seq] -> bool [batch, 1, 1, seq], True where a key may be read."""
    return net.op("Unsqueeze", net.op("Cast", attention_mask, to=ir.DataType.BOOL), net.ints(1, 2))


def bert(
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    hidden: int | None = None,
    vocabulary: int = 97,
    positions: int = 64,
    pooled: str = "mean",
    fused: bool = False,
    mask: str = "bool",
    seed: int = 0,
) -> ir.Model:
    """Post-norm encoder with a padding mask (``mask``: "bool", "float" or "none") and a pooled output.

    ``input_ids, attention_mask int64 [batch, seq]`` -> ``embedding [batch, width]`` (``pooled``: "cls" or
    "mean", which leaves out the padding) or, with "none", ``last_hidden_state [batch, seq, width]``.
    """
    net = Net("bert", seed)
    hidden = hidden or 4 * width
    ids = net.input("input_ids", ["batch", "seq"], ir.DataType.INT64)
    attention_mask = net.input("attention_mask", ["batch", "seq"], ir.DataType.INT64) if mask != "none" else None
    words = net.op("Gather", net.weight("embeddings.word", vocabulary, width, scale=1.0), ids)
    places = net.op("Range", net.scalar(0), net.op("Squeeze", net.dimension(ids, 1), net.ints(0)), net.scalar(1))
    x = net.add(words, net.op("Gather", net.weight("embeddings.position", positions, width, scale=0.5), places))
    x = net.layer_norm(x, "embeddings.norm", width)
    bias = padding_mask(net, attention_mask) if attention_mask else None
    if mask == "float":
        bias = net.op("Where", bias, net.constant("zero", np.float32(0)), net.constant("masked", np.float32(MASKED_TO)))
    for index in range(layers):
        name = f"layers.{index}"
        attended = net.self_attention(x, f"{name}.attention", width, heads, bias, fused=fused)
        x = net.layer_norm(net.add(attended, x), f"{name}.norm1", width)
        x = net.layer_norm(net.add(net.feed_forward(x, f"{name}.ffn", width, hidden), x), f"{name}.norm2", width)
    if pooled == "cls":
        net.output(net.op("Gather", x, net.scalar(0), axis=1), "embedding")
    elif pooled == "mean" and attention_mask is not None:
        weights = net.op("Unsqueeze", net.op("Cast", attention_mask, to=ir.DataType.FLOAT), net.ints(-1))
        total = net.op("ReduceSum", net.op("Mul", x, weights), net.ints(1), keepdims=0)
        net.output(net.op("Div", total, net.op("ReduceSum", weights, net.ints(1), keepdims=0)), "embedding")
    elif pooled == "mean":
        net.output(net.op("ReduceMean", x, net.ints(1), keepdims=0), "embedding")
    else:
        net.output(x, "last_hidden_state")
    return net.build()


def llama(
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    hidden: int = 48,
    vocabulary: int = 97,
    positions: int = 64,
    qk_norm: bool = False,
    softcap: float = 0.0,
    seed: int = 0,
) -> ir.Model:
    """Llama-like decoder: RMSNorm, rotary, grouped queries, SwiGLU, causal; gives ``logits``."""
    net = Net("llama", seed)
    d = head_dim or width // heads
    ids = net.input("input_ids", ["batch", "seq"], ir.DataType.INT64)
    x = net.op("Gather", net.weight("embeddings", vocabulary, width, scale=1.0), ids)
    angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)[None]
    cos = net.constant("rotary.cos", np.cos(angles).astype(np.float32))
    sin = net.constant("rotary.sin", np.sin(angles).astype(np.float32))
    steps = net.op("Range", net.scalar(0), net.op("Squeeze", net.dimension(ids, 1), net.ints(0)), net.scalar(1))
    places = net.op("Expand", net.op("Unsqueeze", steps, net.ints(0)), net.op("Shape", ids))

    def rotated(value: ir.Value, count: int, name: str) -> ir.Value:
        if qk_norm:
            split = net.op("Reshape", value, net.ints(0, 0, -1, d))
            value = net.op("Reshape", net.rms_norm(split, f"{name}.norm", d), net.ints(0, 0, -1))
        options = {"num_heads": count, "interleaved": 0, "rotary_embedding_dim": 0}
        return net.op("RotaryEmbedding", value, cos, sin, places, name=f"{name}.rotary", **options)

    for index in range(layers):
        name = f"layers.{index}.attention"
        normed = net.rms_norm(x, f"layers.{index}.norm1", width)
        q = rotated(net.linear(normed, f"{name}.q", width, heads * d, bias=False), heads, f"{name}.q")
        k = rotated(net.linear(normed, f"{name}.k", width, kv_heads * d, bias=False), kv_heads, f"{name}.k")
        v = net.linear(normed, f"{name}.v", width, kv_heads * d, bias=False)
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": d}
        y = net.attention(q, k, v, name=f"{name}.attend", causal=True, softcap=softcap, **shape)
        x = net.add(x, net.linear(y, f"{name}.out", heads * d, width, bias=False))
        normed = net.rms_norm(x, f"layers.{index}.norm2", width)
        x = net.add(x, net.gated_feed_forward(normed, f"layers.{index}.ffn", width, hidden))
    net.output(net.linear(net.rms_norm(x, "norm", width), "head", width, vocabulary, bias=False), "logits")
    return net.build()


def gpt(
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    hidden: int | None = None,
    vocabulary: int = 97,
    positions: int = 64,
    parallel: bool = False,
    fused: bool = True,
    seed: int = 0,
) -> ir.Model:
    """GPT-2-like causal decoder; ``parallel``: attention and FFN read one norm, as in GPT-J."""
    net = Net("gpt", seed)
    hidden = hidden or 4 * width
    ids = net.input("input_ids", ["batch", "seq"], ir.DataType.INT64)
    words = net.op("Gather", net.weight("embeddings.word", vocabulary, width, scale=1.0), ids)
    places = net.op("Range", net.scalar(0), net.op("Squeeze", net.dimension(ids, 1), net.ints(0)), net.scalar(1))
    x = net.add(words, net.op("Gather", net.weight("embeddings.position", positions, width, scale=0.5), places))
    for index in range(layers):
        name = f"layers.{index}"
        normed = net.layer_norm(x, f"{name}.norm1", width)
        attended = net.self_attention(normed, f"{name}.attention", width, heads, fused=fused, causal=True)
        if parallel:
            forward = net.feed_forward(normed, f"{name}.ffn", width, hidden, "tanh")
            x = net.add(net.add(attended, forward), x)
        else:
            x = net.add(attended, x)
            normed = net.layer_norm(x, f"{name}.norm2", width)
            x = net.add(x, net.feed_forward(normed, f"{name}.ffn", width, hidden, "tanh"))
    net.output(net.linear(net.layer_norm(x, "norm", width), "head", width, vocabulary, bias=False), "logits")
    return net.build()


def biased(kind: str, *, layers: int = 2, width: int = 32, heads: int = 4, tokens: int = 12, seed: int = 0) -> ir.Model:
    """Pre-norm encoder over ``x [batch, tokens, width]`` whose attention has a head-indexed float mask.

    ``kind``: "relative" (one learned constant [1, heads, tokens, tokens] per layer, as Swin), "table" (a
    learned table [buckets, heads] gathered by distance and transposed, shared by all layers, as T5; no scale;
    dynamic sequence), "alibi" (slopes [1, heads, 1, 1] times distance, causal, dynamic sequence).
    """
    net = Net(kind, seed)
    x = net.input("x", ["batch", tokens if kind == "relative" else "seq", width])
    shared = None
    if kind in ("table", "alibi"):
        length = net.op("Squeeze", net.dimension(x, 1), net.ints(0))
        steps = net.op("Range", net.scalar(0), length, net.scalar(1))
        offset = net.op("Sub", net.op("Unsqueeze", steps, net.ints(0)), net.op("Unsqueeze", steps, net.ints(1)))
    if kind == "table":
        bucket = net.op("Add", net.op("Clip", offset, net.scalar(-8), net.scalar(8)), net.scalar(8))
        gathered = net.op("Gather", net.weight("relative.table", 17, heads, scale=1.0), bucket)
        shared = net.op("Unsqueeze", net.op("Transpose", gathered, perm=[2, 0, 1]), net.ints(0))
    if kind == "alibi":
        slopes = net.constant("slopes", (2.0 ** -np.arange(1, heads + 1, dtype=np.float32)).reshape(1, heads, 1, 1))
        shared = net.op("Mul", slopes, net.op("Cast", offset, to=ir.DataType.FLOAT))
    for index in range(layers):
        name = f"layers.{index}"
        bias = shared or net.weight(f"{name}.relative", 1, heads, tokens, tokens, scale=1.0)
        normed = net.layer_norm(x, f"{name}.norm1", width)
        options: dict[str, Any] = {"causal": kind == "alibi"} | ({"scale": 1.0} if kind == "table" else {})
        x = net.add(x, net.self_attention(normed, f"{name}.attention", width, heads, bias, **options))
        x = net.add(x, net.feed_forward(net.layer_norm(x, f"{name}.norm2", width), f"{name}.ffn", width, 4 * width))
    net.output(net.layer_norm(x, "norm", width), "y")
    return net.build()


def swin(
    *, layers: int = 2, width: int = 32, heads: int = 4, grid: int = 8, window: int = 4, seed: int = 0
) -> ir.Model:
    """Attention in windows of ``x [batch, grid*grid, width]``, with relative bias and fused QKV."""
    net = Net("swin", seed)
    x = net.input("x", ["batch", grid * grid, width])
    cells, tokens = grid // window, window * window
    for index in range(layers):
        name = f"layers.{index}"
        normed = net.layer_norm(x, f"{name}.norm1", width)
        tiles = net.op("Reshape", normed, net.ints(-1, cells, window, cells, window, width))
        tiles = net.op("Transpose", tiles, perm=[0, 1, 3, 2, 4, 5])
        tiles = net.op("Reshape", tiles, net.ints(-1, tokens, width))
        bias = net.weight(f"{name}.relative", 1, heads, tokens, tokens, scale=1.0)
        y = net.self_attention(tiles, f"{name}.attention", width, heads, bias, fused=True)
        y = net.op("Reshape", y, net.ints(-1, cells, cells, window, window, width))
        y = net.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
        x = net.add(x, net.op("Reshape", y, net.ints(-1, grid * grid, width)))
        x = net.add(x, net.feed_forward(net.layer_norm(x, f"{name}.norm2", width), f"{name}.ffn", width, 4 * width))
    net.output(net.op("ReduceMean", net.layer_norm(x, "norm", width), net.ints(1), keepdims=0), "pooled")
    return net.build()


def cross(*, layers: int = 2, width: int = 32, memory_width: int = 24, heads: int = 4, seed: int = 0) -> ir.Model:
    """Causal self and cross attention: ``x [batch, seq, width]``, ``memory [batch, source, memory_width]``."""
    net = Net("cross", seed)
    x = net.input("x", ["batch", "seq", width])
    memory = net.input("memory", ["batch", "source", memory_width])
    for index in range(layers):
        name = f"layers.{index}"
        normed = net.layer_norm(x, f"{name}.norm1", width)
        x = net.add(x, net.self_attention(normed, f"{name}.attention", width, heads, causal=True))
        q = net.linear(net.layer_norm(x, f"{name}.norm2", width), f"{name}.cross.q", width, width)
        k = net.linear(memory, f"{name}.cross.k", memory_width, width)
        v = net.linear(memory, f"{name}.cross.v", memory_width, width)
        y = net.attention(q, k, v, heads=heads, head_dim=width // heads, name=f"{name}.cross.attend")
        x = net.add(x, net.linear(y, f"{name}.cross.out", width, width))
        x = net.add(x, net.feed_forward(net.layer_norm(x, f"{name}.norm3", width), f"{name}.ffn", width, 4 * width))
    net.output(net.layer_norm(x, "norm", width), "y")
    return net.build()


#: One model of each kind, by name, small enough for any test.
ZOO = {
    "vit": vit,
    "vit-mean": lambda: vit(class_token=False),
    "vit-fused": lambda: vit(fused=True),
    "bert": bert,
    "bert-cls": lambda: bert(pooled="cls", fused=True),
    "bert-float-mask": lambda: bert(mask="float", pooled="none"),
    "llama": llama,
    "llama-qk-norm": lambda: llama(qk_norm=True, kv_heads=1),
    "llama-softcap": lambda: llama(softcap=5.0, kv_heads=4),
    "gpt": gpt,
    "gpt-parallel": lambda: gpt(parallel=True, fused=False),
    "relative": lambda: biased("relative"),
    "table": lambda: biased("table"),
    "alibi": lambda: biased("alibi"),
    "swin": swin,
    "cross": cross,
}


def feeds(model: ir.Model, dims: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: ids below 97, an attention mask with a padded tail, otherwise normal floats."""
    sizes = {"batch": 2, "seq": 9, "source": 7} | dict(dims or {})
    random = np.random.default_rng(seed)
    result: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.name and value.shape is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        if value.name == "attention_mask":
            mask = np.ones(shape, np.int64)
            mask[-1, shape[1] * 2 // 3 :] = 0
            result[value.name] = mask
        elif value.dtype == ir.DataType.INT64:
            result[value.name] = random.integers(0, 97, shape)
        else:
            result[value.name] = random.standard_normal(shape).astype(np.float32)
    return result
