"""Constants of one element are numbers, and operands too: of a higher rank, they add axes to what they meet."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.net import Net
from xopt.ir import canonicalize
from xopt.ir.edit import same_form
from xopt.runtime.reference import ReferenceSession


class Ranked(Net):
    """A net whose numbers come in ranks that are drawn, one after the other."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__("ranks")
        self.ranks = ranks

    def number(self, value: float) -> ir.Value:
        rank = self.ranks.pop()
        return self.constant(f"n{len(self.initializers)}", np.full([1] * rank, value, np.float32))


def gelu(net: Ranked, x: ir.Value) -> ir.Value:
    gate = net.op("Add", net.op("Erf", net.op("Div", x, net.number(math.sqrt(2)))), net.number(1))
    return net.op("Mul", net.op("Mul", x, gate), net.number(0.5))


def tanh_gelu(net: Ranked, x: ir.Value) -> ir.Value:
    cube = net.op("Mul", net.op("Pow", x, net.number(3)), net.number(0.044715))
    inner = net.op("Mul", net.op("Add", x, cube), net.number(math.sqrt(2 / math.pi)))
    return net.op("Mul", net.op("Mul", x, net.number(0.5)), net.op("Add", net.op("Tanh", inner), net.number(1)))


def swish(net: Ranked, x: ir.Value) -> ir.Value:
    return net.op("Mul", x, net.op("Sigmoid", net.op("Mul", x, net.number(1.702))))


def layer_norm(net: Ranked, x: ir.Value) -> ir.Value:
    centred = net.op("Sub", x, net.op("ReduceMean", x, net.ints(-1)))
    variance = net.op("ReduceMean", net.op("Pow", centred, net.number(2)), net.ints(-1))
    normal = net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, net.number(1e-5))))
    row = np.arange(1, 5, dtype=np.float32)
    scale, bias = (net.constant(name, row.reshape([1] * net.ranks.pop() + [4])) for name in "sb")
    return net.op("Add", net.op("Mul", normal, scale), bias)


def rms_norm(net: Ranked, x: ir.Value) -> ir.Value:
    mean = net.op("ReduceMean", net.op("Mul", x, x), net.ints(-1))
    return net.op("Mul", x, net.op("Pow", net.op("Add", mean, net.number(1e-5)), net.number(-0.5)))


def neutral(net: Ranked, x: ir.Value) -> ir.Value:
    x = net.op("Add", net.number(0), net.op("Sub", x, net.number(0)))
    return net.op("Mul", net.number(1), net.op("Div", x, net.number(1)))


def repeated(net: Ranked, x: ir.Value) -> ir.Value:
    """Neutral elements that repeat an axis of size 1."""
    single = net.op("ReduceMax", x, net.ints(-1))
    ones = net.constant("ones", np.ones([1] * net.ranks.pop() + [3], np.float32))
    return net.op("Expand", net.op("Mul", single, ones), net.ints(*[1] * (1 + net.ranks.pop())))


PATTERNS = [gelu, tanh_gelu, swish, layer_norm, rms_norm, neutral, repeated]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda one: one.__name__)
@settings(max_examples=12, deadline=None)
@given(rank=st.integers(1, 3), ranks=st.lists(st.integers(0, 4), min_size=6, max_size=6), dynamic=st.booleans())
def test_canonical_form_keeps_every_shape(pattern: object, rank: int, ranks: list[int], dynamic: bool) -> None:
    net = Ranked(list(ranks))
    sizes = [2, 3][: rank - 1]
    x = net.input("x", ["batch", *sizes[1:], 4] if dynamic and sizes else [*sizes, 4])
    net.output(pattern(net, x), "y")  # type: ignore[operator]
    model = net.build()
    feeds = {"x": np.random.default_rng(0).standard_normal((*sizes, 4)).astype(np.float32)}
    before = ReferenceSession(model).run(feeds)["y"]
    canonicalize(model)
    after = ReferenceSession(model).run(feeds)["y"]
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=lambda one: one.__name__)
def test_numbers_of_rank_0_are_still_recognized(pattern: object) -> None:
    net = Ranked([0] * 6)
    net.output(pattern(net, net.input("x", ["batch", 3, 4])), "y")  # type: ignore[operator]
    model = net.build()
    canonicalize(model)
    assert {node.op_type for node in model.graph} & {"Gelu", "Swish", "LayerNormalization", "RMSNormalization"}


def value(dtype: ir.DataType | None, shape: list[int | str | None] | None) -> ir.Value:
    return ir.Value(type=ir.TensorType(dtype) if dtype else None, shape=None if shape is None else ir.Shape(shape))


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (["batch", 4], ["batch", 4], True),
        (["unk__3", 4], ["batch", 4], True),
        ([2, 4], [None, 4], True),
        (None, ["batch", 4], True),
        ([1, "batch", 4], ["batch", 4], False),
        ([2, 4], [1, 4], False),
        ([2, 4], ["batch", 4], False),
    ],
)
def test_same_form(old: list[int | str | None] | None, new: list[int | str | None], same: bool) -> None:
    assert same_form(value(ir.DataType.FLOAT, old), value(ir.DataType.FLOAT, new)) is same
    assert not same_form(value(ir.DataType.FLOAT, old), value(ir.DataType.FLOAT16, new))
