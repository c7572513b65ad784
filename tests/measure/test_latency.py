"""Latency in turns: who runs when, how often, and what is kept; no claim about how long anything takes."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import pytest

from xopt.measure import latency
from xopt.measure.latency import Latency, interleaved, pinned

FEEDS = {"x": np.zeros(1, np.float32)}


class Recorder:
    """Runners that write down their calls."""

    def __init__(self, *names: str) -> None:
        self.calls: list[str] = []
        self.runners = {name: self._runner(name) for name in names}

    def _runner(self, name: str) -> latency.Runner:
        def run(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            assert feeds is FEEDS
            self.calls.append(name)
            return {}

        return run


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PAUSE_S", 0.0)
    monkeypatch.setattr(latency, "TURN_MS", 1e-6)  # one timed call a turn
    monkeypatch.setattr(latency, "waited", lambda: 0.0)  # whatever else this machine does


def test_every_runner_gives_a_sample_in_every_round() -> None:
    record = Recorder("a", "b", "c")
    times = interleaved(record.runners, FEEDS, rounds=8)
    assert {name: len(t.samples_ms) for name, t in times.items()} == {"a": 8, "b": 8, "c": 8}
    assert all(sample > 0 for t in times.values() for sample in t.samples_ms)


def test_turns_rotate() -> None:
    record = Recorder("a", "b", "c")
    interleaved(record.runners, FEEDS, rounds=3)
    turns = record.calls[3 * latency.WARM_UP_CALLS :][::2]  # each turn: one call to wake up, one timed
    assert "".join(turns) == "abcbcacab"


def test_a_used_up_budget_ends_it_after_the_fewest_rounds() -> None:
    times = interleaved(Recorder("a").runners, FEEDS, rounds=1000, seconds=0.0)
    assert len(times["a"].samples_ms) == latency.MIN_ROUNDS


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    interleaved(Recorder("a").runners, FEEDS, rounds=5, progress=lambda *what: told.append(what))
    assert told == [("measure", done, 5) for done in range(1, 6)]


def test_median_and_p90_are_numpys() -> None:
    samples = tuple(np.random.default_rng(0).exponential(size=31))
    assert Latency(samples).median == np.median(samples)
    assert Latency(samples).p90 == np.quantile(samples, 0.9)


def test_pinning_holds_inside_and_is_undone() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1) as cpus:
        assert os.sched_getaffinity(0) == set(cpus)
        assert len(cpus) == 1
    assert os.sched_getaffinity(0) == before


def test_pinning_is_undone_after_an_error() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError), pinned(1):
        raise RuntimeError
    assert os.sched_getaffinity(0) == before


def test_disturbed_turns_are_repeated_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0, 1e9, *[0.0] * 100])  # before and after the first turn, then of all others
    monkeypatch.setattr(latency, "waited", lambda: next(waits))
    monkeypatch.setattr(latency, "REPEATS", 2)
    times = interleaved(Recorder("a").runners, FEEDS, rounds=6)["a"]
    assert len(times.samples_ms) == 7
    assert times.undisturbed == times.samples_ms[1:]
    assert times.median == np.median(times.samples_ms[1:])


def test_all_samples_count_when_too_few_are_undisturbed() -> None:
    times = Latency((1.0, 2.0, 3.0, 4.0, 50.0, 60.0), waits=(0.0, 0.0, 0.0, 0.0, 0.5, 0.5))
    assert times.disturbed
    assert times.median == 3.5
    quiet = Latency((1.0, 2.0, 3.0, 4.0, 5.0, 60.0), waits=(0.0, 0.0, 0.0, 0.0, 0.0, 0.5))
    assert not quiet.disturbed
    assert quiet.median == 3.0
