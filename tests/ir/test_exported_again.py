"""What ``export`` writes is read back as what it was: the same attention with the same mask, in the same block."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.net import Net
from xopt.facts import left_out
from xopt.ir import canonicalize, export
from xopt.ir.structure import AttentionSite, transformer_blocks
from xopt.runtime.reference import ReferenceSession

WIDTH, HEADS, DEPTH, LENGTH = 16, 4, 4, 5
MASKS = {
    "none": ([], None),
    "keys": (["batch", 1, 1, "seq"], ir.DataType.BOOL),
    "pairs": (["batch", 1, "seq", "seq"], ir.DataType.BOOL),
    "heads": (["batch", HEADS, "seq", "seq"], ir.DataType.BOOL),
    "numbers_of_keys": (["batch", 1, 1, "seq"], ir.DataType.FLOAT),
    "numbers": (["batch", 1, "seq", "seq"], ir.DataType.FLOAT),
    "numbers_of_heads": ([1, HEADS, "seq", "seq"], ir.DataType.FLOAT),
}
SIZES = {"batch": 2, "seq": LENGTH}


def block(kind: str, causal: bool, groups: int, softcap: float) -> ir.Model:
    """A pre-norm attention whose mask is an input."""
    net = Net("block")
    x = net.input("x", ["batch", "seq", WIDTH])
    shape, dtype = MASKS[kind]
    mask = [net.input("mask", shape, dtype)] if dtype is not None else []
    normed = net.layer_norm(x, "norm", WIDTH)
    q = net.linear(normed, "q", WIDTH, HEADS * DEPTH)
    k, v = (net.linear(normed, name, WIDTH, groups * DEPTH) for name in ("k", "v"))
    attributes = {"q_num_heads": HEADS, "kv_num_heads": groups, "scale": 0.5}
    y = net.op("Attention", q, k, v, *mask, **attributes, is_causal=int(causal), softcap=softcap)
    net.output(net.add(x, net.linear(y, "out", HEADS * DEPTH, WIDTH)), "y")
    return net.build()


def feeds_of(kind: str) -> dict[str, np.ndarray]:
    """Random inputs; a row of the first sample sees nothing."""
    draw = np.random.default_rng(5)
    feeds = {"x": draw.standard_normal((2, LENGTH, WIDTH)).astype(np.float32)}
    shape, dtype = MASKS[kind]
    if dtype is not None:
        sizes = [SIZES[size] if isinstance(size, str) else size for size in shape]
        shown = draw.random(sizes) < 0.6
        shown[0, :, -1] = False
        numbers = np.where(shown, draw.standard_normal(sizes), -np.inf).astype(np.float32)
        feeds["mask"] = shown if dtype == ir.DataType.BOOL else numbers
    return feeds


def only_site(model: ir.Model) -> AttentionSite:
    report = canonicalize(model)
    assert not left_out(model, report.refused)
    (site,) = (one.attention for one in transformer_blocks(model))
    assert site is not None
    return site


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", MASKS)
def test_attention(kind: str, causal: bool, groups: int, softcap: float) -> None:
    model = block(kind, causal, groups, softcap)
    site = only_site(model)
    again = ir.from_proto(ir.to_proto(export(model)))
    read = only_site(again)
    assert (read.heads, read.kv_heads, read.head_dim) == (HEADS, groups, DEPTH) == (site.heads, site.kv_heads, 4)
    assert read.node.attributes["softcap"].as_float() == softcap
    assert read.node.attributes["scale"].as_float() == pytest.approx(0.5)
    assert read.causal == site.causal
    masks = [None if one.mask is None else one.mask.dtype for one in (site, read)]
    assert masks[0] == masks[1] == MASKS[kind][1]
    feeds = feeds_of(kind)
    want, got = (ReferenceSession(one).run(feeds)["y"] for one in (model, again))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)  # sums of 16 numbers near 1
