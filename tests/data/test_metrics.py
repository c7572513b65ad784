"""Metrics against numbers worked out by hand or by scipy, and what each does with data it does not suit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from xopt.data import metrics
from xopt.data.dataset import Dataset
from xopt.data.metrics import Batch
from xopt.errors import InputError


def batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The same samples in smaller batches."""
    count = len(next(iter(batch.outputs.values())))
    per_label = 1 if batch.labels is None else count // len(batch.labels)

    def rows(arrays: metrics.Outputs | None, start: int) -> dict[str, np.ndarray]:
        return {name: array[start : start + size] for name, array in (arrays or {}).items()}

    for start in range(0, count, size):
        labels = batch.labels
        part = None if labels is None else labels[start // per_label : (start + size) // per_label]
        yield Batch(rows(batch.inputs, start), rows(batch.outputs, start), part, rows(batch.original, start))


def test_top_1_counts_hits() -> None:
    logits = np.array([[1, 2, 0], [5, 0, 0], [0, 0, 9], [1, 0, 0]], np.float32)
    batch = Batch({}, {"logits": logits}, np.array([1, 0, 0, 0]))
    assert metrics.get("top-1").score([batch]) == 0.75
    assert metrics.get("top-1").score(batches(batch, 3)) == 0.75


def test_spearman_of_pairs_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((40, 8)).astype(np.float32)
    grades = generator.standard_normal(20)
    a, b = vectors[0::2].astype(np.float64), vectors[1::2].astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    batch = Batch({}, {"embedding": vectors}, grades)
    assert metrics.get("spearman").score(batches(batch, 8)) == pytest.approx(spearmanr(cosines, grades).statistic)


def test_spearman_averages_the_tokens_that_the_mask_keeps() -> None:
    tokens = np.zeros((4, 3, 2), np.float32)
    tokens[:, 0] = [[1, 0], [1, 0], [1, 0], [0, 1]]
    tokens[:, 2] = [9, -9]  # padding
    mask = np.array([[1, 1, 0]] * 4)
    batch = Batch({"attention_mask": mask}, {"last_hidden_state": tokens}, np.array([5.0, 1.0]))
    assert metrics.get("spearman").score([batch]) == pytest.approx(1.0)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    ids = np.array([[3, 1, 4, 1, 5]])
    batch = Batch({"input_ids": ids}, {"logits": np.zeros((1, 5, 7), np.float32)})
    assert metrics.get("perplexity").score([batch]) == pytest.approx(7.0)


def test_perplexity_leaves_out_ignored_and_masked_tokens() -> None:
    logits = np.zeros((1, 4, 5), np.float32)
    logits[0, 0, 2] = 3.0  # the only prediction that counts
    labels = np.array([[0, 2, -100, 1]])
    mask = np.array([[1, 1, 1, 0]])
    expected = (4 + math.exp(3)) / math.exp(3)
    batch = Batch({"attention_mask": mask}, {"logits": logits}, labels)
    assert metrics.get("perplexity").score([batch]) == pytest.approx(expected)


def test_drop_of_perplexity_is_its_relative_rise() -> None:
    metric = metrics.get("perplexity")
    assert not metric.higher_is_better
    assert metric.drop(100.0, 101.0) == pytest.approx(0.01, abs=1e-4)
    assert metric.drop(100.0, 99.0) < 0


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_fidelity_of_the_original_to_itself_is_one(seed: int, size: int) -> None:
    outputs = {"y": np.random.default_rng(seed).standard_normal((5, 4)).astype(np.float32)}
    for name in ("cosine", "agreement"):
        assert metrics.get(name).score(batches(Batch({}, outputs, None, outputs), size)) == 1.0


def test_cosine_is_that_of_the_worst_output() -> None:
    original = {"a": np.array([[1.0, 0.0]]), "b": np.array([[1.0, 0.0]])}
    now = {"a": np.array([[2.0, 0.0]]), "b": np.array([[1.0, 1.0]])}
    assert metrics.get("cosine").score([Batch({}, now, None, original)]) == pytest.approx(math.sqrt(0.5))


def test_agreement_counts_equal_winners_of_tokens() -> None:
    original = {"y": np.eye(4)[None, [0, 1, 2, 3]]}
    now = {"y": np.eye(4)[None, [0, 1, 3, 3]]}
    assert metrics.get("agreement").score([Batch({}, now, None, original)]) == 0.75


def test_the_callers_function_sees_all_samples_at_once(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def total(outputs, labels): return outputs['y'].sum() + labels.sum()\n")
    metric = metrics.get(f"{tmp_path / 'm.py'}:total")
    batch = Batch({}, {"y": np.arange(6.0)}, np.arange(6))
    assert metric.score(batches(batch, 4)) == 30.0


def test_a_failing_function_is_named() -> None:
    def broken(outputs: object, labels: object) -> float:
        raise KeyError("logits")

    with pytest.raises(InputError, match=r"logits.*broken"):
        metrics.get(broken).score([Batch({}, {"y": np.zeros(2)})])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, "cosine"),
        (np.arange(4), "top-1"),
        (np.arange(2.0), "spearman"),
        (np.zeros((4, 6), np.int64), "perplexity"),
    ],
)
def test_the_labels_suggest_the_metric(labels: np.ndarray | None, expected: str) -> None:
    assert metrics.default_for(Dataset({"x": np.zeros((4, 6))}, labels)).name == expected


