"""Threads of a run: shared by sessions, used from several threads and from forked children, bounded by quotas."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.ir import builders
from xopt import targets
from xopt.errors import InputError
from xopt.runtime import session as runtime
from xopt.runtime import threads
from xopt.runtime.session import Session

DEADLINE = 60
"""Seconds after which something hangs."""


def batch(seed: int, rows: int = 2) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 64, (rows, 24))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models whose loops are long enough for threads."""
    made = []
    for width in (64, 96):
        model = builders.bert(layers=2, width=width, heads=2, pooled="none")
        made.append(targets.compile(model, "cpu:avx2", tmp_path_factory.mktemp("artifact") / "model.so"))
    return made


def outputs(session: Session, feeds: dict[str, np.ndarray]) -> np.ndarray:
    result: np.ndarray = session.run(feeds)["last_hidden_state"]
    return result


def test_results_do_not_depend_on_the_number_of_threads(artifacts: list[Path]) -> None:
    expected = outputs(Session.load(artifacts[0], threads=1), batch(0))
    for count in (2, 3, 7, 64):
        np.testing.assert_array_equal(outputs(Session.load(artifacts[0], threads=count), batch(0)), expected)


def test_eight_threads_share_two_models(artifacts: list[Path]) -> None:
    sessions = [Session.load(artifact, threads=2) for artifact in artifacts]
    expected = {(m, seed): outputs(sessions[m], batch(seed)) for m in range(2) for seed in range(8)}

    def work(seed: int) -> None:
        for turn in range(20):
            model = (turn + seed) % 2
            np.testing.assert_array_equal(outputs(sessions[model], batch(seed)), expected[model, seed])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result(DEADLINE)


def in_child(work: Callable[[], bool]) -> bool:
    """What ``work`` returns in a forked child; False also when it fails or hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(DEADLINE)
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_may_run_a_session(artifacts: list[Path]) -> None:
    session = Session.load(artifacts[0], threads=2)
    expected = outputs(session, batch(0))

    def same() -> bool:
        return np.array_equal(outputs(session, batch(0)), expected)

    assert in_child(same)
    assert in_child(lambda: in_child(same))
    assert same()


def test_a_fork_waits_for_the_runs_of_other_threads(artifacts: list[Path]) -> None:
    session = Session.load(artifacts[0], threads=2)
    expected = outputs(session, batch(0))
    stop = threading.Event()

    def keep_running() -> None:
        while not stop.is_set():
            outputs(session, batch(1))

    busy = threading.Thread(target=keep_running)
    busy.start()
    try:
        assert all(in_child(lambda: np.array_equal(outputs(session, batch(0)), expected)) for _ in range(5))
    finally:
        stop.set()
        busy.join(DEADLINE)


def test_sessions_may_be_made_while_another_thread_forks(
    artifacts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised before a fork is passed over, and the next fork would wait for ever."""

    class Changing(list[Session]):
        times = 0

        def __iter__(self) -> Iterator[Session]:
            yield from super().__iter__()
            self.times += 1
            if self.times < 3:
                raise RuntimeError("Set changed size during iteration")

    monkeypatch.setattr(runtime, "_sessions", Changing([Session.load(artifacts[0])]))
    assert in_child(lambda: not runtime._forking.locked())
    assert not runtime._forking.locked()


def test_the_code_of_a_session_goes_with_it(artifacts: list[Path]) -> None:
    """But for the code of the threads, which all sessions share."""
    script = f"""
from xopt.runtime.session import Session
import gc, numpy as np
feeds = {{"input_ids": np.zeros((2, 24), np.int64), "attention_mask": np.ones((2, 24), np.int64)}}
mapped = []
for path in {[str(path) for path in artifacts]!r} * 3:
    Session.load(path, threads=2).run(feeds)
    gc.collect()
    mapped.append(open("/proc/self/maps").read().count("memfd:xopt-model"))
assert mapped[0] > 0 and set(mapped) == {{mapped[0]}}, mapped
"""
    subprocess.run([sys.executable, "-c", script], timeout=DEADLINE, check=True)


def test_a_child_does_not_use_its_parent_s_gpu(artifacts: list[Path]) -> None:
    session = Session.load(artifacts[0])
    session._transfer = object()  # type: ignore[assignment]

    def refused() -> bool:
        with pytest.raises(InputError, match="E-FORK"):
            session.run(batch(0))
        return True

    assert in_child(refused)


def test_sessions_one_after_the_other_share_threads(artifacts: list[Path]) -> None:
    """Each pool has a worker less than threads; a second session of the same size needs no others."""
    script = f"""
import sys, os
from xopt.runtime.session import Session
import numpy as np
feeds = {{"input_ids": np.zeros((2, 24), np.int64), "attention_mask": np.ones((2, 24), np.int64)}}
sessions = [Session.load(path, threads=3) for path in {[str(path) for path in artifacts]!r}]
before = len(os.listdir("/proc/self/task"))
for session in sessions * 3:
    session.run(feeds)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert int(done.stdout) == 2


def test_a_caller_keeps_its_cpus(artifacts: list[Path]) -> None:
    before = os.sched_getaffinity(threading.get_native_id())
    outputs(Session.load(artifacts[0], threads=2), batch(0))
    assert os.sched_getaffinity(threading.get_native_id()) == before


@pytest.mark.parametrize("asked", [np.int64(2), np.uint8(2), np.array(2)])
def test_a_number_may_be_numpys(asked: object) -> None:
    assert threads.count(asked) == 2
    assert type(threads.count(asked)) is int


@pytest.mark.parametrize(
    "asked",
    [0, -1, 10**9, 10**9000, -(10**9000), True, np.True_, "2", "2" * 9000, 1.5, np.float64(2), np.int64(-1), object()],
    ids=lambda asked: type(asked).__name__,
)
def test_threads_that_cannot_be(artifacts: list[Path], asked: object) -> None:
    with pytest.raises(InputError, match="threads cannot be") as caught:
        Session.load(artifacts[0], threads=asked)  # type: ignore[arg-type]
    assert caught.value.code == "E-OPTION"
    assert len(str(caught.value)) < 200


def test_by_default_there_are_no_more_threads_than_the_quota_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, most in ((0.3, 1), (1.0, 1), (1e9, len(os.sched_getaffinity(0)))):
        monkeypatch.setattr(threads, "cpu_quota", lambda quota=quota: quota)
        assert 1 <= threads.count(None) <= most


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4.0),
        ({"proc/self/cgroup": "0::/of/the/host\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, float("inf")),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            float("inf"),
        ),
        ({"proc/self/cgroup": "nonsense\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_quota_of_control_groups(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path) == quota
