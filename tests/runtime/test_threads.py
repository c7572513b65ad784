"""Where the threads of a run are: a core for each, for every calling thread, whatever ran before in the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import tvm  # noqa: F401, whose pool is configured

from xopt.runtime.threads import settled

CPUS = os.sched_getaffinity(0)


def in_thread(read: Callable[[], frozenset[int]]) -> frozenset[int]:
    """What ``read`` returns in a new thread, which has no pool yet."""
    found: list[frozenset[int]] = []
    thread = threading.Thread(target=lambda: found.append(read()))
    thread.start()
    thread.join()
    return found[0]


def inside(threads: int) -> frozenset[int]:
    """The calling thread's CPUs during a run on so many threads."""
    with settled(threads):
        return frozenset(os.sched_getaffinity(threading.get_native_id()))


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_caller_of_a_pool_stays_away_from_its_workers() -> None:
    assert in_thread(lambda: inside(2)) < CPUS


def test_caller_without_workers_may_run_anywhere() -> None:
    """Two sessions of one thread each would else share one core, once any pool has pinned its workers."""
    in_thread(lambda: inside(2))
    assert in_thread(lambda: inside(1)) == CPUS


def test_a_thread_s_pool_follows_the_session() -> None:
    def read() -> frozenset[int]:
        inside(2)
        return inside(1)

    assert in_thread(read) == CPUS


def test_affinity_is_restored() -> None:
    def read() -> frozenset[int]:
        inside(2)
        return frozenset(os.sched_getaffinity(threading.get_native_id()))

    assert in_thread(read) == CPUS
