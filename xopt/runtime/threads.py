"""Where the threads of a run are: one on each core.

TVM's pool pins its threads, but not the calling thread, which does its share of the work: on the core of a pool thread
it makes every kernel take twice as long. After a run the pool's threads look for more work a while before they sleep.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPINS = 3000
"""Rounds of looking for work, 2 ms in all; TVM's own choice is 150 ms, which takes a core from whatever runs next."""
_BIG_CORES = 1


def before_loading(threads: int) -> None:
    """Set what TVM reads from the environment when its library is loaded, unless the user has set it."""
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPINS))


def configure(threads: int) -> frozenset[int]:
    """Start TVM's pool for the calling thread; returns the CPUs that are left to that thread."""
    import tvm_ffi

    before = _tasks()
    tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)
    for task in _tasks() - before:
        mask = _affinity(task)
        if len(mask) == 1:
            _taken.update(mask)
    allowed = os.sched_getaffinity(os.getpid())
    return frozenset(allowed - _taken or allowed)


_taken: set[int] = set()
"""CPUs that threads of TVM's pools are pinned to."""


@contextmanager
def settled(cpus: frozenset[int]) -> Iterator[None]:
    """Keep the calling thread on ``cpus`` meanwhile."""
    thread = threading.get_native_id()
    before = os.sched_getaffinity(thread)
    os.sched_setaffinity(thread, cpus & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(thread, before)


def _tasks() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def _affinity(task: int) -> set[int]:
    try:
        return os.sched_getaffinity(task)
    except ProcessLookupError:  # it has ended since
        return set()
