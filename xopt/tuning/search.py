"""The fastest configuration of one kernel, by measurement against the heuristic's.

    1. batches of candidates       built side by side, then timed one by one, each in turns with the heuristic's
       first half of the trials    as different as possible from all that was tried
       second half                 neighbours of the best
    2. the best few again          with more turns
    3. the best of those           against the heuristic's once more: it has to win clearly, to compute the same, and
                                   not to lose at a larger batch, or at a few rows, where the kernel serves any

A candidate that fails to build, crashes, hangs or computes something else is out. Times come as pairs taken within
milliseconds, so that a slow minute of the machine hits both sides; those that something else disturbed do not count.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xopt.targets.database import apart, family_of
from xopt.tuning.pool import CandidateError, Pool, Worker
from xopt.tuning.sites import Array, Site

ROUNDS = (5, 15, 41)
"""Pairs of turns of a first look, of a second look at the best few, and of the last word."""
SEEN_AGAIN = 4
FINALISTS = 2
WINNING = 0.99
"""Share of the heuristic's time that a winner may take; three quarters of the pairs must show it faster."""
ELSEWHERE = 1.02
"""The same on other shapes, on which nothing was tuned."""
TOLERANCE = {"float32": 1e-4, "uint16": 2e-2, "uint8": 1e-2}
"""Difference to the heuristic's results, relative to the largest: another order of sums, or a last bit of bfloat16."""

Constants = Callable[[Any], Mapping[int, Array]]


@dataclass(frozen=True)
class Limits:
    """Bounds of a search.

    Attributes:
        trials: candidates, besides the heuristic's.
        seconds: for a candidate to be built, or to be timed.
        deadline: by `time.monotonic`, when no further candidate is taken; the best so far is still confirmed.
    """

    trials: int
    seconds: float
    deadline: float

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Found:
    """The winner, or the heuristic's configuration where nothing has beaten it; seconds of one call with each."""

    config: Any
    seconds: float
    heuristic: Any
    heuristic_seconds: float
    trials: int
    failures: dict[Any, str]


