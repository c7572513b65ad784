"""Blocks, projections and special tokens of canonical graphs, and reasons for what is left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.net import Net
from xopt.ir import shapes
from xopt.ir.dependency import channel_groups
from xopt.ir.structure import Block, explain, token_layout, transformer_blocks
from xopt.ir.tokens import padding_mask

#: Per block: heads, kv heads, head dim, causal, cross, mask by head; FFN width and gated, or None.
PLAIN = (4, 4, 8, False, False, False, (128, False))
EXPECTED = {
    "vit": [PLAIN] * 2,
    "vit-mean": [PLAIN] * 2,
    "vit-fused": [PLAIN] * 2,
    "bert": [PLAIN] * 2,
    "bert-cls": [PLAIN] * 2,
    "bert-float-mask": [PLAIN] * 2,
    "llama": [(4, 2, 8, True, False, False, (48, True))] * 2,
    "llama-qk-norm": [(4, 1, 8, True, False, False, (48, True))] * 2,
    "llama-softcap": [(4, 4, 8, True, False, False, (48, True))] * 2,
    "gpt": [(4, 4, 8, True, False, False, (128, False))] * 2,
    "gpt-parallel": [(4, 4, 8, True, False, False, (128, False))] * 2,
    "relative": [(4, 4, 8, False, False, True, (128, False))] * 2,
    "table": [(4, 4, 8, False, False, True, (128, False))] * 2,
    "alibi": [(4, 4, 8, True, False, True, (128, False))] * 2,
    "swin": [(4, 4, 8, False, False, True, (128, False))] * 2,
    "cross": [(4, 4, 8, True, False, False, None), (4, 4, 8, False, True, False, (128, False))] * 2,
}
NORMS = {"gpt-parallel": [1, 1], "cross": [1, 2, 1, 2]}


def summary(block: Block) -> tuple[object, ...]:
    site, ffn = block.attention, block.ffn
    assert site is not None
    assert site.v_head_dim == site.head_dim
    shape = (site.heads, site.kv_heads, site.head_dim, site.causal, site.cross, site.head_mask)
    return (*shape, (ffn.width, ffn.gated) if ffn is not None else None)


@pytest.mark.parametrize("name", builders.ZOO)
def test_blocks(name: str) -> None:
    model = builders.ZOO[name]()
    blocks = transformer_blocks(model)
    assert [summary(block) for block in blocks] == EXPECTED[name]
    assert explain(model) == []
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [len(block.norms) for block in blocks] == NORMS.get(name, [2] * len(blocks))
    for block, following in itertools.pairwise(blocks):
        assert block.output is following.input


@pytest.mark.parametrize("name", builders.ZOO)
def test_projections_are_where_the_weights_say(name: str) -> None:
    for block in transformer_blocks(builders.ZOO[name]()):
        site, ffn = block.attention, block.ffn
        assert site is not None and site.q and site.k and site.v and site.out
        assert (site.q.width, site.k.width) == (site.heads * site.head_dim, site.kv_heads * site.head_dim)
        assert site.out.weight.shape is not None
        assert site.out.weight.shape[0] == site.heads * site.v_head_dim
        assert site.out.input is site.node.outputs[0]
        assert "attention" in str(site.q.weight.name) or "cross" in str(site.q.weight.name)
        if site.q.part is not None:
            width = site.heads * site.head_dim
            parts = (site.q.part, site.k.part, site.v.part)
            assert parts == (slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width))
            assert site.q.matmul is site.k.matmul is site.v.matmul
        if ffn is not None:
            assert ffn.up.input is (ffn.gate or ffn.up).input
            assert str(ffn.down.weight.name).endswith("down.weight")
            assert str((ffn.gate or ffn.up).weight.name).endswith("gate.weight" if ffn.gated else "up.weight")


LAYOUTS = {
    "vit": (True, 1, False, "cls"),
    "vit-mean": (False, 0, False, "mean"),
    "bert": (False, 0, True, "mean"),
    "bert-cls": (False, 1, True, "cls"),
    "bert-float-mask": (False, 0, True, "none"),
    "llama": (False, 0, False, "none"),
    "table": (False, 0, False, "none"),
    "swin": (False, 0, False, "mean"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_token_layout(name: str) -> None:
    layout = token_layout(builders.ZOO[name]())
    found = (layout.class_token, layout.protected, layout.padding_mask is not None, layout.pooled)
    assert found == LAYOUTS[name]


Branch = Callable[[Net, ir.Value], ir.Value]


def one_block(attention: Branch, ffn: Branch | None = None, pool: Branch | None = None) -> ir.Model:
    """``x + attention(x)``, then ``x + ffn(x)``, then ``pool`` on ``x [batch, 16, 32]``."""
    net = Net("one")
    x = net.input("x", ["batch", 16, 32])
    x = net.add(x, attention(net, x))
    x = net.add(x, ffn(net, x)) if ffn else x
    net.output(pool(net, x) if pool else x, "y")
    return net.build()


def attend(net: Net, x: ir.Value) -> ir.Value:
    return net.self_attention(net.layer_norm(x, "norm", 32), "attention", 32, 4)


def shifted_windows(net: Net, x: ir.Value) -> ir.Value:
    """Swin's odd blocks: roll the grid, attend in windows, roll back."""

    def roll(value: ir.Value, by: int) -> ir.Value:
        ends = net.ints(2**31 - 1)
        tail = net.op("Slice", value, net.ints(by), ends, net.ints(1))
        return net.op("Concat", tail, net.op("Slice", value, net.ints(0), net.ints(by), net.ints(1)), axis=1)

    rolled = roll(net.layer_norm(x, "norm", 32), 3)
    windows = net.op("Reshape", rolled, net.ints(-1, 4, 32))
    y = net.self_attention(windows, "attention", 32, 4)
    return roll(net.op("Reshape", y, net.ints(-1, 16, 32)), -3)


