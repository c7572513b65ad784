from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xopt.errors import InternalError
from xopt.recover.ridge import Moments


def problem(seed: int, rows: int = 60, inputs: int = 8, outputs: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, inputs)) @ random.normal(size=(inputs, inputs)) + random.normal(size=inputs)
    return x, x @ random.normal(size=(inputs, outputs)) + random.normal(size=outputs)


def moments(x: np.ndarray, y: np.ndarray, *, intercept: bool = True) -> Moments:
    found = Moments(x.shape[1], y.shape[1], intercept=intercept)
    for part in np.array_split(np.arange(len(x)), 3):
        found.add(x[part], y[part])
    return found


@pytest.mark.parametrize("intercept", [True, False])
def test_small_penalty_is_least_squares_on_the_kept_inputs(intercept: bool) -> None:
    x, y = problem(0)
    keep = np.array([0, 2, 3, 7])
    found = moments(x, y, intercept=intercept).solve(keep, 1e-12)
    design = np.c_[x[:, keep], np.ones(len(x))] if intercept else x[:, keep]
    wanted = np.linalg.lstsq(design, y, rcond=None)[0]
    # float64 normal equations square the condition number (some 1e3 here).
    np.testing.assert_allclose(found.weight, wanted[:4], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.bias, wanted[4] if intercept else np.zeros(5), rtol=1e-6, atol=1e-8)


def test_all_inputs_give_the_layer_back() -> None:
    x, _ = problem(1)
    weight, bias = np.arange(24.0).reshape(8, 3), np.array([1.0, -2.0, 3.0])
    found = moments(x, x @ weight + bias).solve(np.arange(8), 1e-12)
    np.testing.assert_allclose(found.weight, weight, atol=1e-6)
    np.testing.assert_allclose(found.bias, bias, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), kept=st.integers(1, 8), ridge=st.sampled_from([1e-6, 1e-3, 0.03, 1.0]))
def test_error_is_the_mean_square_of_the_residual(seed: int, kept: int, ridge: float) -> None:
    x, y = problem(seed)
    keep = np.sort(np.random.default_rng(seed).permutation(8)[:kept])
    sums = moments(x, y)
    found = sums.solve(keep, ridge)
    residual = x[:, keep] @ found.weight + found.bias - y
    assert sums.error(keep, found) == pytest.approx(np.square(residual).sum(axis=1).mean(), rel=1e-6, abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_solution_is_a_minimum(seed: int) -> None:
    x, y = problem(seed)
    keep, sums, ridge = np.array([1, 4, 5]), moments(x, y), 0.03
    found = sums.solve(keep, ridge)

    def loss(weight: np.ndarray) -> float:
        residual = (x - x.mean(0))[:, keep] @ weight - (y - y.mean(0))
        return float(np.square(residual).sum() + sums.penalty(ridge) * np.square(weight).sum())

    step = np.random.default_rng(seed + 1).normal(size=found.weight.shape) * 1e-2
    assert loss(found.weight) <= min(loss(found.weight + step), loss(found.weight - step))


def test_precision_inverts_the_penalized_gram_matrix() -> None:
    x, y = problem(2)
    sums = moments(x, y)
    product = sums.precision(0.1) @ (sums.gram + sums.penalty(0.1) * np.eye(8))
    np.testing.assert_allclose(product, np.eye(8), atol=1e-9)


def test_freedom_counts_the_inputs_that_vary() -> None:
    x, y = problem(3)
    x[:, 5:] = 0
    sums = moments(x, y)
    assert sums.freedom(sums.precision(1e-9), 1e-9) == pytest.approx(5, abs=1e-3)
    assert sums.freedom(sums.precision(1e6), 1e6) == pytest.approx(0, abs=1e-3)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    found = moments(np.zeros((10, 4)), np.ones((10, 2))).solve(np.arange(4), 0.03)
    np.testing.assert_allclose(found.weight, 0)
    np.testing.assert_allclose(found.bias, 1)


def test_no_rows_is_our_own_fault() -> None:
    with pytest.raises(InternalError):
        Moments(2, 2).solve(np.arange(2), 0.1)
