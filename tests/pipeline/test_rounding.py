"""What rounding explains: nothing of a fault in a usual model, and as much as noise shows in one that magnifies it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.ir.canonical import model_of
from xopt.data.dataset import Dataset
from xopt.pipeline.rounding import MOST, UNITS, Magnified, rounding_bound, with_noise
from xopt.pipeline.verify import observe

RANDOM = np.random.default_rng(0)


def model(body: str) -> ir.Model:
    """Two products of x that are nearly the same, and what ``body`` makes of them."""
    made = model_of(
        "(float[B, 8] x) => (float[B, 4] y) <float[8, 4] w = {%s}, float[8, 4] v = {%s}>"
        % ((", ".join(["0"] * 32),) * 2),
        f"a = MatMul(x, w) b = MatMul(x, v) {body}",
    )
    weight = RANDOM.standard_normal((8, 4)).astype(np.float32)
    for name, array in (("w", weight), ("v", weight + np.float32(1e-4))):
        made.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return made


def samples() -> Dataset:
    return Dataset({"x": RANDOM.standard_normal((4, 8)).astype(np.float32)})


def test_a_difference_of_what_is_nearly_equal_is_magnified() -> None:
    steep = model("y = Sub(a, b)")
    magnified = observe(steep, samples()).magnified(steep)
    assert rounding_bound(steep) < 1e-4
    assert magnified.explains("y", 1e-3)
    assert not magnified.explains("y", MOST * 1.01)


def test_a_usual_model_is_held_to_the_bound_of_its_structure() -> None:
    usual = model("y = Add(a, b)")
    magnified = observe(usual, samples()).magnified(usual)
    assert not magnified.explains("y", rounding_bound(usual) * 1.01)
    assert not magnified.explains("another", 0.001)


def test_noise_is_sought_only_where_it_is_asked_for() -> None:
    def differences(noisy: ir.Model) -> dict[str, float]:
        raise AssertionError

    assert not Magnified(model("y = Add(a, b)"), differences).explains("y", 1.0)


def test_noise_is_of_the_last_places() -> None:
    before = model("y = Add(a, b)")
    for seed in range(2):
        noisy = with_noise(before, seed)
        for name, value in before.graph.initializers.items():
            one, other = value.const_value.numpy(), noisy.graph.initializers[name].const_value.numpy()
            moved = np.abs(one - other) / np.abs(one)
            assert 0 < moved.max() <= (UNITS + 1) * np.finfo(np.float32).eps
    assert with_noise(before, 0).graph.initializers["w"].const_value.numpy() == pytest.approx(
        with_noise(before, 0).graph.initializers["w"].const_value.numpy(), abs=0
    )


def test_transforms_lose_what_onnxruntime_loses_in_them() -> None:
    """Its transforms of 400 values, no power of two, are off by 3e-5 of their scale."""
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float[b, 8000, 1] x, float[400] w) => (float[b, f, k, 2] y) {
        step = Constant <value = int64 {160}> ()
        y = STFT (x, step, w)
    }"""
    assert 1e-4 < rounding_bound(ir.from_proto(onnx.parser.parse_model(text))) < 1e-2