def scaled(net: Net, x: ir.Value) -> ir.Value:
    """CaiT's and DINOv2's layer scale."""
    return net.op("Mul", attend(net, x), net.weight("gamma", 32))


def sandwich(net: Net, x: ir.Value) -> ir.Value:
    """Gemma 2's norms on both sides."""
    return net.rms_norm(attend(net, x), "after", 32)


@pytest.mark.parametrize(("branch", "norms"), [(shifted_windows, 1), (scaled, 1), (sandwich, 2), (attend, 1)])
def test_branches_are_followed_to_the_stream(branch: Branch, norms: int) -> None:
    model = one_block(branch)
    (block,) = transformer_blocks(model)
    assert block.input is model.graph.inputs[0]
    assert block.output is model.graph.outputs[0]
    assert len(block.norms) == norms
    assert explain(model) == []


def relu_ffn(net: Net, x: ir.Value) -> ir.Value:
    """T5's first FFN: no bias, ReLU."""
    up = net.op("Relu", net.linear(x, "ffn.up", 32, 24, bias=False))
    return net.linear(up, "ffn.down", 24, 32, bias=False)


def fused_gate(net: Net, x: ir.Value) -> ir.Value:
    """Phi-3's gate and up in one weight."""
    joined = net.linear(x, "ffn.gate_up", 32, 48, bias=False)
    gate, up = net.op("Split", joined, net.ints(24, 24), n=2, axis=-1)
    return net.linear(net.op("Mul", up, net.op("Swish", gate, alpha=1.0)), "ffn.down", 24, 32, bias=False)


def test_forms_of_the_ffn() -> None:
    (block,) = transformer_blocks(one_block(attend, relu_ffn))
    assert block.ffn is not None
    assert (block.ffn.width, block.ffn.gated, block.ffn.activation.op_type) == (24, False, "Relu")
    (block,) = transformer_blocks(one_block(attend, fused_gate))
    assert block.ffn is not None and block.ffn.gate is not None
    assert (block.ffn.width, block.ffn.gate.part, block.ffn.up.part) == (24, slice(0, 24), slice(24, 48))


def _between(function: Callable[[Net, ir.Value], ir.Value]) -> Branch:
    """An FFN with this function between its projections."""

    def ffn(net: Net, x: ir.Value) -> ir.Value:
        return net.linear(function(net, net.linear(x, "ffn.up", 32, 24)), "ffn.down", 24, 32)

    return ffn


