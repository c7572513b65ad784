"""The search for a configuration: on prescribed times, and with candidates that crash, hang or compute nonsense."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from xopt import targets
from xopt.kernels import gemm
from xopt.targets.base import Target
from xopt.tuning.pool import CandidateError, OutOfTimeError, Pool, Worker
from xopt.tuning.search import Limits, Search
from xopt.tuning.sites import Site, Tensor
from xopt.tuning.worker import Bench

K, N, M = 64, 96, 37
WORKLOAD = gemm.Workload((None,), K, N)


def site(target: Target, rows: int = M) -> Site:
    panel = gemm.heuristic(WORKLOAD, target.isa()).panel(target.isa())
    weight = Tensor((-(-N // panel), K, panel // target.isa().lanes, target.isa().lanes), "float32", constant=True)
    return Site("gemm", WORKLOAD, (Tensor((rows, K), "float32"), weight), (Tensor((rows, N), "float32"),))


@pytest.fixture(scope="module")
def target() -> Target:
    return targets.get("cpu")


def packed(target: Target) -> Callable[[Any], dict[int, np.ndarray]]:
    weight = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)
    return lambda config: {1: gemm.pack_weight(weight, config, target.isa())}


# -- on prescribed times -----------------------------------------------------------------------------------------------
class Scripted(Worker):
    """Answers with the times that a function prescribes."""

    def __init__(self, times: Callable[[Site, Any], float], different: float = 0.0) -> None:
        self.times, self.different, self.asked = times, different, 0

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        if method == "difference":
            return self.different
        kernel, heuristic, config, rounds = arguments
        self.asked += 1
        return [(self.times(kernel, heuristic), self.times(kernel, config))] * rounds


class ScriptedPool(Pool):
    def __init__(self, worker: Scripted) -> None:
        self.workers = [worker]

    def each(
        self, items: Sequence[Any], request: Any, seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> dict[Any, Worker | CandidateError]:
        return dict.fromkeys(items, self.workers[0])


def searched(target: Target, times: Callable[[Site, Any], float], *, larger: bool = False, **options: Any) -> Search:
    limits = Limits(options.pop("trials", 100), 10.0, time.monotonic() + options.pop("time", 60.0))
    pool = ScriptedPool(Scripted(times, **options))
    big = (site(target, 8 * M),) if larger else ()
    return Search(site(target), big, packed(target), target.isa(), pool, limits, lambda gain: None)


def test_the_fastest_wins(target: Target) -> None:
    heuristic = gemm.heuristic(WORKLOAD, target.isa())
    fastest = next(config for config in gemm.space(WORKLOAD, target.isa()) if config != heuristic)
    found = searched(target, lambda _, config: 0.5e-3 if config == fastest else 1e-3).run()
    assert (found.config, found.seconds, found.heuristic_seconds) == (fastest, 0.5e-3, 1e-3)
    assert found.trials == len(set(gemm.space(WORKLOAD, target.isa())) - {heuristic})


def test_the_heuristic_stays_unless_it_is_clearly_beaten(target: Target) -> None:
    heuristic = gemm.heuristic(WORKLOAD, target.isa())
    found = searched(target, lambda _, config: 1e-3 if config == heuristic else 0.995e-3).run()
    assert found.config == heuristic
    assert found.seconds == found.heuristic_seconds


def test_what_loses_at_a_larger_batch_does_not_win(target: Target) -> None:
    heuristic = gemm.heuristic(WORKLOAD, target.isa())

    def times(kernel: Site, config: Any) -> float:
        large = kernel.outputs[0].shape[0] > M
        return 1e-3 if config == heuristic else 2e-3 if large else 0.5e-3

    assert searched(target, times).run().config != heuristic
    assert searched(target, times, larger=True).run().config == heuristic


def test_other_results_do_not_win(target: Target) -> None:
    heuristic = gemm.heuristic(WORKLOAD, target.isa())
    search = searched(target, lambda _, config: 1e-3 if config == heuristic else 0.5e-3, different=0.1)
    found = search.run()
    assert found.config == heuristic
    assert "its results differ by 0.1" in found.failures.values()


@pytest.mark.parametrize("trials", [1, 5, 12])
def test_no_more_trials_than_allowed(target: Target, trials: int) -> None:
    assert searched(target, lambda _, config: 1e-3, trials=trials).run().trials == trials


def test_no_trials_when_time_is_up(target: Target) -> None:
    assert searched(target, lambda _, config: 1e-3, time=0.0).run().trials == 0


def test_few_trials_find_a_valley(target: Target) -> None:
    """The time grows with the distance to one configuration: half of the space suffices to come within 5 %."""
    space = sorted(set(gemm.space(WORKLOAD, target.isa())), key=dataclasses.astuple)
    best = space[len(space) // 2]

    def times(_: Site, config: Any) -> float:
        return 1e-3 * (1 + sum(abs(np.log2(a / b)) for a, b in zip(*map(dataclasses.astuple, (config, best)))))

    assert searched(target, times, trials=len(space) // 2).run().seconds <= 1.05e-3


# -- in real processes -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Crash(gemm.Config):
    """Ends the process that it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


