"""The cost model against counts that papers and their official code print."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.net import Net
from xopt.errors import InputError
from xopt.ir.cost import cost, node_macs
from xopt.ir.dependency import channel_groups, cut


def deit(width: int, heads: int) -> ir.Model:
    """DeiT's shape: 12 layers, 224 x 224 pixels in patches of 16, class token, 1000 classes."""
    return builders.vit(layers=12, width=width, heads=heads, image=224, patch=16, classes=1000)


@pytest.mark.parametrize(("width", "heads", "giga", "million"), [(192, 3, 1.254, 5.717), (384, 6, 4.599, 22.051)])
def test_deit(width: int, heads: int, giga: float, million: float) -> None:
    """Encoder, patch embedding and head: the published GFLOPs (as multiply-adds) and parameters of DeiT-T and -S."""
    result = cost(deit(width, heads))
    assert round(result.macs / 1e9, 3) == giga
    assert round(result.parameters / 1e6, 3) == million
    assert result.bytes == 4 * result.parameters + shape_constants(deit(width, heads))
    assert result.per_block == (12 * 197 * width**2 + 2 * 197**2 * width,) * 12
    assert result.macs == sum(result.per_block) + 196 * 768 * width + 1000 * width
    assert result.unknown == ()


def shape_constants(model: ir.Model) -> int:
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None and v.dtype == ir.DataType.INT64)


@pytest.mark.slow
def test_deit_base() -> None:
    assert f"{cost(deit(768, 12)).macs / 1e9:.2f}" == "17.56"


def test_merged_tokens() -> None:
    """DeiT-S with ToMe, r = 13 in each block: 41 tokens at the end, 2.703 GMACs."""
    from xopt.passes.merge_tokens import MergeTokens
    from xopt.pipeline.context import PassContext

    model = deit(384, 6)
    MergeTokens(schedule=(13,)).run(model, PassContext())
    result = cost(model)
    assert round(result.macs / 1e9, 3) == 2.703
    assert result.unknown == ()
    counts = [197 - 13 * index for index in range(13)]
    assert counts[-1] == 41
    expected = [4 * n * 384**2 + 2 * n**2 * 384 + 8 * (n - 13) * 384**2 for n in counts[:-1]]
    assert list(result.per_block) == expected


def hilo() -> ir.Model:
    """LITv2's attention on a 14 x 14 map of 384 channels: 6 heads in 2 x 2 windows, 6 heads on pooled keys."""
    net = Net("hilo")
    x = net.input("x", ["batch", 196, 384])
    map_ = net.op("Reshape", x, net.ints(-1, 7, 2, 7, 2, 384))
    windows = net.op("Reshape", net.op("Transpose", map_, perm=[0, 1, 3, 2, 4, 5]), net.ints(-1, 4, 384))
    parts = net.op("Split", net.linear(windows, "high.qkv", 384, 576), net.ints(192, 192, 192), n=3, axis=-1)
    high = net.attention(*parts, heads=6, head_dim=32, name="high")
    high = net.op("Reshape", net.linear(high, "high.out", 192, 192), net.ints(-1, 7, 7, 2, 2, 192))
    high = net.op("Reshape", net.op("Transpose", high, perm=[0, 1, 3, 2, 4, 5]), net.ints(-1, 196, 192))
    image = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1]), net.ints(-1, 384, 14, 14))
    pooled = net.op("AveragePool", image, kernel_shape=[2, 2], strides=[2, 2])
    pooled = net.op("Transpose", net.op("Reshape", pooled, net.ints(-1, 384, 49)), perm=[0, 2, 1])
    q = net.linear(x, "low.q", 384, 192)
    k, v = net.op("Split", net.linear(pooled, "low.kv", 384, 384), net.ints(192, 192), n=2, axis=-1)
    low = net.linear(net.attention(q, k, v, heads=6, head_dim=32, name="low"), "low.out", 192, 192)
    net.output(net.op("Concat", high, low, axis=-1), "y")
    return net.build()


def test_hilo_attention() -> None:
    """The figure that LITv2's official script prints for this shape."""
    assert cost(hilo()).macs == 83_467_776


@pytest.mark.parametrize(("length", "neurons"), [(39, 131), (128, 139)])
def test_a_head_of_bert_base_is_worth_this_many_neurons(length: int, neurons: int) -> None:
    """Kwon et al. 2022; one layer of BERT-base: width 768, 12 heads, 3072 neurons."""
    saved = {}
    for kind in ("heads", "neurons"):
        model = builders.bert(layers=1, width=768, heads=12, pooled="none")
        before = cost(model, {"seq": length}).macs
        group = next(group for group in channel_groups(model) if group.kind == kind)
        cut(model, group, range(1, group.units))
        saved[kind] = before - cost(model, {"seq": length}).macs
    assert saved["heads"] == 4 * length * 768 * 64 + 2 * length**2 * 64
    assert saved["neurons"] == 2 * length * 768
    assert round(saved["heads"] / saved["neurons"]) == neurons


