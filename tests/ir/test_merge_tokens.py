"""The bodies of ``xopt::MergeTokens`` and ``xopt::MergeTokensMCTF`` in onnxruntime and OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import InlinePass

import xopt.ir
from tests.passes import merging
from xopt.ir import ops
from xopt.runtime.reference import ReferenceSession

ROUNDING = 3e-5
"""Float32 against float64 for sums of at most 24 tokens of magnitude below 5, weights spread over two decades."""


def model_of(name: str, tokens: int | str, width: int, guide: int, **attributes: Any) -> ir.Model:
    inputs = [
        ir.val(label, ir.DataType.FLOAT, ["batch", tokens, channels])
        for label, channels in (("x", width), ("guide", guide), ("size", 1))
    ]
    node = ir.Node(ops.DOMAIN, name, inputs, ir.convenience.convert_attributes(attributes), num_outputs=2)
    for value, label, channels in zip(node.outputs, ("merged", "merged_size"), (width, 1)):
        value.name, value.type = label, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(["batch", None, channels])
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24}, name="merge")
    model = ir.Model(graph, ir_version=11)
    ops.add_function(model, name)
    return model


def run(name: str, x: np.ndarray, guide: np.ndarray, size: np.ndarray, r: int, **attributes: Any) -> Any:
    model = model_of(name, x.shape[1], x.shape[2], guide.shape[2], r=[r], **attributes)
    found = ReferenceSession(model).run({"x": x, "guide": guide, "size": size})
    return found["merged"], found["merged_size"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """x, sizes, a generator's worth of randomness as the guide, r and protected."""
    tokens = draw(st.integers(5, 24))
    protected = draw(st.integers(0, 3))
    r = draw(st.integers(2, max(2, (tokens - protected) // 2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((2, tokens, 6)).astype(np.float32)
    size = rng.integers(1, 9, (2, tokens, 1)).astype(np.float32)
    guide = rng.uniform(0.01, 1.0, (2, tokens, 1)).astype(np.float32)
    return x, size, guide, min(r, (tokens - protected) // 2), protected


@settings(max_examples=15, deadline=None)
@given(cases())
def test_tome_equals_the_description(case: tuple[np.ndarray, np.ndarray, np.ndarray, int, int]) -> None:
    x, size, _, r, protected = case
    metric = np.roll(x, 1, axis=-1) ** 2 - 0.5
    merged, sizes = run("MergeTokens", x, metric, size, r, protected=protected)
    expected, expected_sizes = merging.tome(x, metric, size, r, protected)
    np.testing.assert_array_equal(sizes, expected_sizes)
    np.testing.assert_allclose(merged, expected, atol=ROUNDING)
    np.testing.assert_array_equal(sizes.sum(1), size.sum(1))
    np.testing.assert_allclose((merged * sizes).sum(1), (x * size).sum(1), atol=20 * ROUNDING)


@settings(max_examples=15, deadline=None)
@given(cases(), st.sampled_from([(1.0, 20.0, 40.0), (0.5, float("inf"), 2.0), (float("inf"), 3.0, float("inf"))]))
def test_mctf_equals_the_description(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int, int], taus: tuple[float, float, float]
) -> None:
    x, size, importance, r, protected = case
    if r < 2:
        return
    attributes = dict(zip(("tau_sim", "tau_info", "tau_size"), taus))
    merged, sizes = run("MergeTokensMCTF", x, importance, size, r, protected=protected, **attributes)
    expected, expected_sizes = merging.mctf(x, importance, size, r, protected, taus)
    np.testing.assert_array_equal(sizes, expected_sizes)
    np.testing.assert_allclose(merged, expected, atol=ROUNDING)
    np.testing.assert_array_equal(sizes.sum(1), size.sum(1))


@pytest.mark.parametrize("protected", [0, 1, 2])
def test_ties_go_to_the_lower_position(protected: int) -> None:
    """Unit vectors make cosines of exactly 0 and 1."""
    rng = np.random.default_rng(3)
    metric = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (4, 16))]
    x = rng.standard_normal((4, 16, 5)).astype(np.float32)
    size = np.ones((4, 16, 1), np.float32)
    merged, sizes = run("MergeTokens", x, metric, size, 5, protected=protected)
    expected, expected_sizes = merging.tome(x, metric, size, 5, protected)
    np.testing.assert_array_equal(sizes, expected_sizes)
    np.testing.assert_allclose(merged, expected, atol=ROUNDING)


def test_merging_none_only_reorders() -> None:
    x = np.arange(14, dtype=np.float32).reshape(1, 7, 2)
    merged, sizes = run("MergeTokens", x, x, np.ones((1, 7, 1), np.float32), 0, protected=1)
    np.testing.assert_array_equal(merged, x[:, [0, 2, 4, 6, 1, 3, 5]])
    np.testing.assert_array_equal(sizes, np.ones((1, 7, 1)))


@pytest.mark.parametrize("name", ["MergeTokens", "MergeTokensMCTF"])
def test_equal_tokens_stay_what_they_are(name: str) -> None:
    x = np.broadcast_to(np.float32([1.5, -2.0, 0.25]), (2, 12, 3)).copy()
    guide = np.ones((2, 12, 1), np.float32)
    merged, sizes = run(name, x, guide, np.ones((2, 12, 1), np.float32), 4, protected=1)
    np.testing.assert_array_equal(merged, x[:, :8])
    np.testing.assert_array_equal(sizes.sum(1), np.full((2, 1), 12))


def test_protected_tokens_stay_in_front_and_take_nothing_in() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 13, 4)).astype(np.float32)
    x[:, 1:4] = x[:, :1]  # as alike as can be
    merged, sizes = run("MergeTokens", x, x, np.ones((2, 13, 1), np.float32), 4, protected=3)
    np.testing.assert_array_equal(merged[:, :3], x[:, :3])
    np.testing.assert_array_equal(sizes[:, :3], 1)