@dataclass(frozen=True)
class Hang(gemm.Config):
    """Keeps the process that it is sent to from answering."""

    def __reduce__(self) -> Any:
        return time.sleep, (1000,)


@dataclass(frozen=True)
class Refuse(gemm.Config):
    """Cannot be built."""

    def __reduce__(self) -> Any:
        return str, ("no configuration",)


@pytest.mark.slow
def test_a_search_survives_its_candidates(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    heuristic = gemm.heuristic(WORKLOAD, target.isa())
    sound = [config for config in gemm.space(WORKLOAD, target.isa()) if config != heuristic][:3]
    bad = {Crash(2, 1): "it crashed", Hang(2, 1): "it took too long", Refuse(2, 1): "AttributeError"}
    monkeypatch.setattr(gemm, "space", lambda workload, isa: [*bad, *sound, heuristic])
    gains: list[float] = []
    with Pool(target, 2, 1) as pool:
        limits = Limits(10, 10.0, time.monotonic() + 1000)
        search = Search(site(target), (site(target, 8 * M),), packed(target), target.isa(), pool, limits, gains.append)
        found = search.run()
    assert len(gains) == found.trials == len(bad) + len(sound)
    for config, reason in bad.items():
        assert found.failures[config].startswith(reason)
    assert set(search.ratios) == set(sound)
    assert found.config in (heuristic, *sound)


def test_the_heuristic_itself_may_fail(target: Target) -> None:
    class Broken(Scripted):
        def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
            raise CandidateError("it crashed")

    search = searched(target, lambda _, config: 1e-3)
    search.pool = ScriptedPool(Broken(lambda _, config: 1e-3))
    with pytest.raises(CandidateError):
        search.run()


def test_the_results_of_two_configurations_are_compared_with_their_own_weights(target: Target) -> None:
    bench = Bench(target, threads=2)
    first, second = gemm.heuristic(WORKLOAD, target.isa()), gemm.Config(3, 1)
    own = packed(target)
    assert bench.difference(site(target), (first, second), (own(first), own(second))) < 1e-5
    wrong = {1: own(second)[1][:, ::-1].copy()}
    assert bench.difference(site(target), (first, second), (own(first), wrong)) > 0.1
    broken = {1: np.full_like(own(second)[1], np.nan)}
    assert bench.difference(site(target), (first, second), (own(first), broken)) == np.inf


def test_pairs_of_times_are_positive(target: Target) -> None:
    pairs = np.array(
        Bench(target, threads=2).compare(site(target), gemm.heuristic(WORKLOAD, target.isa()), gemm.Config(3, 1), 3)
    )
    assert 1 <= len(pairs) <= 3
    assert (pairs > 0).all()


# -- when the time of the run is up ------------------------------------------------------------------------------------
def test_nothing_more_is_asked(target: Target) -> None:
    with Pool(target, 1, 1, until=time.monotonic()) as pool:
        with pytest.raises(OutOfTimeError):
            pool.workers[0].ask("forget", seconds=600)
        assert pool.each([1, 2], lambda item: ("forget",), 600, lambda: True) == {}


def test_what_is_in_work_is_cut_off(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a process that starts: it may take two minutes otherwise, and imports for longer than this."""
    monkeypatch.setattr("xopt.tuning.pool.GRACE_SECONDS", 0.0)
    with Pool(target, 1, 1, until=time.monotonic() + 0.05) as pool, pytest.raises(OutOfTimeError):
        pool.workers[0].ask("forget", seconds=600)
