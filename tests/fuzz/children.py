"""Work that may crash, hang or eat memory, each piece in a process of its own: forked, watched, and judged.

The parent has imported everything and runs one thread only, so that a piece costs milliseconds. A piece says which
phase it is in; what happens in a phase called "reference…" is not ours, and is not held against it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Job = TypeVar("Job")
Phase = Callable[[str], None]
"""Says what comes next."""
GOOD = frozenset({"equal", "refused", "no reference"})
"""Verdicts that are no failures."""
REFERENCE = "reference"
_PAGE = resource.getpagesize()
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Limits:
    """What one piece may take: seconds of CPU (three times that by the clock), bytes beyond what the parent has."""

    seconds: float = 20.0
    bytes: int = 2 << 30


@dataclass
class Outcome:
    """How one piece ended.

    Attributes:
        verdict: "equal", "refused", "no reference", or a failure: "mismatch", "internal", "unverified", "crash",
            "hang", "memory", "noise" (a traceback on standard error).
        phase: the last one that it began.
        seconds: by the clock, the phases of the reference left out.
        peak: bytes of memory beyond the parent's, likewise.
        detail: one line: the error, the difference.
        facts: what else the piece has to say.
    """

    verdict: str
    phase: str
    seconds: float
    peak: int
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.verdict in GOOD

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Child:
    """A running piece, as the parent sees it."""

    job: Any
    pid: int
    pipe: int
    errors: int
    started: float
    limits: Limits
    text: str = ""
    killed: str = ""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines() if line.endswith("}")]

    @property
    def phase(self) -> str:
        return next((line["phase"] for line in reversed(self.lines) if "phase" in line), "start")

    @property
    def base(self) -> int:
        """Bytes that it had when it started."""
        return next((line["peak"] for line in self.lines), 1 << 30)

    def watch(self) -> None:
        """Kill it when it has taken more than it may."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                numbers = file.read().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            return
        cpu = sum(map(int, numbers[11:15])) / _TICK
        memory = int(numbers[21]) * _PAGE - self.base
        if memory > self.limits.bytes:
            self.killed = "memory"
        elif cpu > self.limits.seconds or time.monotonic() - self.started > 3 * self.limits.seconds:
            self.killed = "hang"
        if self.killed:
            os.killpg(self.pid, signal.SIGKILL)


def run(
    jobs: Iterable[Job], work: Callable[[Job, Phase], dict[str, Any]], limits: Limits, workers: int = 1
) -> Iterator[tuple[Job, Outcome]]:
    """``work(job, phase)`` for each job in a process of its own; (job, outcome) as they end.

    ``work`` returns ``{"verdict": …, "detail": …}`` and further facts. An XoptError that it raises is "refused", or
    "unverified" when a check failed, any other exception "internal".
    """
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a parent of {threads} threads cannot fork safely"
    pending, children = iter(jobs), list[_Child]()
    more = True
    while more or children:
        while more and len(children) < workers:
            try:
                children.append(_start(next(pending), work, limits))
            except StopIteration:
                more = False
        for child in _ended(children):
            children.remove(child)
            yield child.job, _judge(child)


def _start(job: Any, work: Callable[[Any, Phase], dict[str, Any]], limits: Limits) -> _Child:
    reader, writer = os.pipe()
    errors = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(job, work, writer, errors)
    os.close(writer)
    return _Child(job, pid, reader, errors, time.monotonic(), limits)


def _child(job: Any, work: Callable[[Any, Phase], dict[str, Any]], pipe: int, errors: int) -> None:
    """The forked process; it does not return."""
    from xopt.errors import InputError, XoptError

    def say(**line: Any) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(pipe, (json.dumps({**line, "time": time.monotonic(), "peak": used}) + "\n").encode())

    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        say(phase="start")
        try:
            result = work(job, lambda phase: say(phase=phase))
        except XoptError as error:
            verdict = "refused" if isinstance(error, InputError) else "unverified"
            result = {"verdict": verdict, "detail": str(error)}
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next(
                (f for f in reversed(frames) if "/xopt/" in f.filename or "/targets/" in f.filename), frames[-1]
            )
            where = f"{'/'.join(place.filename.split('/')[-2:])}:{place.lineno}"
            result = {"verdict": "internal", "detail": f"{type(error).__name__} at {where}: {error}"}
        result["detail"] = " ".join(str(result.get("detail", "")).split())[:400]
        say(result=result)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _ended(children: list[_Child]) -> list[_Child]:
    """The children that have closed their pipe, after a moment."""
    ended = []
    ready = select.select([child.pipe for child in children], [], [], 0.05)[0]
    for child in children:
        if child.pipe in ready:
            piece = os.read(child.pipe, 1 << 16)
            child.text += piece.decode(errors="replace")
            if not piece:
                ended.append(child)
        else:
            child.watch()
    return ended


def _judge(child: _Child) -> Outcome:
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    with open(child.errors, "rb") as file:
        file.seek(0)
        printed = file.read().decode(errors="replace")
    lines = child.lines
    result = next((line["result"] for line in lines if "result" in line), None)
    seconds, peak = _taken(lines, time.monotonic())
    facts: dict[str, Any] = {}
    if result is not None:
        facts = {key: value for key, value in result.items() if key not in ("verdict", "detail")}
        verdict, detail = result["verdict"], result["detail"]
    elif child.killed:
        verdict, detail = child.killed, f"in {child.phase}"
    else:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        verdict, detail = "crash", f"signal {number}, in {child.phase}: {_last(printed)}"
    if verdict in ("crash", "hang", "memory") and child.phase.startswith(REFERENCE):
        verdict = "no reference"
    if verdict in GOOD and "Traceback (most recent call last)" in printed:
        verdict, detail = "noise", _last(printed)
    if verdict in GOOD and peak > child.limits.bytes:
        verdict, detail = "memory", f"{peak} bytes"
    return Outcome(verdict, child.phase, round(seconds, 3), peak, detail, facts)


def _taken(lines: list[dict[str, Any]], end: float) -> tuple[float, int]:
    """Seconds of the phases that are ours, and by how much they raised the memory."""
    seconds, peak = 0.0, 0
    base = lines[0]["peak"] if lines else 0
    for line, following in zip(lines, [*lines[1:], {"time": end, "peak": lines[-1]["peak"] if lines else 0}]):
        if "phase" in line and not line["phase"].startswith(REFERENCE):
            seconds += following["time"] - line["time"]
            peak = max(peak, following["peak"] - base) if following["peak"] > line["peak"] else peak
    return seconds, peak


def _last(printed: str) -> str:
    return next((line for line in reversed(printed.splitlines()) if line.strip()), "")[:300]