def number(net: Net, value: float) -> ir.Value:
    return net.constant(f"number_{value:g}", np.array(value, np.float32))


def squared_relu(net: Net, x: ir.Value) -> ir.Value:
    """Of Primer."""
    return net.op("Pow", net.op("Relu", x), number(net, 2.0))


def relu_times_itself(net: Net, x: ir.Value) -> ir.Value:
    active = net.op("Relu", x)
    return net.op("Mul", active, active)


def mish(net: Net, x: ir.Value) -> ir.Value:
    """As exporters write it up to opset 17."""
    return net.op("Mul", x, net.op("Tanh", net.op("Softplus", x)))


def relu6(net: Net, x: ir.Value) -> ir.Value:
    return net.op("Clip", x, number(net, 0.0), number(net, 6.0))


def hard_swish(net: Net, x: ir.Value) -> ir.Value:
    shifted = relu6(net, net.op("Add", x, number(net, 3.0)))
    return net.op("Div", net.op("Mul", x, shifted), number(net, 6.0))


@pytest.mark.parametrize("function", [squared_relu, relu_times_itself, mish, relu6, hard_swish])
def test_an_activation_may_be_made_of_parts(function: Callable[[Net, ir.Value], ir.Value]) -> None:
    model = one_block(attend, _between(function))
    (block,) = transformer_blocks(model)
    assert block.ffn is not None
    assert (block.ffn.width, block.ffn.gated) == (24, False)
    assert [group.units for group in channel_groups(model) if group.kind == "neurons"] == [24]


def test_a_scaled_product_of_two_weights_is_no_ffn() -> None:
    """A low-rank update is linear, whatever number it is multiplied by."""
    model = one_block(attend, _between(lambda net, x: net.op("Mul", x, number(net, 0.5))))
    (block,) = transformer_blocks(model)
    assert block.ffn is None


@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_a_stream_may_be_scaled_where_a_branch_joins_it(op: str) -> None:
    net = Net("scaled")
    x = net.input("x", ["batch", 16, 32])
    kept = net.op(op, x, net.weight("beta", 32))
    net.output(net.op("Add", kept, attend(net, x)), "y")
    model = net.build()
    (block,) = transformer_blocks(model)
    assert (block.input is model.graph.inputs[0]) == (op == "Mul")
    assert [item.reason for item in explain(model)] == ([] if op == "Mul" else ["no-residual"])


def test_a_head_with_a_hidden_layer_is_no_ffn() -> None:
    """A pooler's tanh between two projections is not on the residual stream."""

    def pooler(net: Net, x: ir.Value) -> ir.Value:
        hidden = net.op("Tanh", net.linear(net.op("Gather", x, net.scalar(0), axis=1), "pooler", 32, 32))
        return net.linear(hidden, "classifier", 32, 3)

    model = one_block(attend, relu_ffn, pooler)
    (block,) = transformer_blocks(model)
    assert block.ffn is not None and block.ffn.width == 24
    assert [(item.node.op_type, item.reason) for item in explain(model)] == [("MatMul", "no-residual")]


def four_dimensional(net: Net, x: ir.Value) -> ir.Value:
    heads = net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, 4, 8)), perm=[0, 2, 1, 3])
    y = net.op("Attention", heads, heads, heads, name="attend")
    return net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(0, 0, 32))


def bare(net: Net, x: ir.Value) -> ir.Value:
    return net.attention(x, x, x, heads=4, head_dim=8, name="attend")


def mixed(net: Net, x: ir.Value) -> ir.Value:
    """A branch that is joined with another stream before it is added."""
    return net.op("Slice", net.op("Concat", attend(net, x), x, axis=1), net.ints(8), net.ints(24), net.ints(1))


@pytest.mark.parametrize(
    ("branch", "reasons"),
    [
        (four_dimensional, ["attention-4d"]),
        (bare, ["no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out"]),
        (mixed, ["no-residual"]),
    ],
)
def test_reasons(branch: Branch, reasons: list[str]) -> None:
    model = one_block(branch)
    assert [item.reason for item in explain(model)] == reasons
    blocks = transformer_blocks(model)
    assert len(blocks) == (reasons != ["attention-4d"])


