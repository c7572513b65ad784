"""Latency of several runners side by side: the same feeds, the same minutes, the same cores.

Each round gives every runner one turn, in an order that rotates from round to round, so that a slow minute of the
machine hits all of them. A turn: a pause in which the worker threads of the last runner go to sleep (they spin for
a while after their work, and would take cycles from the next one), one call that is not timed, then calls for
``TURN_MS`` whose mean is one sample.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xopt.measure.machine import usable_cpus

TURN_MS = 3.0
PAUSE_S = 0.003
WARM_UP_CALLS = 3
MIN_ROUNDS = 5

Runner = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of each sample, in the order they were taken."""

    samples_ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """Milliseconds that half of the samples do not exceed."""
        return float(np.median(self.samples_ms))

    @property
    def p90(self) -> float:
        """Milliseconds that nine tenths of the samples do not exceed."""
        return float(np.quantile(self.samples_ms, 0.9))

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "p90": self.p90}


def interleaved(
    runners: Mapping[str, Runner],
    feeds: Mapping[str, np.ndarray],
    *,
    rounds: int = 30,
    seconds: float = 20.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Latency]:
    """Time each runner on ``feeds``.

    Args:
        runners: what to time, by name.
        feeds: the arrays of one run.
        rounds: samples of each runner.
        seconds: stop earlier when this is used up, after at least ``MIN_ROUNDS`` rounds.
        progress: called with (stage, done, total).
    """
    calls = {name: _calls_in_a_turn(run, feeds) for name, run in runners.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_turn(runners[name], feeds, calls[name]))
        if progress is not None:
            progress("measure", done + 1, rounds)
    return {name: Latency(tuple(values)) for name, values in samples.items()}


def _calls_in_a_turn(run: Runner, feeds: Mapping[str, np.ndarray]) -> int:
    """Warm up, and find how many calls fill a turn."""
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        run(feeds)
        last_ms = (time.perf_counter() - start) * 1e3
    return max(1, math.ceil(TURN_MS / max(last_ms, 1e-3)))


def _turn(run: Runner, feeds: Mapping[str, np.ndarray], calls: int) -> float:
    time.sleep(PAUSE_S)
    run(feeds)
    start = time.perf_counter()
    for _ in range(calls):
        run(feeds)
    return (time.perf_counter() - start) * 1e3 / calls


@contextmanager
def pinned(threads: int) -> Iterator[list[int]]:
    """Keep this process, all its threads and those to come on the first ``threads`` CPUs it may use.

    A thread that has pinned itself to some of them stays there.
    """
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    cpus = usable_cpus()[:threads]
    _move({task: mask & set(cpus) or set(cpus) for task, mask in before.items()})
    try:
        yield cpus
    finally:
        everywhere = before.get(os.getpid(), set(cpus))
        _move({task: before.get(task, everywhere) for task in _tasks()})


def _tasks() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def _move(masks: Mapping[int, set[int]]) -> None:
    for task, cpus in masks.items():
        try:
            os.sched_setaffinity(task, cpus)
        except ProcessLookupError:  # a thread that has ended since
            continue
