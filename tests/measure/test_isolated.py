"""Runtimes in processes of their own: who may run when, what comes back, and what becomes of those that fail."""

from __future__ import annotations

import operator
import os
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from xopt.errors import InputError
from xopt.measure import latency
from xopt.measure.isolated import Process, isolated, reason

FEEDS = {"x": np.arange(4, dtype=np.float32)}
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(autouse=True)
def _found_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import this file by its name."""
    monkeypatch.setattr(sys, "path", [*sys.path, ROOT])


def double(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A runner."""
    return {"y": 2 * feeds["x"]}


def doubling() -> latency.Runner:
    """A factory that prints where answers go."""
    print("words of a runtime")
    return double


def dying_at_call(count: int) -> latency.Runner:
    """A factory whose runner takes its process down."""
    calls = iter(range(count))

    def run(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGSEGV)
        return double(feeds)

    return run


def failing() -> latency.Runner:
    """A factory that cannot make a runner."""
    raise ValueError("no such thing\nand more")


def missing() -> latency.Runner:
    """A factory of a runtime that is not installed."""
    import a_runtime_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    return double


def cpus_used(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A runner that tells the CPUs that it may use."""
    return {"cpus": np.array(sorted(os.sched_getaffinity(0)))}


def state(process: Process) -> str:
    """A letter for what Linux says the process does: T is stopped."""
    text = Path(f"/proc/{process._process.pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0]


def wait_until_stopped(process: Process) -> bool:
    """Whether it is, after a while at most: the signal arrives when it arrives."""
    deadline = time.monotonic() + 10
    while state(process) != "T" and time.monotonic() < deadline:
        time.sleep(0.001)
    return state(process) == "T"


def test_results_and_times_come_back() -> None:
    with isolated({"a": doubling, "b": doubling}, FEEDS, 1) as found:
        assert not found.skipped
        for process in found.contenders.values():
            np.testing.assert_array_equal(process.outputs()["y"], 2 * FEEDS["x"])
        times = latency.in_turns(found.contenders, rounds=5)
    assert set(times) == {"a", "b"}
    assert all(len(one.samples_ms) >= 5 and min(one.samples_ms) > 0 for one in times.values())


def test_only_the_one_whose_turn_it_is_may_run() -> None:
    with isolated({"a": doubling, "b": doubling}, FEEDS, 1) as found:
        for process in found.contenders.values():
            process.turn(3)
        assert all(map(wait_until_stopped, found.contenders.values()))
    assert all(process._process.returncode == -signal.SIGKILL for process in found.contenders.values())


def test_those_that_cannot_be_loaded_are_left_out_with_a_reason() -> None:
    makers = {"fails": failing, "missing": missing, "dies": partial(dying_at_call, 0), "runs": doubling}
    with isolated(makers, FEEDS, 1) as found:
        assert list(found.contenders) == ["runs"]
    assert found.skipped["fails"] == "ValueError: no such thing"
    assert found.skipped["missing"] == "not installed (a_runtime_that_nobody_has)"
    assert found.skipped["dies"] == "its process ended (signal 11)"


def test_one_that_dies_in_its_turn_is_named() -> None:
    with isolated({"frail": partial(dying_at_call, 6)}, FEEDS, 1) as found, pytest.raises(InputError) as caught:
        latency.in_turns(found.contenders, rounds=5)
    assert caught.value.code == "E-PEER" and "runtime frail" in str(caught.value)


def address(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A runner that tells where its input lies."""
    return {"address": np.array([feeds["x"].ctypes.data])}


def test_inputs_lie_where_no_runtime_has_to_copy_them() -> None:
    makers = {str(size): partial(operator.itemgetter(0), [address]) for size in (1, 2)}
    for count in (1, 3, 5000):
        with isolated(makers, {"x": np.arange(count, dtype=np.float32)}, 1) as found:
            assert all(process.outputs()["address"][0] % 64 == 0 for process in found.contenders.values())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
def test_processes_are_held_to_their_cpus() -> None:
    with isolated({"a": partial(operator.itemgetter(0), [cpus_used])}, FEEDS, 1) as found:
        assert len(found.contenders["a"].outputs()["cpus"]) == 1


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    code = f"""
import os, sys, signal
sys.path.append({ROOT!r})
from tests.measure import test_isolated as t
with t.isolated({{"a": t.doubling}}, t.FEEDS, 1) as found:
    open({str(written)!r}, "w").write(str(found.contenders["a"]._process.pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    pid = os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-P", "-c", code)
    assert pid == -signal.SIGKILL
    child = Path(f"/proc/{written.read_text()}")
    deadline = time.monotonic() + 10
    while child.exists() and child.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reason_is_one_line() -> None:
    assert reason(RuntimeError("\n\n  first  \nsecond")) == "RuntimeError: first"
    assert reason(InputError("E-OPTION", "it has none", where="there")) == "it has none"
    assert len(reason(RuntimeError("x" * 1000))) == 200
