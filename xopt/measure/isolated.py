"""Runtimes in processes of their own, each stopped but for its turns.

Threads of a runtime look for work for a while after a call, in some for longer than any pause, and those of two
runtimes are put on the same cores: in one process with five others OpenVINO took twice as long as alone.

    parent    SIGCONT, "turn"             next one ...
    process            a turn, its time             stopped
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from xopt.errors import InputError, XoptError
from xopt.measure.latency import Local, Runner, pinned
from xopt.runtime.arrays import aligned_copy

Feeds = Mapping[str, np.ndarray]
Factory = Callable[[], Runner]
"""Makes a runner; it must survive pickling: a partial of a function of a module."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Isolated:
    """Processes that are ready, by the runner's name, and why others are not."""

    contenders: dict[str, Process]
    skipped: dict[str, str]


@contextmanager
def isolated(factories: Mapping[str, Factory], feeds: Feeds, threads: int) -> Iterator[Isolated]:
    """A process for each runner, one after the other made, run once and stopped; they end with the context.

    Args:
        factories: by name.
        feeds: the arrays of one run.
        threads: CPUs that each process is held to.
    """
    found = Isolated({}, {})
    with ExitStack() as stack:
        for name, factory in factories.items():
            process = Process(name)
            stack.callback(process.close)
            if (problem := process.load(factory, feeds, threads)) is None:
                found.contenders[name] = process
            else:
                process.close()
                found.skipped[name] = problem
        yield found


class Process:
    """A runner in another process: a `xopt.measure.latency.Contender`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def load(self, factory: Factory, feeds: Feeds, threads: int) -> str | None:
        """Make the runner, in place of one before, run it once and stop; why that is not possible, or None."""
        try:
            problem: str | None = self._ask("load", pickle.dumps((factory, dict(feeds))), threads)
        except InputError as error:
            return error.what
        return problem

    def outputs(self) -> dict[str, np.ndarray]:
        """What the runner computes."""
        result: dict[str, np.ndarray] = self._ask("outputs")
        return result

    def calls_in_a_turn(self) -> int:
        """See `Contender`."""
        return int(self._ask("calls_in_a_turn"))

    def turn(self, calls: int) -> tuple[float, float]:
        """See `Contender`."""
        milliseconds, waited = self._ask("turn", calls)
        return milliseconds, waited

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.send_signal(signal.SIGCONT)
            for part in request:
                pickle.dump(part, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
            self._process.send_signal(signal.SIGSTOP)
        except (EOFError, BrokenPipeError) as error:
            how = self._process.wait()
            ended = f"signal {-how}" if how < 0 else f"exit status {how}"
            raise InputError(
                "E-PEER", f"its process ended ({ended})", where=f"runtime {self.name}", cure="measure without it"
            ) from error
        return answer


def serve() -> None:
    """The other side: answer requests until standard input ends."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a runtime prints
    with ExitStack() as stack:
        local: Local | None = None
        while request := _request(requests):
            if request == "load":
                content, threads = pickle.load(requests), pickle.load(requests)
                local, answer = _loaded(content)
                stack.enter_context(pinned(threads))
                _answer(answers, answer)
                continue
            assert local is not None, "nothing is loaded"
            if request == "outputs":
                _answer(answers, {name: np.asarray(value) for name, value in local.run(local.feeds).items()})
            elif request == "turn":
                _answer(answers, local.turn(pickle.load(requests)))
            else:
                _answer(answers, local.calls_in_a_turn())


def _loaded(content: bytes) -> tuple[Local | None, str | None]:
    """A runner that has run once, or why there is none."""
    try:
        factory, feeds = pickle.loads(content)
        local = Local(factory(), {name: aligned_copy(array) for name, array in feeds.items()})
        local.run(local.feeds)
    except Exception as error:  # each runtime has its own errors; one that fails is left out of the comparison
        return None, reason(error)
    return local, None


def _request(requests: BinaryIO) -> str:
    try:
        return str(pickle.load(requests))
    except EOFError:
        return ""


def _answer(answers: BinaryIO, content: object) -> None:
    pickle.dump(content, answers)
    answers.flush()


def reason(error: Exception) -> str:
    """Why a runtime is left out, in a line."""
    if isinstance(error, ImportError):
        return f"not installed ({error.name or error})"
    if isinstance(error, XoptError):
        return error.what
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]
