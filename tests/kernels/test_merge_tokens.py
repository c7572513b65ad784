"""The kernel of ``xopt::MergeTokens`` against the operator's body in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xopt.ir
from tests.ir import builders
from tests.ir.test_merge_tokens import model_of, run
from xopt import targets
from xopt.errors import InputError
from xopt.kernels import merge_tokens
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa
from xopt.passes.merge_tokens import MergeTokens
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets.lowering import lower

ISAS = (AVX512, AVX2, NEON)
WIDTHS = [(32, 16), (37, 7), (5, 33), (1, 64)]
ROUNDING = 3e-5
"""Weighted means of at most a few dozen tokens of magnitude below 5, in float32 and in another order of addition."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def tokens(batch: int, n: int, widths: tuple[int, int], seed: int) -> Arrays:
    """Random x, metric and sizes."""
    rng = np.random.default_rng(seed)
    x, metric = (rng.standard_normal((batch, n, width), dtype=np.float32) for width in widths)
    return x, metric, rng.integers(1, 9, (batch, n, 1)).astype(np.float32)


def merge(
    compiled: Any, isa: Isa, inputs: Arrays, r: int, protected: int = 0, config: merge_tokens.Config | None = None
) -> list[np.ndarray]:
    x, metric, _ = inputs
    batch, n, width = x.shape
    workload = merge_tokens.Workload(None, None, None, width, metric.shape[2], protected)
    kernel = compiled(merge_tokens, workload, isa, config)
    return list(kernel(*inputs, out=[(batch, n - r, width), (batch, n - r, 1)]))


def expect_body(inputs: Arrays, r: int, protected: int, *found: list[np.ndarray]) -> None:
    merged, sizes = run("MergeTokens", *inputs, r, protected=protected)
    for ours, our_sizes in found:
        np.testing.assert_array_equal(our_sizes, sizes)
        np.testing.assert_allclose(ours, merged, atol=ROUNDING)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_equals_the_body(compiled: Any, widths: tuple[int, int]) -> None:
    for seed, (batch, n, r) in enumerate(((1, 17, 5), (3, 50, 12), (2, 81, 40), (2, 4, 0), (1, 5, 3))):
        inputs = tokens(batch, n, widths, seed)
        expect_body(inputs, r, 0, *(merge(compiled, isa, inputs, r) for isa in ISAS))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 70), st.data())
def test_any_count_of_tokens_and_protected_ones(compiled: Any, n: int, data: st.DataObject) -> None:
    """Also r so large that protected tokens go: the kernel does what the body does."""
    protected = data.draw(st.integers(0, 3), "protected")
    r = data.draw(st.integers(0, (n + 1) // 2), "r")
    inputs = tokens(2, n, (6, 5), data.draw(st.integers(0, 2**32), "seed"))
    expect_body(inputs, r, protected, merge(compiled, AVX2, inputs, r, protected))


@pytest.mark.parametrize("protected", [0, 1, 2])
def test_ties_go_to_the_lower_position(compiled: Any, protected: int) -> None:
    """Unit vectors make cosines of exactly 0 and 1; equal tokens make all of them equal."""
    x, metric, size = tokens(4, 37, (5, 3), protected)
    metric = np.eye(3, dtype=np.float32)[np.abs(metric).argmax(-1)]
    for guide in (metric, np.ones_like(metric), np.zeros_like(metric)):
        inputs = (x, guide, size)
        expect_body(inputs, 6, protected, *(merge(compiled, isa, inputs, 6, protected) for isa in ISAS))


def test_every_config_gives_the_same(compiled: Any) -> None:
    inputs = tokens(2, 75, (8, 12), 0)
    workload = merge_tokens.Workload(None, None, None, 8, 12, 1)
    for isa in (AVX512, NEON):
        found = [merge(compiled, isa, inputs, 20, 1, config) for config in merge_tokens.space(workload, isa)]
        expect_body(inputs, 20, 1, *found)


def test_static_shapes_need_no_symbols(compiled: Any) -> None:
    inputs = tokens(2, 21, (6, 5), 0)
    kernel = compiled(merge_tokens, merge_tokens.Workload(2, 21, 15, 6, 5, 1), AVX2)
    expect_body(inputs, 6, 1, kernel(*inputs, out=[(2, 15, 6), (2, 15, 1)]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_move_no_token_out_of_range(compiled: Any, bad: float) -> None:
    """The sizes still add up, and tokens whose own values are finite stay so."""
    for places in (slice(None), slice(3, 9), slice(0, None, 2)):
        x, metric, size = tokens(2, 23, (6, 5), 1)
        metric[:, places] = bad
        merged, sizes = merge(compiled, AVX512, (x, metric, size), 8, 1)
        assert np.isfinite(merged).all()
        np.testing.assert_array_equal(sizes.sum(1), size.sum(1))


def merged_vit() -> ir.Model:
    """The shape of the digits example: 8 x 8 pixels, patches of 2, a class token; two merges."""
    model = builders.vit(layers=2, width=32, heads=2, image=8, patch=2, channels=1)
    PassManager([MergeTokens(ratio=0.3)]).run(model, PassContext())
    return model


def test_a_merged_model_runs_on_one_kernel(tmp_path: Path) -> None:
    model = merged_vit()
    module = lower(model, targets.get("cpu")).module
    assert sum(name.name_hint.startswith("merge_tokens_") for name in module.get_global_vars()) == 1
    assert module["main"].script().count("merge_tokens_") >= 2
    assert "topk" not in module["main"].script()
    session, reference = Session.load(targets.compile(model, "cpu", tmp_path / "model.so")), ReferenceSession(model)
    for batch in (1, 5):
        feeds = builders.feeds(model, {"batch": batch}, seed=batch)
        for name, expected in reference.run(feeds).items():
            # Two layers of float32 sums in another order; values are of order 1 behind the last norm.
            np.testing.assert_allclose(session.run(feeds)[name], expected, rtol=1e-4, atol=1e-5)


def test_symbolic_count_of_tokens(tmp_path: Path) -> None:
    model = model_of("MergeTokens", "tokens", 6, 5, r=[4], protected=1)
    xopt.ir.infer_shapes(model)
    session = Session.load(targets.compile(model, "cpu", tmp_path / "model.so"))
    for n in (12, 31):
        inputs = tokens(3, n, (6, 5), n)
        found = session.run(dict(zip(("x", "guide", "size"), inputs)))
        expect_body(inputs, 4, 1, [found["merged"], found["merged_size"]])


def test_more_merges_than_tokens_are_refused() -> None:
    model = model_of("MergeTokens", 9, 6, 5, r=[6])
    with pytest.raises(InputError, match="6 of 9 tokens") as caught:
        lower(model, targets.get("cpu"))
    assert caught.value.code == "E-UNSUPPORTED-OP"


def test_a_target_without_templates_takes_the_body() -> None:
    assert "topk" in lower(merged_vit(), targets.get("cuda")).module["main"].script()