def test_no_attention_no_blocks() -> None:
    model = one_block(lambda net, x: net.op("Relu", x))
    assert transformer_blocks(model) == []
    layout = token_layout(model)
    assert (layout.class_token, layout.protected, layout.padding_mask, layout.pooled) == (False, 0, None, "unknown")


@pytest.mark.parametrize("name", builders.ZOO)
def test_missing_knowledge_is_a_reason_not_an_error(name: str) -> None:
    model = builders.ZOO[name]()
    shapes.clear_inferred(model)
    assert {item.reason for item in explain(model)} == {"unknown-shape"}
    token_layout(model)
    model = builders.ZOO[name]()
    for value in model.graph.initializers.values():
        value.const_value = None
    assert all(block.attention is None or block.attention.q is None for block in transformer_blocks(model))
    token_layout(model)


def pool_last(net: Net, x: ir.Value) -> ir.Value:
    return net.op("Gather", x, net.scalar(-1), axis=1)


def pool_slice(net: Net, x: ir.Value) -> ir.Value:
    first = net.op("Slice", x, net.ints(0), net.ints(1), net.ints(1))
    return net.op("Squeeze", first, net.ints(1))


def pool_transposed(net: Net, x: ir.Value) -> ir.Value:
    """torch's AdaptiveAvgPool1d over tokens, as Swin has it."""
    return net.op("GlobalAveragePool", net.op("Transpose", net.layer_norm(x, "final", 32), perm=[0, 2, 1]))


def pool_matrix(net: Net, x: ir.Value) -> ir.Value:
    """Attention pooling by a learned vector."""
    scores = net.op("Softmax", net.op("MatMul", x, net.weight("probe", 32, 1)), axis=1)
    return net.op("MatMul", net.op("Transpose", scores, perm=[0, 2, 1]), x)


@pytest.mark.parametrize(
    ("pool", "kind"),
    [
        (pool_last, "unknown"),
        (pool_slice, "cls"),
        (pool_transposed, "mean"),
        (pool_matrix, "unknown"),
        (None, "none"),
    ],
)
def test_kinds_of_pooling(pool: Branch | None, kind: str) -> None:
    assert token_layout(one_block(attend, relu_ffn, pool)).pooled == kind


def test_all_learned_leading_tokens_are_protected() -> None:
    """DeiT: a class token and a distillation token, one of them expanded."""
    net = Net("deit")
    x = net.input("x", ["batch", 9, 32])
    shape = net.op("Concat", net.dimension(x, 0), net.ints(1, 32), axis=0)
    tokens = [net.op("Expand", net.weight(name, 1, 1, 32), shape) for name in ("cls", "dist")]
    x = net.add(net.op("Concat", *tokens, x, axis=1), net.weight("positions", 1, 11, 32))
    x = net.add(x, attend(net, net.layer_norm(x, "pre", 32)))
    net.output(net.op("Gather", x, net.scalar(0), axis=1), "y")
    layout = token_layout(net.build())
    assert (layout.class_token, layout.protected, layout.pooled) == (True, 2, "cls")


def test_padding_masks_are_computed_masks_over_keys() -> None:
    assert np.all([token_layout(builders.ZOO[n]()).padding_mask is None for n in ("relative", "table", "alibi")])


def test_a_mask_that_the_caller_gives_whole_is_no_padding_mask() -> None:
    """Also after it was turned into numbers; a mask of keys that is spread over the queries is one."""
    net = Net("masks", 0)
    whole = net.input("whole", ["batch", 1, "seq", "seq"], ir.DataType.BOOL)
    keys = net.input("keys", ["batch", 1, 1, "seq"], ir.DataType.BOOL)
    given, spread = net.op("Not", whole), net.op("Not", keys)
    given.shape = spread.shape = whole.shape
    assert padding_mask([whole]) is None
    assert padding_mask([given]) is None
    assert padding_mask([given, spread]) is spread
    assert padding_mask([keys]) is keys
