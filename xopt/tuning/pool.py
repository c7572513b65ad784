"""Worker processes: whatever a candidate does, the tuner goes on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from xopt.runtime.threads import SPINS
from xopt.targets.base import Target

START_SECONDS = 120.0
"""For a process to say that it is there: it imports the compiler first."""


GRACE_SECONDS = 2.0
"""What is in work when the time of the run is up may take so long."""


class CandidateError(Exception):
    """A candidate could not be built or run, crashed, or took too long."""


class OutOfTimeError(Exception):
    """The time of the run is up; nothing more is asked of any process."""


class Worker:
    """One process; after it was lost, the next request starts another.

    Args:
        target: what to build for.
        threads: threads that kernels run on.
        until: by `time.monotonic`, when the time of the run is up.
    """

    def __init__(self, target: Target, threads: int, until: float = math.inf) -> None:
        self._until = until
        self._arguments = [target.name, str(threads)]
        self._environment = {"TVM_NUM_THREADS": str(threads), "TVM_THREAD_POOL_SPIN_COUNT": str(SPINS)}
        self._ready = False
        self.deadline = 0.0
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "xopt.tuning.worker", str(theirs.fileno()), *self._arguments],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # an interrupt reaches the tuner alone
        )
        theirs.close()
        self._ready = False

    def send(self, method: str, *arguments: Any, seconds: float) -> None:
        """Ask for something, to be answered within ``seconds``.

        Raises:
            CandidateError: no process can be started.
            OutOfTimeError: it is too late to ask.
        """
        if time.monotonic() >= self._until:
            raise OutOfTimeError
        if self.connection.closed:
            self._start()
        if not self._ready:
            self.deadline = self._within(START_SECONDS)
            self.receive()
            self._ready = True
        self.deadline = self._within(seconds)
        with suppress(OSError):  # it has died meanwhile; `receive` says so
            self.connection.send((method, arguments))

    def _within(self, seconds: float) -> float:
        """The deadline for what may take so long, and ends soon after the run's time is up."""
        return min(time.monotonic() + seconds, self._until + GRACE_SECONDS)

    def receive(self) -> Any:
        """The answer.

        Raises:
            CandidateError: it says so, or there is none in time, or none at all.
            OutOfTimeError: there is none, and the time of the run is up.
        """
        try:
            if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
                self.close()
                if time.monotonic() >= self._until:
                    raise OutOfTimeError
                raise CandidateError("it took too long")
            done, result = self.connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise CandidateError("it crashed") from error
        if not done:
            raise CandidateError(str(result))
        return result

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Send and receive."""
        self.send(method, *arguments, seconds=seconds)
        return self.receive()

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


class Pool:
    """Workers side by side.

    Args:
        target, threads: as for `Worker`.
        count: how many processes build at the same time.
        until: as for `Worker`.
    """

    def __init__(self, target: Target, threads: int, count: int, until: float = math.inf) -> None:
        self.workers = [Worker(target, threads, until) for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()

    def each(
        self,
        items: Iterable[Any],
        request: Callable[[Any], Sequence[Any]],
        seconds: float,
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[Any, Worker | CandidateError]:
        """Send a request for each item to whichever worker is free; which one took it, or how it failed.

        Once ``enough`` says so, those that still wait are left out.
        """
        waiting = deque(items)
        results: dict[Any, Worker | CandidateError] = {}
        busy: dict[Any, tuple[Worker, Any]] = {}
        free = list(self.workers)
        while waiting or busy:
            if enough():
                waiting.clear()
            while waiting and free:
                worker, item = free.pop(), waiting.popleft()
                try:
                    worker.send(*request(item), seconds=seconds)
                    busy[worker.connection] = worker, item
                except CandidateError as error:
                    results[item] = error
                    free.append(worker)
            if not busy:
                continue
            soonest = min(worker.deadline for worker, _ in busy.values())
            ready = wait(list(busy), max(0.0, soonest - time.monotonic()))
            for connection, (worker, item) in list(busy.items()):
                if connection not in ready and worker.deadline > time.monotonic():
                    continue
                del busy[connection]
                try:
                    worker.receive()
                    results[item] = worker
                except CandidateError as error:
                    results[item] = error
                free.append(worker)
        return results