@pytest.mark.parametrize("name", builders.ZOO)
def test_parts_add_up_and_scale_with_the_batch(name: str) -> None:
    model = builders.ZOO[name]()
    one, three = cost(model), cost(model, {"batch": 3})
    assert one.unknown == ()
    assert sum(one.per_node.values()) == one.macs
    assert 0 < sum(one.per_block) <= one.macs
    assert set(one.dims) <= {"batch", "seq", "source"}
    assert one.dims["batch"] == 1 and all(size == 128 for dim, size in one.dims.items() if dim != "batch")
    shared = sum(m for n, m in one.per_node.items() if three.per_node[n] == m)
    assert shared == 0 and three.macs == 3 * one.macs
    assert model.graph.inputs[0].shape is not None and str(model.graph.inputs[0].shape[0]) == "batch"


def test_grouped_queries_count_query_heads() -> None:
    per_node = cost(builders.llama(layers=1, width=32, heads=4, kv_heads=2), {"seq": 10}).per_node
    assert per_node["layers.0.attention.attend"] == 10 * 10 * 4 * (8 + 8)
    assert per_node["layers.0.attention.k.matmul"] == 10 * 32 * 16


def test_cross_attention_counts_both_lengths() -> None:
    per_node = cost(builders.cross(layers=1), {"seq": 5, "source": 7}).per_node
    assert per_node["layers.0.cross.attend"] == 5 * 7 * 4 * (8 + 8)
    assert per_node["layers.0.cross.k.matmul"] == 7 * 24 * 32


def single(op: str, *shapes: tuple[int, ...], **attributes: object) -> int | None:
    net = Net(op)
    inputs = [net.input(f"i{index}", shape) for index, shape in enumerate(shapes)]
    net.output(net.op(op, *inputs, **attributes), "y")
    return node_macs(next(iter(net.build().graph)))


def test_other_ops() -> None:
    assert single("Gemm", (3, 4), (5, 4), transB=1) == 60
    assert single("Gemm", (4, 3), (4, 5), transA=1) == 60
    assert single("Conv", (1, 8, 10, 10), (12, 2, 3, 3), group=4, pads=[1, 1, 1, 1]) == 12 * 100 * 2 * 9
    assert single("Einsum", (2, 3, 4), (2, 5, 4), equation="bik,bjk->bij") == 2 * 3 * 5 * 4
    assert single("Attention", (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 16)) == 2 * 3 * 5 * 7 * (8 + 16)
    assert single("Relu", (2, 3)) == 0


def test_a_size_that_stays_unknown_is_named_not_guessed() -> None:
    net = Net("unknown")
    x = net.input("x", ["batch", 4])
    found = net.op("Transpose", net.op("NonZero", x), perm=[1, 0])
    points = net.op("Cast", found, to=ir.DataType.FLOAT)
    net.output(net.op("MatMul", points, net.weight("w", 2, 3), name="late"), "y")
    net.output(net.op("MatMul", x, net.weight("v", 4, 5)), "z")
    result = cost(net.build())
    assert result.unknown == ("late",)
    assert result.macs == 20


def positions(rows: int) -> ir.Model:
    """A model of symbolic length that adds a table of so many positions."""
    net = Net("positions")
    x = net.op("Add", net.input("x", ["batch", "seq", 4]), net.weight("positions", rows, 4))
    net.output(net.op("MatMul", x, net.weight("w", 4, 4)), "y")
    return net.build()


def test_a_table_shorter_than_the_usual_length_tells_the_length() -> None:
    assert cost(positions(32)).dims == {"batch": 1, "seq": 32}
    with pytest.raises(InputError, match=r"E-OPTION.*does not take.*seq=33"):
        cost(positions(32), {"seq": 33})


def test_unknown_dimension_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"E-OPTION.*sequence"):
        cost(builders.bert(), {"sequence": 3})


def test_small_integers_are_parameters_scales_and_shapes_are_not() -> None:
    net = Net("quantized")
    x = net.input("x", [2, 4])
    scale, zero = net.constant("scale", np.float32(0.1)), net.constant("zero", np.int8(0))
    weight = net.op("DequantizeLinear", net.constant("w", np.ones((4, 3), np.int8)), scale, zero)
    net.output(net.op("MatMul", x, net.op("Reshape", weight, net.ints(4, 3))), "y")
    result = cost(net.build())
    assert (result.parameters, result.bytes) == (12, 12 + 4 + 1 + 16)
