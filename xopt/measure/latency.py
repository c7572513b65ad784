"""Latency of several runners side by side: the same feeds, the same minutes, the same cores.

Each round gives every runner one turn, in an order that rotates from round to round, so that a slow minute of the
machine hits all of them. A turn: a pause in which the worker threads of the last runner go to sleep (they spin for
a while after their work, and would take cycles from the next one), one call that is not timed, then calls for
``TURN_MS`` whose mean is one sample. Runners are functions of this process, or of others (`xopt.measure.isolated`).

A turn in which threads of this process waited for a CPU that something else used is disturbed: rounds are added, up
to ``REPEATS`` times as many, until every runner has its samples without those.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from xopt.measure.machine import usable_cpus

TURN_MS = 3.0
PAUSE_S = 0.003
WARM_UP_CALLS = 3
MIN_ROUNDS = 5
DISTURBED = 0.02
"""Time that threads waited for a CPU, as a share of the turn, from which on a sample does not count."""
REPEATS = 4
"""Rounds that are taken at most, for each that is wanted."""

Runner = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Latency:
    """Samples of one runner in the order they were taken.

    Attributes:
        samples_ms: milliseconds of a call.
        waits: time that threads waited for a CPU during the turn, as a share of it; empty when it is not known.
    """

    samples_ms: tuple[float, ...]
    waits: tuple[float, ...] = ()

    @property
    def undisturbed(self) -> tuple[float, ...]:
        """The samples of turns that nothing disturbed."""
        if not self.waits:
            return self.samples_ms
        return tuple(sample for sample, wait in zip(self.samples_ms, self.waits) if wait < DISTURBED)

    @property
    def disturbed(self) -> bool:
        """Whether too few samples are undisturbed, so that all of them have to count."""
        return len(self.undisturbed) < min(MIN_ROUNDS, len(self.samples_ms))

    @property
    def counted(self) -> tuple[float, ...]:
        """The samples that the figures are made of."""
        return self.samples_ms if self.disturbed else self.undisturbed

    @property
    def median(self) -> float:
        """Milliseconds that half of the samples do not exceed."""
        return float(np.median(self.counted))

    @property
    def p90(self) -> float:
        """Milliseconds that nine tenths of the samples do not exceed."""
        return float(np.quantile(self.counted, 0.9))

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "p90": self.p90}

    def record(self) -> dict[str, object]:
        """The figures with all that they were made of."""
        raw = {"samples_ms": list(self.samples_ms), "waits": list(self.waits)}
        return {"median_ms": self.median, "p90_ms": self.p90, **raw}


class Contender(Protocol):
    """Someone who takes turns."""

    def calls_in_a_turn(self) -> int:
        """Warm up, and find how many calls fill a turn."""

    def turn(self, calls: int) -> tuple[float, float]:
        """Milliseconds of a call, and the share of the turn that threads waited for a CPU."""


@dataclass(frozen=True)
class Local:
    """A runner of this process."""

    run: Runner
    feeds: Mapping[str, np.ndarray]

    def calls_in_a_turn(self) -> int:
        """See `Contender`."""
        for _ in range(WARM_UP_CALLS):
            start = time.perf_counter()
            self.run(self.feeds)
            last_ms = (time.perf_counter() - start) * 1e3
        return max(1, math.ceil(TURN_MS / max(last_ms, 1e-3)))

    def turn(self, calls: int) -> tuple[float, float]:
        """See `Contender`."""
        time.sleep(PAUSE_S)
        self.run(self.feeds)
        before = waited()
        start = time.perf_counter()
        for _ in range(calls):
            self.run(self.feeds)
        seconds = time.perf_counter() - start
        return seconds * 1e3 / calls, (waited() - before) / seconds


def interleaved(
    runners: Mapping[str, Runner],
    feeds: Mapping[str, np.ndarray],
    *,
    rounds: int = 30,
    seconds: float = 20.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Latency]:
    """`in_turns` for runners of this process, on ``feeds``."""
    local = {name: Local(run, feeds) for name, run in runners.items()}
    return in_turns(local, rounds=rounds, seconds=seconds, progress=progress)


def in_turns(
    contenders: Mapping[str, Contender],
    *,
    rounds: int = 30,
    seconds: float = 20.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Latency]:
    """Time each contender.

    Args:
        contenders: by name.
        rounds: undisturbed samples of each.
        seconds: stop earlier when this is used up, after at least ``MIN_ROUNDS`` rounds.
        progress: called with (stage, done, total).
    """
    calls = {name: contender.calls_in_a_turn() for name, contender in contenders.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    deadline = time.perf_counter() + seconds
    done = good = 0
    while good < rounds and done < REPEATS * rounds and (done < MIN_ROUNDS or time.perf_counter() < deadline):
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            turns[name].append(contenders[name].turn(calls[name]))
        done += 1
        good = min((sum(wait < DISTURBED for _, wait in taken) for taken in turns.values()), default=done)
        if progress is not None:
            progress("measure", good, rounds)
    return {name: Latency(*(tuple(column) for column in zip(*taken))) for name, taken in turns.items()}


def waited() -> float:
    """Seconds that all threads of this process have been ready to run without a CPU; 0 where Linux does not tell."""
    total = 0
    for task in _tasks():
        try:
            total += int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return total * 1e-9


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
