"""Groups of coupled channels, and the law of the cut: a cut model computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir import builders
from tests.ir.net import Net
from xopt.errors import InputError
from xopt.ir.dependency import ChannelGroup, channel_groups, cut, uncuttable
from xopt.ir.fx import run_with_values, to_fx
from xopt.ir.io import to_bytes
from xopt.ir.shapes import infer_shapes
from xopt.ir.structure import AttentionSite, transformer_blocks
from xopt.runtime.reference import ReferenceSession

#: The same sums of some hundred float32 products around 1, in another order.
TOLERANCE = 1e-5


def mask_units(model: ir.Model, group: ChannelGroup, keep: Sequence[int]) -> None:
    """Silence the other units without cutting: zero their rows of the last projection."""
    for site in group.sites:
        last = site.out if isinstance(site, AttentionSite) else site.down
        assert last is not None
        value = model.graph.initializers[str(last.weight.name)]
        assert value.const_value is not None
        data = value.const_value.numpy().copy().reshape(group.units, -1, value.const_value.shape[1])
        data[[unit for unit in range(group.units) if unit not in keep]] = 0
        value.const_value = ir.tensor(data.reshape(value.const_value.shape.numpy()), name=value.name)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(next(iter(ReferenceSession(model, threads=1).run(feeds).values())))


def check(model: ir.Model) -> None:
    """Valid for the checker with full inference, and no shape in the model contradicts a fresh inference."""
    proto = onnx.ModelProto.FromString(to_bytes(model))
    onnx.checker.check_model(proto, full_check=True)
    del proto.graph.value_info[:]
    fresh = ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True))
    known = {value.name: value.shape for node in fresh.graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            for mine, theirs in zip(value.shape or (), known[value.name] or (), strict=True):
                assert not (isinstance(mine, int) and isinstance(theirs, int)) or mine == theirs, value


def cut_group(model: ir.Model, kind: str, index: int, keep: Sequence[int]) -> ChannelGroup:
    group = [group for group in channel_groups(model) if group.kind == kind][index]
    cut(model, group, keep)
    return group


def some(units: int) -> list[int]:
    """About two thirds of the units, not in one piece."""
    return [unit for unit in range(units) if unit % 3 != 1]


@pytest.mark.parametrize("name", builders.ZOO)
def test_a_cut_model_equals_the_masked_one(name: str) -> None:
    model, masked, original = (builders.ZOO[name]() for _ in range(3))
    groups = [group for group in channel_groups(model) if group.kind != "width"]
    assert len(groups) == sum(2 if b.ffn else 1 for b in transformer_blocks(model))
    for group in groups:
        mask_units(masked, group, some(group.units))
        cut(model, group, some(group.units))
    check(model)
    feeds = builders.feeds(model, {"batch": 3, "seq": 8})
    result = run(model, feeds)
    np.testing.assert_allclose(result, run(masked, feeds), rtol=TOLERANCE, atol=TOLERANCE)
    assert np.abs(result - run(original, feeds)).max() > 1e-2
    for before, after in zip(original.graph.outputs, model.graph.outputs):
        assert before.shape == after.shape


@pytest.mark.parametrize("squared", [True, False])
def test_neurons_behind_an_activation_of_several_nodes(squared: bool) -> None:
    """A ReLU squared, then scaled and shifted by numbers."""

    def build() -> ir.Model:
        net = Net("star")
        x = net.input("x", ["batch", 16, 32])
        x = net.add(x, net.self_attention(net.layer_norm(x, "norm", 32), "attention", 32, 4))
        up = net.op("Relu", net.linear(x, "up", 32, 24))
        power = net.op("Mul", up, up) if squared else net.op("Pow", up, net.constant("two", np.float32(2.0)))
        y = net.op(
            "Add", net.op("Mul", power, net.constant("scale", np.float32(0.9))), net.constant("shift", np.float32(-0.4))
        )
        net.output(net.add(x, net.linear(y, "down", 24, 32)), "y")
        model = net.build()
        infer_shapes(model)
        return model

    model, masked = build(), build()
    (group,) = (group for group in channel_groups(model) if group.kind == "neurons")
    mask_units(masked, group, some(24))
    cut(model, group, some(24))
    check(model)
    feeds = builders.feeds(model, {"batch": 3})
    np.testing.assert_allclose(run(model, feeds), run(masked, feeds), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", builders.ZOO)
def test_structure_shows_what_is_left(name: str) -> None:
    model = builders.ZOO[name]()
    before = transformer_blocks(model)
    for group in channel_groups(model):
        if group.kind != "width":
            cut(model, group, some(group.units))
    for old, new in zip(before, transformer_blocks(model), strict=True):
        assert old.attention is not None and new.attention is not None
        units = old.attention.heads if old.attention.kv_heads == 1 else old.attention.kv_heads
        assert new.attention.heads == old.attention.heads // units * len(some(units))
        assert (new.attention.head_dim, new.attention.v_head_dim) == (8, 8)
        assert new.attention.heads % new.attention.kv_heads == 0
        if old.ffn is not None:
            assert new.ffn is not None and new.ffn.width == len(some(old.ffn.width))


MODELS = ["vit-fused", "bert", "llama", "table"]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODELS), st.integers(0, 1), st.sampled_from(["heads", "neurons"]), st.data())
def test_any_choice_of_units(name: str, index: int, kind: str, data: st.DataObject) -> None:
    model, masked = builders.ZOO[name](), builders.ZOO[name]()
    units = [group for group in channel_groups(model) if group.kind == kind][index].units
    keep = data.draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=units, unique=True))
    mask_units(masked, cut_group(model, kind, index, keep), keep)
    feeds = builders.feeds(model)
    mine, theirs = (next(iter(run_with_values(to_fx(m), feeds).values())).detach().numpy() for m in (model, masked))
    np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "vit-fused", "alibi", "relative"])
def test_cutting_twice_is_cutting_once(name: str) -> None:
    twice, once = builders.ZOO[name](), builders.ZOO[name]()
    units = channel_groups(once)[0].units
    if units == 4:
        cut_group(twice, "heads", 0, [0, 2, 3])
        cut_group(twice, "heads", 0, [1, 2])
        cut_group(once, "heads", 0, [2, 3])
    else:
        cut_group(twice, "heads", 0, [1])
        cut_group(once, "heads", 0, [1])
    feeds = builders.feeds(once)
    assert np.array_equal(run(twice, feeds), run(once, feeds))
    assert [n.op_type for n in twice.graph] == [n.op_type for n in once.graph]


def test_keeping_all_units_changes_nothing() -> None:
    model = builders.llama()
    feeds = builders.feeds(model)
    before = run(model, feeds)
    for group in channel_groups(model):
        cut(model, group, range(group.units))
    assert np.array_equal(run(model, feeds), before)


def test_members_of_grouped_heads() -> None:
    """A unit is a key-value head with its two query heads of width 8."""
    group = channel_groups(builders.llama())[0]
    found = {str(m.initializer.name).split(".")[-2]: (m.axis, m.start, m.unit) for m in group.members}
    assert (group.kind, group.units) == ("heads", 2)
    assert found == {"q": (1, 0, 16), "k": (1, 0, 8), "v": (1, 0, 8), "out": (0, 0, 16)}
    assert group.parameters_per_unit == 32 * (16 + 8 + 8 + 16)


def test_members_of_fused_heads_and_their_mask() -> None:
    group = channel_groups(builders.swin())[0]
    found = [(str(m.initializer.name).split(".", 2)[-1], m.axis, m.start, m.unit) for m in group.members]
    starts = (0, 32, 64)
    assert found == [
        *[(f"attention.qkv.{part}", axis, s, 8) for s in starts for part, axis in (("weight", 1), ("bias", 0))],
        ("attention.out.weight", 0, 0, 8),
        ("relative", 1, 0, 1),
    ]


@pytest.mark.parametrize("keep", [[], [4], [-1], [0, 0]])
def test_bad_units_are_input_errors(keep: list[int]) -> None:
    model = builders.vit()
    with pytest.raises(InputError, match="E-OPTION"):
        cut(model, channel_groups(model)[0], keep)


def with_shared_weights(change: Callable[[Net, int], None] | None = None) -> ir.Model:
    """ALBERT: two layers with one set of weights."""
    net = Net("albert")
    x = net.input("x", ["batch", "seq", 32])
    for index in range(2):
        x = net.add(x, net.self_attention(net.layer_norm(x, "norm1", 32), "attention", 32, 4))
        x = net.add(x, net.feed_forward(net.layer_norm(x, "norm2", 32), "ffn", 32, 64))
        if change:
            change(net, index)
    net.output(net.linear(x, "head", 32, 3), "y")
    return net.build()


def test_layers_that_share_weights_are_cut_together() -> None:
    model, masked = with_shared_weights(), with_shared_weights()
    groups = [group for group in channel_groups(model) if group.kind != "width"]
    assert [(group.kind, len(group.sites)) for group in groups] == [("heads", 2), ("neurons", 2)]
    for group in groups:
        mask_units(masked, group, some(group.units))
        cut(model, group, some(group.units))
    check(model)
    feeds = builders.feeds(model)
    np.testing.assert_allclose(run(model, feeds), run(masked, feeds), rtol=TOLERANCE, atol=TOLERANCE)


def test_equal_vectors_that_an_exporter_merged_are_cut_apart() -> None:
    """Biases of zero, all in one initializer: every group keeps its own, and the norm that reads it keeps it whole."""
    net = Net("zeros")
    x = net.input("x", ["batch", "seq", 32])
    zero = net.constant("zeros", np.zeros(32, np.float32))
    for index in range(2):
        normed = net.op("LayerNormalization", x, net.constant("ones", np.ones(32, np.float32)), zero, axis=-1)
        parts = [net.op("Add", net.op("MatMul", normed, net.weight(f"{index}.{part}", 32, 32)), zero) for part in "qkv"]
        y = net.attention(*parts, heads=4, head_dim=8, name=f"attend{index}")
        x = net.add(x, net.op("Add", net.op("MatMul", y, net.weight(f"{index}.out", 32, 32)), zero))
    net.output(net.linear(x, "head", 32, 3), "y")
    model, feeds = net.build(), {"x": np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)}
    masked = model.clone()
    groups = channel_groups(model)
    assert [(group.kind, len(group.sites)) for group in groups] == [("heads", 1), ("heads", 1)]
    for group, keep in zip(groups, ([0, 2], [1, 2, 3])):
        mask_units(masked, group, keep)
        cut(model, group, keep)
    check(model)
    assert model.graph.initializers["zeros"].shape == [32]
    np.testing.assert_allclose(run(model, feeds), run(masked, feeds), rtol=TOLERANCE, atol=TOLERANCE)


def reasons(model: ir.Model) -> set[str]:
    return {item.reason for item in uncuttable(model) if not item.reason.startswith("width")}


def test_a_weight_that_something_else_reads_stays() -> None:
    def spy(net: Net, index: int) -> None:
        if index == 1:
            net.output(net.op("ReduceSum", net.initializers["attention.k.weight"], net.ints(0)), "sum")

    model = with_shared_weights(spy)
    assert [group.kind for group in channel_groups(model)] == ["neurons"]
    assert reasons(model) == {"shared-weight"}


def test_a_value_that_something_else_reads_stays() -> None:
    """Keys as an output of the model, as caches have it; hidden neurons measured by another op."""
    model = builders.gpt(fused=False)
    names = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.append(names["layers.0.attention.k.add_out"])
    model.graph.outputs.append(names["layers.1.ffn.act_out"])
    groups = [group.name for group in channel_groups(model) if group.kind != "width"]
    assert groups == ["layers.0.ffn.act", "layers.1.attention.attend"]
    assert reasons(model) == {"read-elsewhere"}


def test_attention_without_projections_stays() -> None:
    net = Net("bare")
    x = net.input("x", ["batch", "seq", 32])
    net.output(net.add(x, net.attention(x, x, x, heads=4, head_dim=8, name="attend")), "y")
    model = net.build()
    assert channel_groups(model) == []
    assert reasons(model) == {"no-projection"}


def copy_weights(source: ir.Model, target: ir.Model) -> None:
    for name, value in target.graph.initializers.items():
        tensor = source.graph.initializers[name].const_value
        assert tensor is not None and value.const_value is not None and tensor.shape == value.const_value.shape, name
        value.const_value = tensor


def test_a_narrower_stream_is_the_narrower_model() -> None:
    """Cutting the width of a model gives the model that is built narrow, with the same slices of the weights."""
    model = builders.llama(width=32, head_dim=8)
    group = channel_groups(model)[-1]
    assert (group.kind, group.units) == ("width", 32)
    cut(model, group, range(0, 32, 2))
    check(model)
    narrow = builders.llama(width=16, head_dim=8)
    copy_weights(model, narrow)
    feeds = builders.feeds(model)
    np.testing.assert_allclose(run(model, feeds), run(narrow, feeds), rtol=TOLERANCE, atol=TOLERANCE)
    assert not any(group.units == 32 for group in channel_groups(model) if group.kind == "width")


def test_the_width_of_a_vision_transformer_reaches_patches_tokens_and_positions() -> None:
    model = builders.vit()
    group = channel_groups(model)[-1]
    axes = {str(member.initializer.name): member.axis for member in group.members}
    expected = {
        "patch.weight": 0,
        "patch.bias": 0,
        "class_token": 2,
        "positions": 2,
        "norm.weight": 0,
        "head.weight": 0,
    }
    assert expected.items() <= axes.items()
    cut(model, group, range(5, 25))
    check(model)
    assert run(model, builders.feeds(model)).shape == (2, 10)


def test_the_width_behind_computed_targets() -> None:
    """Targets as exporters write them: -1 for the batch before the width, 1 for the width in an Expand."""
    net = Net("targets")
    pixels = net.input("pixels", ["batch", 3, 8, 8])
    grid = net.op("Conv", pixels, net.weight("patch", 32, 3, 4, 4), strides=[4, 4])
    x = net.op("Transpose", net.op("Reshape", grid, net.ints(-1, 32, 4)), perm=[0, 2, 1])
    shape = net.op("Concat", net.dimension(pixels, 0), net.ints(1), net.ints(1), axis=0)
    x = net.op("Concat", net.op("Expand", net.weight("token", 1, 1, 32), shape), x, axis=1)
    x = net.add(x, net.self_attention(net.layer_norm(x, "norm", 32), "attention", 32, 4))
    net.output(net.linear(x, "head", 32, 3), "y")
    model = net.build()
    group = channel_groups(model)[-1]
    assert (group.kind, group.units) == ("width", 32)
    cut(model, group, range(20))
    check(model)
    assert run(model, builders.feeds(model)).shape == (2, 5, 3)


@pytest.mark.parametrize(("name", "reason"), [("bert", "width-is-an-output"), ("swin", "width-is-an-input")])
def test_a_width_that_the_caller_sees_stays(name: str, reason: str) -> None:
    model = builders.ZOO[name]()
    assert [item.reason for item in uncuttable(model)] == [reason]
    assert not any(group.kind == "width" for group in channel_groups(model))


@pytest.mark.slow
def test_minilm(minilm: ir.Model) -> None:
    """A real model: cut equals masked, batch and sequence stay dynamic."""
    masked = minilm.clone()
    groups = channel_groups(minilm)
    assert [(group.kind, group.units) for group in groups] == [("heads", 12), ("neurons", 1536)] * 6
    for group in groups:
        mask_units(masked, group, some(group.units))
        cut(minilm, group, some(group.units))
    check(minilm)
    for size in (1, 3):
        feeds = builders.feeds(minilm, {"batch": size, "seq": 5 * size})
        np.testing.assert_allclose(run(minilm, feeds), run(masked, feeds), rtol=1e-4, atol=TOLERANCE)
