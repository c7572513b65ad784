"""The budget search and the rearrangement, against brute force."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xopt.passes.prune_heads.allocation import GRID, allocate, bundles, mac_costs, uniform
from xopt.passes.prune_heads.rearrange import joint_loss, rearrange
from xopt.passes.prune_heads.sites import Site


def site(units: int, macs: int, step: int = 1, *, heads: bool = True) -> Site:
    return cast(Site, SimpleNamespace(units=units, macs=macs, step=step, heads=heads))


def cost_of(sites: list[Site], counts: list[int]) -> int:
    return sum(one.macs * count for one, count in zip(sites, counts))


def worth_of(importance: list[np.ndarray], counts: list[int]) -> float:
    return sum(float(np.sort(scores)[::-1][:count].sum()) for scores, count in zip(importance, counts))


def brute_force(sites: list[Site], importance: list[np.ndarray], budget: float) -> float:
    best = -1.0
    choices = [np.cumsum(bundles(one, scores)[0]) for one, scores in zip(sites, importance)]
    for counts in itertools.product(*choices):
        if cost_of(sites, list(counts)) <= budget:
            best = max(best, worth_of(importance, list(counts)))
    return best


def problem(seed: int, macs: list[int], steps: list[int], units: int = 6) -> tuple[list[Site], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    sites = [site(units, cost, step, heads=step == 1) for cost, step in zip(macs, steps)]
    return sites, [random.exponential(size=units) * random.exponential() for _ in sites]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.3, 1.0))
def test_heads_and_neurons_get_the_best_split_there_is(seed: int, keep: float) -> None:
    sites, importance = problem(seed, [70, 3, 70, 3], [1, 2, 1, 2])
    counts = allocate(sites, importance, keep)
    budget = keep * cost_of(sites, [6] * 4)
    assert cost_of(sites, counts) <= budget + 1e-9
    assert worth_of(importance, counts) == pytest.approx(brute_force(sites, importance, budget))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.4, 1.0))
def test_many_costs_get_the_best_split_on_the_grid(seed: int, keep: float) -> None:
    sites, importance = problem(seed, [70, 3, 41, 8], [1, 4, 1, 2])
    counts = allocate(sites, importance, keep)
    budget = keep * cost_of(sites, [6] * 4)
    assert cost_of(sites, counts) <= budget + 1e-9
    # Each site's cost is rounded up by one step of the grid at most.
    assert worth_of(importance, counts) >= brute_force(sites, importance, budget * (1 - len(sites) / GRID)) - 1e-9


def test_heads_alone_get_as_many_as_fit() -> None:
    sites, importance = problem(3, [10, 10], [1, 1])
    assert sum(allocate(sites, importance, 0.5)) == 6


def test_every_site_keeps_one_bundle_when_the_budget_is_too_small() -> None:
    sites, importance = problem(4, [10, 1], [1, 4])
    assert allocate(sites, importance, 0.05) == [1, 4]


def test_the_last_bundle_takes_what_is_left_of_a_width() -> None:
    sizes, values = bundles(site(10, 1, 4), np.arange(10.0))
    assert sizes.tolist() == [4, 4, 2]
    assert values.tolist() == [9 + 8 + 7 + 6, 5 + 4 + 3 + 2, 1 + 0]
    assert mac_costs(site(10, 7, 4), sizes).tolist() == [0, 28, 56, 70]


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6, 0.5])
def test_uniform_stays_within_the_budget(keep: float) -> None:
    sites = [site(12, 57, 1), site(1536, 1, 8, heads=False)] * 3
    counts = uniform(sites, keep)
    whole = cost_of(sites, [12, 1536] * 3)
    assert counts[0] == int(keep * 12 + 0.5)
    assert counts[:2] * 3 == counts
    assert keep * whole - 3 * 8 <= cost_of(sites, counts) <= keep * whole


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), units=st.integers(2, 12), data=st.data())
def test_rearrangement_never_increases_the_joint_loss(seed: int, units: int, data: Any) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(20, 3)) @ random.normal(size=(3, units)) + 0.3 * random.normal(size=(20, units))
    count = data.draw(st.integers(1, units - 1))
    removed = np.argsort(np.square(rows).sum(0), kind="stable")[:count]
    swapped = rearrange(rows, removed)
    assert len(swapped) == len(set(swapped)) == count
    assert joint_loss(rows, swapped) <= joint_loss(rows, removed) * (1 + 1e-9)


def test_rearrangement_removes_units_that_cancel() -> None:
    gate = np.random.default_rng(0).normal(size=(50, 1))
    rows = np.c_[gate, 1.01 * gate, -1.01 * gate, 3 * gate]
    assert rearrange(rows, np.array([0, 1])).tolist() == [1, 2]