def test_zero_vectors_and_zero_importance_give_no_nan() -> None:
    x = np.zeros((1, 12, 4), np.float32)
    x[:, 6:] = 1
    nothing, one = np.zeros((1, 12, 1), np.float32), np.ones((1, 12, 1), np.float32)
    for name, guide in (("MergeTokens", x), ("MergeTokensMCTF", nothing)):
        merged, sizes = run(name, x, guide, one, 4, protected=0)
        assert np.isfinite(merged).all() and sizes.sum() == 12


@pytest.mark.parametrize("name", ["MergeTokens", "MergeTokensMCTF"])
def test_shapes_are_inferred_and_a_symbolic_count_runs(name: str) -> None:
    fixed = model_of(name, 12, 4, 1, r=[3], protected=1)
    xopt.ir.infer_shapes(fixed)
    assert [str(value.shape) for value in fixed.graph.outputs] == ["[batch,9,4]", "[batch,9,1]"]
    free = model_of(name, "tokens", 4, 1, r=[3], protected=1)
    x = np.random.default_rng(0).standard_normal((2, 14, 4)).astype(np.float32)
    one = np.ones((2, 14, 1), np.float32)
    assert ReferenceSession(free).run({"x": x, "guide": one, "size": one})["merged"].shape == (2, 11, 4)


@pytest.mark.parametrize("name", ["MergeTokens", "MergeTokensMCTF"])
def test_openvino_runs_the_inlined_body(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = model_of(name, 20, 6, 6 if name == "MergeTokens" else 1, r=[6], protected=1)
    InlinePass()(model)
    xopt.ir.save(model, tmp_path / "merge.onnx")
    rng = np.random.default_rng(1)
    feeds = {
        value.name: np.abs(rng.standard_normal((2, *list(value.shape)[1:]))).astype(np.float32)
        for value in model.graph.inputs
    }
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(tmp_path / "merge.onnx", "CPU", exact)(feeds)
    expected = ReferenceSession(model).run(feeds)
    np.testing.assert_allclose(found["merged"], expected["merged"], atol=ROUNDING)
    np.testing.assert_allclose(found["merged_size"], expected["merged_size"], atol=ROUNDING)