LOGITS = {"y": np.zeros((2, 3, 5), np.float32)}


@pytest.mark.parametrize(
    ("metric", "batch", "says"),
    [
        ("top-1", Batch({}, {"y": np.zeros((2, 3))}, np.zeros((2, 3))), "one label for a sample, got 6 for 2"),
        ("spearman", Batch({"attention_mask": np.ones((2, 4))}, LOGITS, np.ones(1)), "does not fit"),
        ("perplexity", Batch({}, LOGITS, np.zeros((2, 2), np.int64)), "no labels of tokens"),
        ("perplexity", Batch({}, LOGITS, np.zeros(2, np.int64)), "no labels of tokens"),
        ("perplexity", Batch({}, LOGITS, np.zeros((2, 3))), "no labels of tokens"),
        ("perplexity", Batch({}, LOGITS, np.full((2, 3), 5)), "from 5 to 5, the model knows 5 tokens"),
        ("perplexity", Batch({}, LOGITS, np.full((2, 3), -1)), "from -1 to -1, the model knows 5 tokens"),
        ("agreement", Batch({}, LOGITS, None, {"y": np.zeros((2, 4, 5))}), "6 predictions, the original has 8"),
    ],
)
def test_labels_and_outputs_that_do_not_fit(metric: str, batch: Batch, says: str) -> None:
    with pytest.raises(InputError, match=says):
        metrics.get(metric).score([batch])


def test_an_output_may_be_one_number() -> None:
    number = {"loss": np.array(3.0, np.float32)}
    assert metrics.get("cosine").score([Batch({}, number, None, number)] * 2) == 1.0
    assert metrics.get(lambda outputs, _: outputs["loss"].sum()).score([Batch({}, number)] * 2) == 6.0


def test_an_output_may_be_empty() -> None:
    outputs = {"y": np.ones((2, 3)), "none": np.ones((0, 3))}
    assert metrics.get("cosine").score([Batch({}, outputs, None, outputs)]) == 1.0


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    logits = np.zeros((1, 2, 3), np.float32)
    logits[..., 0] = 1e4
    assert metrics.get("perplexity").score([Batch({}, {"y": logits}, np.ones((1, 2), np.int64))]) == math.inf


def test_what_does_not_suit_is_an_input_error() -> None:
    no_labels = Batch({}, {"logits": np.zeros((2, 3))})
    for name in ("top-1", "spearman"):
        with pytest.raises(InputError, match="no labels"):
            metrics.get(name).score([no_labels])
    with pytest.raises(InputError, match="output of rank 3"):
        metrics.get("perplexity").score([no_labels])
    with pytest.raises(InputError, match="unknown metric"):
        metrics.get("accuracy")
