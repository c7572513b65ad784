"""How many units each site keeps: the exact optimum of the sum of their importance under a budget.

Units of a site are taken in the order of their importance, ``step`` at a time, so each bundle is worth no more than the
one before it, and a site's choice is a number of bundles. With two costs (a head, a tile of neurons) the optimum is
found by trying every number of heads and filling up with neurons, as Kwon et al. (2022) do; with more costs, or with
measured latency, by dynamic programming over sites on a fine grid of the budget. Every site keeps one bundle at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from xopt.passes.prune_heads.sites import Site

Array = npt.NDArray[np.float64]
#: Cost of keeping each possible number of bundles of a site, 0 to all: [bundles + 1].
Costs = Array

GRID = 4096
"""Steps of the budget in the dynamic program; costs are rounded up to them."""


def bundles(site: Site, importance: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Sizes and worth of a site's bundles, best first; the last takes what does not fill a ``step``."""
    ranked = np.sort(importance)[::-1]
    starts = np.arange(0, site.units, site.step)
    sizes = np.diff(np.append(starts, site.units))
    return sizes, np.add.reduceat(ranked, starts)


def mac_costs(site: Site, sizes: npt.NDArray[np.int64]) -> Costs:
    """Multiply-accumulates of keeping 0, 1, … bundles."""
    return np.concatenate([[0.0], np.cumsum(sizes) * float(site.macs)])


def allocate(
    sites: Sequence[Site],
    importance: Sequence[Array],
    keep: float,
    costs: Callable[[Site, npt.NDArray[np.int64]], Costs] = mac_costs,
) -> list[int]:
    """Units that each site keeps for the most importance at ``keep`` of the cost of all.

    Args:
        sites: where units may go.
        importance: of each unit of each site, >= 0.
        keep: share of the cost, 0 to 1. Where it does not pay for one bundle a site, that is kept nevertheless.
        costs: cost of keeping 0, 1, … bundles of the given sizes.
    """
    found = [bundles(site, scores) for site, scores in zip(sites, importance)]
    tables = [costs(site, sizes) for site, (sizes, _) in zip(sites, found)]
    budget = keep * sum(float(table[-1]) for table in tables)
    worth = [values for _, values in found]
    steps = [np.diff(table) for table in tables]
    classes = np.unique(np.concatenate(steps))
    if len(classes) <= 2 and all(len(np.unique(step)) == 1 for step in steps):
        counts = _by_enumeration([float(step[0]) for step in steps], worth, budget)
    else:
        counts = _by_grid(tables, worth, budget)
    return [int(sizes[:count].sum()) for (sizes, _), count in zip(found, counts)]


def uniform(sites: Sequence[Site], keep: float) -> list[int]:
    """The same share of heads in every attention, and of neurons in every FFN, within ``keep`` of all MACs.

    The nearest number of heads is kept where neurons can make up for it, otherwise the next below.
    """
    budget = keep * sum(site.macs * site.units for site in sites)
    neurons = [site for site in sites if not site.heads]
    rounding = 0.5 if neurons else 0.0
    heads = [max(int(keep * site.units + rounding), 1) if site.heads else 0 for site in sites]
    left = budget - sum(site.macs * count for site, count in zip(sites, heads))
    share = left / sum(site.macs * site.units for site in neurons) if neurons else 0.0
    return [count if site.heads else _share_of(site, share) for site, count in zip(sites, heads)]


def _share_of(site: Site, share: float) -> int:
    """The multiple of ``step`` next below this share of the units, at least one; all of them from 1 on."""
    return site.units if share >= 1 else max(int(share * site.units) // site.step, 1) * site.step


def _by_enumeration(costs: Sequence[float], worth: Sequence[Array], budget: float) -> list[int]:
    """Exact for bundles of at most two costs: every number of the dearer, filled up with the cheaper."""
    dear = max(costs)
    ranked = {}
    for expensive in (True, False):
        pool = [
            (-value, site)
            for site, values in enumerate(worth)
            if (costs[site] == dear) is expensive
            for value in values[1:]
        ]
        pool.sort()
        ranked[expensive] = pool
    cheap = min(costs)
    spare = budget - sum(costs)
    gains = {key: np.concatenate([[0.0], np.cumsum([-value for value, _ in pool])]) for key, pool in ranked.items()}
    best, chosen = -1.0, (0, 0)
    for many in range(len(ranked[True]) + 1):
        rest = spare - many * dear
        if rest < 0:
            break
        few = min(int(rest // cheap), len(ranked[False]))
        gain = float(gains[True][many] + gains[False][few])
        if gain > best:
            best, chosen = gain, (many, few)
    counts = [1] * len(costs)
    for pool, count in zip((ranked[True], ranked[False]), chosen):
        for _, site in pool[:count]:
            counts[site] += 1
    return counts


def _by_grid(tables: Sequence[Costs], worth: Sequence[Array], budget: float) -> list[int]:
    """Multiple-choice knapsack by dynamic programming: exact for costs rounded up to ``budget / GRID``."""
    unit = budget / GRID
    value = np.zeros(GRID + 1)
    choices = []
    for table, values in zip(tables, worth):
        gains = np.cumsum(values)
        spans = np.ceil(np.asarray(table[1:]) / unit - 1e-9).astype(np.int64)
        best = np.full(GRID + 1, -np.inf)
        choice = np.ones(GRID + 1, np.int64)
        for count, (span, gain) in enumerate(zip(spans, gains), start=1):
            if span > GRID:
                break
            offer = np.full(GRID + 1, -np.inf)
            offer[span:] = value[: GRID + 1 - span] + gain
            better = offer > best
            best[better], choice[better] = offer[better], count
        value = best
        choices.append((spans, choice))
    if not np.isfinite(value[GRID]):
        return [1] * len(tables)
    left, counts = GRID, []
    for spans, choice in reversed(choices):
        counts.append(int(choice[left]))
        left -= int(spans[counts[-1] - 1])
    return counts[::-1]
