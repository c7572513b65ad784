"""Models of two towers, and heads that pool by attention: tokens that are equal in pairs are merged without loss.

That holds only where each attention and each mean weighs the tokens of its own tower by their sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.net import Net
from xopt.data.dataset import Dataset
from xopt.passes import MergeTokens
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach
from xopt.runtime.reference import ReferenceSession

WIDTH, HEADS = 16, 2


def tower(net: Net, name: str, x: ir.Value, layers: int = 2) -> ir.Value:
    for index in range(layers):
        one = f"{name}.{index}"
        x = net.add(x, net.self_attention(net.layer_norm(x, f"{one}.norm1", WIDTH), f"{one}.attention", WIDTH, HEADS))
        x = net.add(x, net.feed_forward(net.layer_norm(x, f"{one}.norm2", WIDTH), f"{one}.ffn", WIDTH, 2 * WIDTH))
    return net.layer_norm(x, f"{name}.norm", WIDTH)


def attend(net: Net, name: str, query: ir.Value, tokens: ir.Value) -> ir.Value:
    """Other tokens attend to these."""
    q = net.linear(query, f"{name}.q", WIDTH, WIDTH)
    k, v = (net.linear(tokens, f"{name}.{part}", WIDTH, WIDTH) for part in "kv")
    mixed = net.attention(q, k, v, heads=HEADS, head_dim=WIDTH // HEADS, name=name)
    return net.linear(mixed, f"{name}.out", WIDTH, WIDTH)


def learned(net: Net, name: str, count: int, like: ir.Value) -> ir.Value:
    """Learned tokens, once for each sample."""
    shape = net.op("Concat", net.dimension(like, 0), net.ints(count, WIDTH), axis=0)
    return net.op("Expand", net.weight(name, 1, count, WIDTH, scale=1.0), shape)


def model(kind: str) -> ir.Model:
    net = Net(kind)
    x = net.input("x", ["batch", 24, WIDTH])
    tokens = tower(net, "image", x)
    if kind == "two towers":
        other = tower(net, "text", net.input("t", ["batch", 12, WIDTH]))
        means = [net.op("ReduceMean", one, net.ints(1), keepdims=0) for one in (tokens, other)]
        net.output(net.op("Mul", *means), "y")
        return net.build()
    if kind == "learned query":
        probe = attend(net, "pool", learned(net, "probe", 1, x), tokens)
        pooled = net.add(probe, net.feed_forward(net.layer_norm(probe, "n", WIDTH), "mlp", WIDTH, 2 * WIDTH))
    elif kind == "latents":
        latents = learned(net, "latents", 4, x)
        pooled = net.add(latents, attend(net, "read", latents, tokens))
    else:  # a class token that comes late, and attends to itself and to all tokens
        token = learned(net, "class", 1, x)
        for index in range(2):
            both = net.layer_norm(net.op("Concat", token, tokens, axis=1), f"both{index}", WIDTH)
            first = net.op("Slice", both, net.ints(0), net.ints(1), net.ints(1))
            token = net.add(token, attend(net, f"class{index}", first, both))
        pooled = token
    net.output(pooled, "y")
    return net.build()


def pairs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Tokens that are equal in pairs, next to each other."""
    half = np.random.default_rng(seed).standard_normal((shape[0], shape[1] // 2, shape[2])).astype(np.float32)
    return np.repeat(half, 2, axis=1)


def merge(graph: ir.Model, feeds: dict[str, np.ndarray], **options: Any) -> PassReport:
    context = PassContext(calibration=Dataset(feeds))
    (step,) = PassManager([MergeTokens(**options)], instruments=[VerifyEach()]).run(graph, context)
    return step.report


@pytest.mark.parametrize("kind", ["two towers", "learned query", "latents", "late class token"])
def test_equal_tokens_are_merged_without_loss(kind: str) -> None:
    graph = model(kind)
    feeds = {str(v.name): pairs((3, *(int(d) for d in (v.shape or ())[1:])), 0) for v in graph.graph.inputs}  # type: ignore[arg-type]
    before = ReferenceSession(graph).run(feeds)["y"]
    report = merge(graph, feeds, ratio=0.25, blocks=1)
    towers = 2 if kind == "two towers" else 1
    assert report.rewritten == towers
    assert report.numbers["tokens-before"] == ("24 12" if towers == 2 else 24)
    assert report.numbers["tokens-after"] == ("18 9" if towers == 2 else 18)
    np.testing.assert_allclose(ReferenceSession(graph).run(feeds)["y"], before, rtol=1e-4, atol=1e-4)


def test_sizes_are_heeded_by_attention_that_pools() -> None:
    """Without them the pairs that are one token now count half."""
    graph = model("learned query")
    feeds = {"x": pairs((3, 24, WIDTH), 0)}
    before = ReferenceSession(graph).run(feeds)["y"]
    merge(graph, feeds, ratio=0.25, blocks=1, proportional=False)
    assert np.abs(ReferenceSession(graph).run(feeds)["y"] - before).max() > 1e-2


def test_a_schedule_has_a_number_for_each_block_of_all_towers() -> None:
    graph = model("two towers")
    feeds = {"x": pairs((2, 24, WIDTH), 0), "t": pairs((2, 12, WIDTH), 1)}
    report = merge(graph, feeds, schedule=(4, 0, 0, 2))
    assert report.numbers["merged"] == "4 2"
    assert report.numbers["tokens-after"] == "20 10"


def test_attention_to_other_tokens_is_no_place_to_merge() -> None:
    graph = model("latents")
    feeds = {"x": pairs((2, 24, WIDTH), 0)}
    report = merge(graph, feeds, schedule=(2,))
    assert report.reasons == {"cross-attention": 1}
