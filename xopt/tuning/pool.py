"""Worker processes: whatever a candidate does, the tuner goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from xopt.runtime.threads import SPINS
from xopt.targets.base import Target

START_SECONDS = 120.0
"""For a process to start, which imports the compiler."""


class CandidateError(Exception):
    """A candidate could not be built or run, crashed, or took too long."""


class Worker:
    """One process, started when it is first asked and again after it was lost.

    Args:
        target: what to build for.
        threads: threads that kernels run on.
    """

    def __init__(self, target: Target, threads: int) -> None:
        self._command = [target.name, str(threads)]
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._fresh = True
        self.deadline = 0.0

    @property
    def connection(self) -> Connection:
        """Where answers arrive."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        return self._connection

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "TVM_NUM_THREADS": str(self._threads), "TVM_THREAD_POOL_SPIN_COUNT": str(SPINS)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "xopt.tuning.worker", str(theirs.fileno()), *self._command],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt reaches the tuner alone
            )
        finally:
            theirs.close()
        self._fresh = True

    def send(self, method: str, *arguments: Any, seconds: float) -> None:
        """Ask for something, to be answered within ``seconds``."""
        connection = self.connection
        self.deadline = time.monotonic() + seconds + (START_SECONDS if self._fresh else 0.0)
        try:
            connection.send((method, arguments))
        except OSError:  # it died of the last request; `receive` says so
            self.deadline = 0.0

    def receive(self) -> Any:
        """The answer; CandidateError when there is none in time or none at all."""
        connection = self.connection
        try:
            if not connection.poll(max(0.0, self.deadline - time.monotonic())):
                raise CandidateError("it took too long")
            done, result = connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise CandidateError("it crashed") from error
        except CandidateError:
            self.close()
            raise
        self._fresh = False
        if not done:
            raise CandidateError(str(result))
        return result

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Send and receive."""
        self.send(method, *arguments, seconds=seconds)
        return self.receive()

    def close(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


class Pool:
    """Workers side by side.

    Args:
        target, threads: as for `Worker`.
        count: how many processes build at the same time.
    """

    def __init__(self, target: Target, threads: int, count: int) -> None:
        self.workers = [Worker(target, threads) for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()

    def each(
        self, items: Iterable[Any], request: Callable[[Any], Sequence[Any]], seconds: float
    ) -> dict[Any, Worker | CandidateError]:
        """Send a request for each item to whichever worker is free; which one took it, or how it failed."""
        waiting = deque(items)
        results: dict[Any, Worker | CandidateError] = {}
        busy: dict[Connection, tuple[Worker, Any]] = {}
        free = list(self.workers)
        while waiting or busy:
            while waiting and free:
                worker, item = free.pop(), waiting.popleft()
                worker.send(*request(item), seconds=seconds)
                busy[worker.connection] = worker, item
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
