"""The threads of a run.

Every artifact for a CPU brings the threads that its loops run on (``targets/pool.cc``). The pool of the artifact that
is loaded first serves all sessions of a process: those that run one after the other share its threads, those that run
at once have some each.
"""

from __future__ import annotations

import _ctypes
import ctypes
import operator
import os
import reprlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xopt.errors import InputError

SPIN = "XOPT_SPIN_MICROSECONDS"
"""Environment variable: how long a thread looks for work before it sleeps."""
_SPIN_DEFAULT = 100
MOST = 1024
"""Threads of a session."""
SPINS = 3000
"""Rounds in which TVM's threads look for work, 2 ms in all; TVM's own choice is 150 ms."""
_BIG_CORES = 1


def before_loading() -> None:
    """Set what TVM reads from the environment when its own pools start, unless the user has set it.

    They run what is compiled and called in the same process: constants that are folded, candidates of the tuner. A pool
    never grows later, and TVM would start one for half of the CPUs. Pinned to cores, its threads would wait for each
    other where another process wants one of them.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPINS))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


class _TvmPool(threading.local):
    threads = 0


_tvm_pool = _TvmPool()


def configure_tvm(threads: int) -> None:
    """Give the calling thread a pool of TVM's with ``threads``, itself included, unless it has one."""
    if _tvm_pool.threads != threads:
        import tvm_ffi

        tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)
        _tvm_pool.threads = threads


class _Pool:
    """The pool of a library, as C declares it.

    Calls hold Python's lock: they take less than a microsecond, and never wait.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))
        self.enter = library.xopt_pool_enter
        self.enter.argtypes = (ctypes.c_int, ctypes.c_int64)
        self.enter.restype = None
        self.leave = library.xopt_pool_leave
        self.leave.argtypes = ()
        self.leave.restype = None
        self.launch = ctypes.cast(library.xopt_pool_launch, ctypes.c_void_p)


_pool: _Pool | None = None
_installing = threading.Lock()


def install(path: Path) -> None:
    """Let the parallel loops of a library that was loaded from ``path`` run on this process's pool."""
    global _pool
    library = ctypes.CDLL(str(path))
    try:
        if not hasattr(library, "xopt_pool_install"):  # code for a GPU
            return
        with _installing:
            _pool = _pool or _Pool(path)
        library.xopt_pool_install.argtypes = (ctypes.c_void_p,)
        library.xopt_pool_install(_pool.launch)
    finally:
        _ctypes.dlclose(library._handle)  # it goes with its session; ctypes would keep it for ever


@contextmanager
def running(threads: int) -> Iterator[None]:
    """Meanwhile the parallel loops of the calling thread run on ``threads`` threads, itself included."""
    if _pool is None:
        yield
        return
    _pool.enter(threads, _SPIN_NS)
    try:
        yield
    finally:
        _pool.leave()


def _spin() -> int:
    """Nanoseconds that threads look for work, as the environment has it."""
    text = os.environ.get(SPIN, str(_SPIN_DEFAULT))
    return int(text) * 1000 if text.isascii() and text.isdigit() and len(text) < 10 else _SPIN_DEFAULT * 1000


_SPIN_NS = _spin()


def count(threads: object) -> int:
    """A number of threads that was asked for; without one, as many as there are cores for this process.

    Raises:
        InputError: E-OPTION, it is no number from 1 to `MOST`.
    """
    if threads is None:
        return physical_cores()
    try:
        number = 0 if isinstance(threads, bool) else operator.index(threads)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if not 1 <= number <= MOST:
        try:
            text = reprlib.repr(threads)
        except ValueError:  # an integer of thousands of digits
            text = "so many"
        raise InputError("E-OPTION", f"{text} threads cannot be", cure=f"give a number from 1 to {MOST}")
    return number


def physical_cores() -> int:
    """The physical cores that this process may use: by its affinity, and by the CPU quota of its container."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return max(1, round(min(len(siblings), cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that control groups grant this process; infinite where none limits it.

    Args:
        root: where ``/proc`` and ``/sys`` are looked for.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    quotas = [float("inf")]
    for controllers, group in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        mount = root / "sys/fs/cgroup"
        if controllers == "":
            read = _quota_v2
        elif "cpu" in controllers.split(","):
            read, mount = _quota_v1, next((p for p in (mount / controllers, mount / "cpu") if p.is_dir()), mount)
        else:
            continue
        place = mount / group.lstrip("/")
        # In a container the group is often named as the host sees it, and the mount is the group itself.
        quotas += [read(folder) for folder in (place, *place.parents) if folder == mount or mount in folder.parents]
    return min(quotas)


def _quota_v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")


def _quota_v1(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else float("inf")
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")
