"""The evaluator: batches, labels beside their samples, the original's outputs within a limit of memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.net import Net
from xopt.data import metrics
from xopt.data.dataset import Dataset
from xopt.measure import accuracy
from xopt.measure.accuracy import Evaluator
from xopt.runtime.reference import ReferenceSession


class Scale:
    """A model that multiplies by a factor, and counts its runs."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.sizes: list[int] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(feeds["x"]))
        return {"y": (feeds["x"] * self.factor).astype(np.float32)}


def data(count: int, classes: int = 4) -> Dataset:
    rows = np.random.default_rng(0).standard_normal((count, classes)).astype(np.float32)
    return Dataset({"x": rows}, rows.argmax(1))


@pytest.mark.parametrize("batch", [1, 7, 32, 1000])
def test_batches_do_not_change_the_number(batch: int) -> None:
    evaluator = Evaluator(metrics.get("top-1"), data(50), Scale(1.0), batch)
    assert evaluator.baseline() == 1.0
    assert evaluator.evaluate(Scale(2.0)) == 1.0
    assert evaluator.evaluate(Scale(-1.0)) == 0.0
    assert evaluator.samples == 50


def test_pairs_stay_in_one_batch() -> None:
    pairs = Dataset({"x": np.random.default_rng(0).standard_normal((20, 4))}, np.arange(10.0))
    runner = Scale(1.0)
    Evaluator(metrics.get("spearman"), pairs, runner, 7).evaluate(runner)
    assert all(size % 2 == 0 for size in runner.sizes)


def test_the_original_runs_once_for_a_metric_that_compares() -> None:
    original = Scale(1.0)
    evaluator = Evaluator(metrics.get("cosine"), data(64), original, 32)
    assert evaluator.baseline() == 1.0
    runs = len(original.sizes)
    assert evaluator.evaluate(Scale(3.0)) == pytest.approx(1.0)
    assert evaluator.evaluate(Scale(-3.0)) == pytest.approx(-1.0)
    assert len(original.sizes) == runs


def test_outputs_of_the_original_are_kept_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "KEPT_BYTES", 600)
    evaluator = Evaluator(metrics.get("cosine"), data(1000), Scale(1.0), 32)
    evaluator.baseline()
    assert evaluator.samples == 64  # 32 rows of 4 float32 are 512 bytes: the second batch goes over 600
    assert evaluator.evaluate(Scale(1.0)) == 1.0


def test_a_quality_that_is_no_number_loses_everything() -> None:
    evaluator = Evaluator(metrics.get("cosine"), data(8), Scale(1.0))
    baseline = evaluator.baseline()
    assert evaluator.drop(baseline, evaluator.evaluate(Scale(float("nan")))) == float("inf")


def fixed(batch: int, axis: int = 0) -> ir.Model:
    """Logits of a sample, for a fixed batch on some axis."""
    shape = [2, 2]
    shape[axis] = batch
    net = Net("fixed")
    net.output(net.op("Softmax", net.input("x", shape), axis=1 - axis), "logits")
    return net.build()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_fixed_batch_changes_no_metric(batch: int, axis: int) -> None:
    """Ten samples, which neither 3 nor 4 divides; the pad is not counted, and samples come first for the metric."""
    model = fixed(batch, axis)
    x = np.random.default_rng(0).standard_normal((10, 2)).astype(np.float32)
    samples = Dataset({"x": x if axis == 0 else x.T}, x.argmax(1)).matched(model)
    evaluator = Evaluator(metrics.get("top-1"), samples, ReferenceSession(model))
    assert evaluator.baseline() == 1.0
    assert evaluator.samples == 10
    wrong = Dataset(samples.inputs, 1 - x.argmax(1)).matched(model)
    assert Evaluator(metrics.get("top-1"), wrong, ReferenceSession(model)).baseline() == 0.0
