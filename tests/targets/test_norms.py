"""Norms over any axis with all their outputs, and reductions of infinities, against ONNX's reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.targets.running import built, node_model, reference
from xopt import targets
from xopt.targets.lowering import lower

X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32) * 3 + 1
CHANNELS = [np.random.default_rng(n).uniform(0.5, 2, 3).astype(np.float32) for n in range(4)]


def compiled(model: ir.Model) -> list[np.ndarray]:
    return built(lower(model, targets.get("cpu")))({"x": X})


@pytest.mark.parametrize("axis", [-1, 2, 0])
def test_layer_norm_with_mean_and_deviation(axis: int) -> None:
    scale, bias = (np.random.default_rng(n).standard_normal(X.shape[axis:]).astype(np.float32) for n in (1, 2))
    model = node_model("LayerNormalization", {"x": X.shape, "s": scale, "b": bias}, outputs=3, axis=axis, epsilon=0.1)
    axes = tuple(range(axis % 4, 4))
    wide = X.astype(np.float64)
    mean, inverse = wide.mean(axes, keepdims=True), 1 / np.sqrt(wide.var(axes, keepdims=True) + 0.1)
    for got, want in zip(compiled(model), ((wide - mean) * inverse * scale + bias, mean, inverse), strict=True):
        assert (got.dtype, got.shape) == (np.float32, want.shape)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_rms_norm(axis: int) -> None:
    scale = np.random.default_rng(1).standard_normal(X.shape[axis:]).astype(np.float32)
    wide = X.astype(np.float64)
    root = np.sqrt((wide**2).mean(tuple(range(axis % 4, 4)), keepdims=True) + 1e-5)
    got = compiled(node_model("RMSNormalization", {"x": X.shape, "s": scale}, axis=axis))[0]
    np.testing.assert_allclose(got, wide / root * scale, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("op", "operands", "outputs", "attributes"),
    [
        ("BatchNormalization", CHANNELS, 1, {"epsilon": 0.01}),
        ("BatchNormalization", CHANNELS, 3, {"training_mode": 1, "momentum": 0.3}),
        ("InstanceNormalization", CHANNELS[:2], 1, {}),
        ("GroupNormalization", CHANNELS[:2], 1, {"num_groups": 3}),
        ("LpNormalization", [], 1, {}),
        ("MeanVarianceNormalization", [], 1, {"axes": [0, 2]}),
        ("LogSoftmax", [], 1, {"axis": 1}), ("Hardmax", [], 1, {"axis": 2}), ("Softmax", [], 1, {"axis": 0}),
        ("Mish", [], 1, {}), ("HardSwish", [], 1, {}), ("Gelu", [], 1, {"approximate": "tanh"}),
        ("Swish", [], 1, {"alpha": 0.5}),
    ],
)  # fmt: skip
def test_equal(op: str, operands: list[np.ndarray], outputs: int, attributes: dict[str, Any]) -> None:
    given = {"x": X.shape, **{f"c{n}": operand for n, operand in enumerate(operands)}}
    model = node_model(op, given, outputs=outputs, **attributes)
    for got, want in zip(compiled(model), reference(model, {"x": X}), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_local_norm(size: int) -> None:
    """Of the definition: ONNX's reference does as many channels as there are images."""
    wide, squares = X.astype(np.float64), np.zeros(X.shape)
    for channel in range(3):
        first = max(channel - (size - 1) // 2, 0)
        squares[:, channel] = (wide[:, first : channel + size // 2 + 1] ** 2).sum(1)
    got = compiled(node_model("LRN", {"x": X.shape}, size=size, alpha=0.5, bias=2.0))[0]
    np.testing.assert_allclose(got, wide / (2 + 0.5 / size * squares) ** 0.75, rtol=2e-5, atol=2e-6)


def test_norm_of_magnitudes() -> None:
    got = compiled(node_model("LpNormalization", {"x": X.shape}, axis=1, p=1))[0]
    np.testing.assert_allclose(got, X / np.abs(X).sum(1, keepdims=True), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("op", "end"), [("ReduceMax", -np.inf), ("ReduceMin", np.inf)])
def test_rows_of_infinities(op: str, end: float) -> None:
    rows = np.full((3, 4), end, np.float32)
    rows[1:, 2] = [1, -end]
    model = node_model(op, {"x": rows.shape, "axes": np.array([1])}, keepdims=0)
    got = built(lower(model, targets.get("cpu")))({"x": rows})[0]
    np.testing.assert_array_equal(got, [end, 1, -end])


def test_zeros_have_no_direction() -> None:
    model = node_model("LpNormalization", {"x": (2, 3)})
    rows = np.array([[0, 0, 0], [3, 0, 4]], np.float32)
    got = built(lower(model, targets.get("cpu")))({"x": rows})[0]
    np.testing.assert_allclose(got, [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