@dataclass
class Search:
    """The search for one kernel.

    Args:
        site: the kernel.
        others: the same on a larger batch, and on few rows, where it takes others.
        constants: packs the weights for a configuration.
        isa: instruction set.
        pool: worker processes.
        limits: when to stop.
        progress: called with the gain over the heuristic so far, after each trial.
    """

    site: Site
    others: tuple[Site, ...]
    constants: Constants
    isa: Any
    pool: Pool
    limits: Limits
    progress: Callable[[float], None]
    ratios: dict[Any, float] = field(default_factory=dict)
    failures: dict[Any, str] = field(default_factory=dict)
    homes: dict[Any, Worker] = field(default_factory=dict)
    baseline: list[float] = field(default_factory=list)

    def run(self) -> Found:
        """Search.

        Raises:
            CandidateError: the heuristic's own configuration cannot be measured.
            OutOfTimeError: the time of the run is up.
        """
        family = family_of(self.site.family)
        self.heuristic = family.heuristic(self.site.workload, self.isa)
        first = self.pool.workers[0]
        self._pairs(first, self.site, self.heuristic, ROUNDS[0])
        for batch in self._batches([c for c in family.space(self.site.workload, self.isa) if c != self.heuristic]):
            self._measure(batch)
        tried = len(self.ratios) + len(self.failures)
        seen_again = self._best(SEEN_AGAIN)
        for config in seen_again:
            self._time(config, ROUNDS[1])
        for config in self._best(FINALISTS, seen_again):
            pairs = self._verdict(config)
            if pairs is not None:
                seconds = float(np.median(pairs[:, 0] * np.median(pairs[:, 1] / pairs[:, 0])))
                return Found(config, seconds, self.heuristic, float(np.median(pairs[:, 0])), tried, self.failures)
        seconds = float(np.median(self.baseline))
        return Found(self.heuristic, seconds, self.heuristic, seconds, tried, self.failures)

    # -- which candidates ------------------------------------------------------------------------------------------
    def _batches(self, rest: list[Any]) -> Iterator[list[Any]]:
        """Candidates in the order in which they should be tried, a few at a time."""
        trials = min(self.limits.trials, len(rest))
        size = 4 * len(self.pool.workers)
        tried = [self.heuristic]
        while rest and len(tried) <= trials and not self.limits.over:
            exploring = 2 * (len(tried) - 1) < trials
            batch: list[Any] = []
            for _ in range(min(size, trials + 1 - len(tried), len(rest))):
                chosen = _farthest(rest, tried) if exploring else _nearest(rest, self._best(3) or tried)
                rest.remove(chosen)
                tried.append(chosen)
                batch.append(chosen)
            yield batch

    def _best(self, count: int, among: Sequence[Any] | None = None) -> list[Any]:
        sound = [config for config in (self.ratios if among is None else among) if config in self.ratios]
        return sorted(sound, key=self.ratios.__getitem__)[:count]

    # -- measuring -------------------------------------------------------------------------------------------------
    def _measure(self, batch: Sequence[Any]) -> None:
        built = self.pool.each(
            batch, lambda config: ("prepare", self.site, config), self.limits.seconds, lambda: self.limits.over
        )
        for config, worker in built.items():
            if self.limits.over and self.ratios:
                return
            if isinstance(worker, Worker):
                self.homes[config] = worker
                self._time(config, ROUNDS[0])
            else:
                self.failures[config] = str(worker)
            self.progress(max([1.0, *(1 / ratio for ratio in self.ratios.values())]))

    def _time(self, config: Any, rounds: int) -> None:
        """Note the time of a candidate, as a share of the heuristic's; one that fails is out."""
        try:
            pairs = self._pairs(self.homes[config], self.site, config, rounds)
            self.ratios[config] = float(np.median(pairs[:, 1] / pairs[:, 0]))
        except CandidateError as error:
            self._out(config, str(error))

    def _pairs(self, worker: Worker, site: Site, config: Any, rounds: int) -> Array:
        """Seconds of a call with the heuristic's configuration and with another, [rounds, 2]."""
        pairs = np.array(worker.ask("compare", site, self.heuristic, config, rounds, seconds=self.limits.seconds))
        if site == self.site:
            self.baseline.extend(pairs[:, 0])
        return pairs

    def _out(self, config: Any, reason: str) -> None:
        self.ratios.pop(config, None)
        self.failures[config] = reason

    def _verdict(self, config: Any) -> Array | None:
        """The pairs of the last comparison when the candidate has won it, else None."""
        worker = self.homes[config]
        try:
            pairs = self._pairs(worker, self.site, config, ROUNDS[2])
            ratios = pairs[:, 1] / pairs[:, 0]
            if np.median(ratios) > WINNING or np.quantile(ratios, 0.75) >= 1:
                return None
            for other in self.others:
                elsewhere = self._pairs(worker, other, config, ROUNDS[1])
                if np.median(elsewhere[:, 1] / elsewhere[:, 0]) > ELSEWHERE:
                    return None
            configs = (self.heuristic, config)
            packed = tuple(self.constants(one) for one in configs)
            difference = worker.ask("difference", self.site, configs, packed, seconds=self.limits.seconds)
        except CandidateError as error:
            self._out(config, str(error))
            return None
        if difference > max(TOLERANCE.get(tensor.dtype, 0.0) for tensor in self.site.outputs):
            self._out(config, f"its results differ by {difference:.2g}")
            return None
        return pairs


def _farthest(rest: Sequence[Any], tried: Sequence[Any]) -> Any:
    return max(rest, key=lambda config: min(_distance(config, other) for other in tried))


def _nearest(rest: Sequence[Any], best: Sequence[Any]) -> Any:
    return min(rest, key=lambda config: min(_distance(config, other) + rank / 2 for rank, other in enumerate(best)))


def _distance(a: Any, b: Any) -> float:
    """Octaves between two configurations, a flag or a name counting as one."""
    fields = zip(dataclasses.astuple(a), dataclasses.astuple(b))
    return sum(min(apart(x, y), 8.0) if isinstance(x, int) and not isinstance(x, bool) else x != y for x, y in fields)
