"""Pooling in every form, and what undoes it, equal to onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.targets.running import built, onnxruntime
from xopt import targets
from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.targets.lowering import lower

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model_of(inputs: str, body: str, outputs: str = "y") -> ir.Model:
    """Of opset 22, which all the poolings have."""
    text = f'<ir_version: 10, opset_import: ["": 22]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def compiled(model: ir.Model) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    model = model.clone()
    canonicalize(model)
    return built(lower(model, targets.get("cpu")))


def check(model: ir.Model, *feeds: Mapping[str, np.ndarray]) -> None:
    ours, theirs = compiled(model), onnxruntime(model)
    for feed in feeds:
        for got, want in zip(ours(feed), theirs(feed)):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


K3 = "kernel_shape: ints = [3, 2]"
FORMS: Sequence[str] = (
    K3,
    f"{K3}, strides: ints = [2, 1], pads: ints = [1, 0, 2, 1]",
    f"{K3}, strides: ints = [2, 3], ceil_mode: int = 1, pads: ints = [0, 1, 1, 1]",
    f'{K3}, strides: ints = [2, 2], auto_pad: string = "SAME_LOWER"',
    f'{K3}, strides: ints = [2, 2], auto_pad: string = "SAME_UPPER"',
    f'{K3}, auto_pad: string = "VALID"',
    f"{K3}, dilations: ints = [2, 3], pads: ints = [1, 1, 1, 1]",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_windows(op: str, form: str) -> None:
    kinds = {"AveragePool": ("", ", count_include_pad: int = 1"), "LpPool": ("", ", p: int = 3")}.get(op, ("",))
    feeds = [{"x": floats(2, 2, *size)} for size in ((7, 9), (6, 8))]
    for kind in kinds:
        check(model_of("float[n, 2, h, w] x", f"y = {op} <{form}{kind}> (x)", "float[n, 2, p, q] y"), *feeds)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("form", FORMS[:4])
def test_where_the_largest_stand(form: str, order: int) -> None:
    body = f"y, i = MaxPool <{form}, storage_order: int = {order}> (x)"
    x = floats(2, 2, 7, 9)
    x[0, 0, 2:5, 3:6] = 9  # several that are equal: the first counts
    check(model_of("float[2, 2, 7, 9] x", body, "y, i"), {"x": x})


def test_other_ranks_and_types() -> None:
    check(model_of("float[1, 2, 9] x", "y = AveragePool <kernel_shape: ints = [4], strides: ints = [3]> (x)"),
          {"x": floats(1, 2, 9)})  # fmt: skip
    check(model_of("float[1, 2, 4, 5, 6] x", "y = MaxPool <kernel_shape: ints = [2, 3, 2]> (x)"),
          {"x": floats(1, 2, 4, 5, 6)})  # fmt: skip
    x = RANDOM.integers(-128, 127, (1, 2, 5, 5)).astype(np.int8)
    check(model_of("int8[1, 2, 5, 5] x", f"y = MaxPool <{K3}, pads: ints = [1, 1, 1, 1]> (x)"), {"x": x})


def test_numbers_that_are_none_and_infinite() -> None:
    x = floats(1, 1, 6, 6)
    x[0, 0, 1, 1], x[0, 0, 3:, 3:] = np.nan, -np.inf
    got = compiled(model_of("float[1, 1, 6, 6] x", "y = MaxPool <kernel_shape: ints = [2, 2]> (x)"))({"x": x})[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (2, 3))
    np.testing.assert_array_equal(got, windows.max((-2, -1)))


@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool"])
def test_whole_axes(op: str) -> None:
    model = model_of("float[n, 3, h, w] x", f"y = {op} (x)", "float[n, 3, 1, 1] y")
    check(model, {"x": floats(2, 3, 4, 5)}, {"x": floats(1, 3, 1, 2)})


def test_norm_of_whole_axes() -> None:
    x = floats(2, 3, 4, 5)
    model = model_of("float[n, 3, h, w] x", "y = GlobalLpPool <p: int = 3> (x)", "float[n, 3, 1, 1] y")
    want = (np.abs(x.astype(np.float64)) ** 3).sum((2, 3), keepdims=True) ** (1 / 3)
    np.testing.assert_allclose(compiled(model)({"x": x})[0], want, rtol=1e-5)


def test_back() -> None:
    pool = "kernel_shape: ints = [2, 2], strides: ints = [2, 2]"
    inputs, there = "float[1, 2, 4, 6] x", f"v, i = MaxPool <{pool}> (x)"
    check(model_of(inputs, f"{there} y = MaxUnpool <{pool}> (v, i)"), {"x": floats(1, 2, 4, 6)})
    wide = "s = Constant <value_ints: ints = [1, 2, 5, 7]> ()"
    x = floats(1, 2, 4, 6)
    got = compiled(model_of(inputs, f"{there} {wide} y = MaxUnpool <{pool}> (v, i, s)"))({"x": x})[0]
    small = compiled(model_of(inputs, f"{there} y = MaxUnpool <{pool}> (v, i)"))({"x": x})[0]
    np.testing.assert_array_equal(got, np.pad(small, ((0, 0), (0, 0), (0, 1), (0, 1))))


def test_places_outside_end_the_run() -> None:
    pool = "kernel_shape: ints = [2, 2], strides: ints = [2, 2]"
    body = f"i = Add (a, b) y = MaxUnpool <{pool}> (x, i)"
    run = compiled(model_of("float[1, 1, 1, 2] x, int64[1, 1, 1, 2] a, int64[1] b", body))
    with pytest.raises(ValueError, match="an index is outside"):
        run({"x": floats(1, 1, 1, 2), "a": np.array([[[[0, 7]]]]), "b": np.array([1])})


@pytest.mark.parametrize("attributes", [
    "kernel_shape: ints = [0, 2]", "kernel_shape: ints = [2]", "kernel_shape: ints = [9, 9]",
    f"{K3}, strides: ints = [0, 1]", f"{K3}, pads: ints = [-1, 0, 0, 0]", f'{K3}, auto_pad: string = "SOME"',
])  # fmt: skip
def test_what_makes_no_sense_is_refused(attributes: str) -> None:
    text = f"y = AveragePool <{attributes}> (x)"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 22]> g (float[1, 2, 5, 5] x) => (y) {{ {text} }}'
    )
    with pytest.raises(InputError):
        compiled(ir.from_proto(proto))
