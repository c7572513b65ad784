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


def before_loading() -> None:
    """Set what TVM reads from the environment when its pools start, unless the user has set it.

    A pool never grows later, and TVM would start one for half of the CPUs, as soon as it folds a constant.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPINS))


class _Pool(threading.local):
    """TVM's pool of the calling thread: how many threads it was given, and the CPUs that the caller is left."""

    threads = 0
    cpus: frozenset[int] = frozenset()
    workers: frozenset[int] = frozenset()


_pool = _Pool()


def configure(threads: int) -> None:
    """Give the calling thread a pool of ``threads``, itself included, unless it has one."""
    if _pool.threads == threads:
        return
    import tvm_ffi

    allowed = os.sched_getaffinity(0)
    before = _tasks()
    tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)
    _pool.workers = frozenset(_tasks() - before or _pool.workers)
    pinned = [mask for mask in map(_affinity, _pool.workers) if len(mask) == 1]
    taken = frozenset().union(*pinned) if threads > 1 else frozenset()
    _pool.threads, _pool.cpus = threads, frozenset(allowed - taken or allowed)


@contextmanager
def settled(threads: int) -> Iterator[None]:
    """Meanwhile the calling thread has a pool of ``threads`` and stays away from that pool's cores."""
    configure(threads)
    thread = threading.get_native_id()
    before = os.sched_getaffinity(thread)
    os.sched_setaffinity(thread, _pool.cpus & before or before)
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
