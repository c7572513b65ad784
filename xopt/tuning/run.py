"""Tunes the kernels of a model, one after the other, and keeps what was found in a database."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from xopt.errors import InputError
from xopt.targets.base import Target
from xopt.targets.database import Database, Record, family_name, family_of, fields_of, make, read
from xopt.tuning.pool import CandidateError, OutOfTimeError, Pool
from xopt.tuning.search import Found, Limits, Search
from xopt.tuning.sites import Site, Sites, few_rows

LARGER_BATCH = 8
"""How many times the batch a kernel for any batch is looked at again with."""
CONFIRMING = 0.25
"""Share of the time that is left in which a kernel's best candidates are confirmed, not others tried."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        kernel: the one in work.
        gain: how many times faster than by heuristic the best configuration for it is so far.
        done, total: candidates.
        rest: estimated seconds to the end.
    """

    kernel: str
    gain: float
    done: int
    total: int
    rest: float


@dataclass(frozen=True)
class Kernel:
    """What came of one kernel.

    Attributes:
        site: the kernel.
        count: calls of it in one run of the model.
        status: "faster", "unbeaten" (the heuristic's configuration is the best), "failed" or "left" (no time).
        record: what is in the database.
        known: it was there before.
        reason: why it failed.
        failures: candidates that failed, and how.
    """

    site: Site
    count: int
    status: str
    record: Record | None = None
    known: bool = False
    reason: str = ""
    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Tuning:
    """The outcome for a model.

    Attributes:
        kernels: those that have a choice, by the work they were expected to be.
        seconds: how long it took.
        database: where the records are.
        threads: the kernels ran on so many.
    """

    kernels: tuple[Kernel, ...]
    seconds: float
    database: Path
    threads: int

    @property
    def gain(self) -> float:
        """Time of all calls of the measured kernels by heuristic, over that after tuning."""
        measured = [(kernel.count, kernel.record) for kernel in self.kernels if kernel.record is not None]
        before = sum(count * record.heuristic_seconds for count, record in measured)
        after = sum(count * record.seconds for count, record in measured)
        return before / after if after else 1.0


@dataclass(frozen=True)
class Tuner:
    """Tunes for one target into one database.

    Args:
        target: must run on this machine.
        database: where records go; those it has already are not measured again.
        trials: candidates for each kernel.
        timeout: seconds for the whole run; what is in work then is cut off a moment later.
        candidate_timeout: seconds for a candidate to be built, or to be timed.
        workers: processes that build at the same time.
        again: measure what is known, too.
        progress: called after each candidate.
        finished: called after each kernel.
    """

    target: Target
    database: Database
    trials: int
    timeout: float
    candidate_timeout: float
    workers: int
    again: bool = False
    progress: Callable[[Progress], None] = lambda progress: None
    finished: Callable[[Kernel], None] = lambda kernel: None

    def run(self, model: ir.Model, feeds: Mapping[str, tuple[int, ...]]) -> Tuning:
        """Tune the kernels of a canonical model for inputs of the given shapes.

        Raises:
            InputError: E-TARGET, nothing can be measured for the target here; E-OUTPUT, the database cannot be written.
        """
        if not self.target.can_run() or self.target.isa() is None:
            what = f"tuning measures on the target, and {self.target.name} cannot be measured here"
            raise InputError("E-TARGET", what, cure="tune on the machine that the model will run on")
        start = time.monotonic()
        make(self.database.paths[0])
        sites = Sites(model, self.target, feeds)
        counts = sites.counts()
        larger = self._larger(model, feeds, sites)
        order = sorted((site for site in counts if len(self._space(site)) > 1), key=lambda s: -counts[s] * _work(s))
        known = {} if self.again else {record.subject: record for record in read(self.database.paths[0])}
        ends = {site: known.get(self._record(site, None).subject) for site in order}
        kernels = [
            Kernel(site, counts[site], _status(record), record, known=True)
            for site, record in ends.items()
            if record is not None
        ]
        todo = [site for site in order if ends[site] is None]
        until = start + self.timeout
        clock = _Clock(self, start, sum(min(self.trials, len(self._space(site)) - 1) for site in todo))
        with Pool(self.target, self.database.threads, self.workers, until) as pool:
            for site in todo:
                kernel = Kernel(site, counts[site], "left")
                if clock.left > 0:
                    deadline = until - CONFIRMING * clock.left
                    limits = Limits(self.trials, self.candidate_timeout, deadline)
                    search = Search(
                        site, _others(site, larger), partial(sites.constants, site), self.target.isa(), pool, limits,
                        partial(clock.step, str(site)),
                    )  # fmt: skip
                    kernel = self._tuned(search, counts[site])
                    clock.skip(min(self.trials, len(self._space(site)) - 1))
                kernels.append(kernel)
                self.finished(kernel)
        kernels.sort(key=lambda kernel: order.index(kernel.site))
        return Tuning(tuple(kernels), time.monotonic() - start, self.database.paths[0], self.database.threads)

    def _tuned(self, search: Search, count: int) -> Kernel:
        """Search, and keep what was found."""
        try:
            found = search.run()
        except CandidateError as error:
            return Kernel(search.site, count, "failed", reason=str(error))
        except OutOfTimeError:
            return Kernel(search.site, count, "left")
        finally:
            for worker in search.pool.workers:
                with suppress(CandidateError, OutOfTimeError):
                    worker.ask("forget", seconds=self.candidate_timeout)
        failures = tuple((str(config), reason) for config, reason in found.failures.items())
        if search.limits.over and found.config == found.heuristic:
            return Kernel(search.site, count, "left", failures=failures)
        record = self._record(search.site, found)
        self.database.add(record)
        return Kernel(search.site, count, _status(record), record, failures=failures)

    def _space(self, site: Site) -> set[Any]:
        family, isa = family_of(site.family), self.target.isa()
        return {family.heuristic(site.workload, isa), *family.space(site.workload, isa)}

    def _larger(self, model: ir.Model, feeds: Mapping[str, tuple[int, ...]], sites: Sites) -> dict[Site, Site]:
        """Each kernel that serves any batch, as it is called with a larger one."""
        batches = {
            str(value.name)
            for value in model.graph.inputs
            if value.shape is not None and value.shape.rank() and not isinstance(value.shape[0], int)
        }
        shapes = {
            name: (shape[0] * LARGER_BATCH, *shape[1:]) if name in batches else shape for name, shape in feeds.items()
        }
        grown = dataclasses.replace(sites, feeds=shapes).counts()
        pairs = zip(sites.counts(), grown)
        return {site: other for site, other in pairs if site != other and site.workload == other.workload}

    def _record(self, site: Site, found: Found | None) -> Record:
        family, isa = family_of(site.family), self.target.isa()
        assert isa is not None
        return Record(
            kernel=family_name(family),
            version=family.VERSION,
            isa=isa.name,
            threads=self.database.threads,
            machine=self.database.machine,
            workload=fields_of(site.workload),
            shapes=site.shapes,
            config={} if found is None else dataclasses.asdict(found.config),
            seconds=0.0 if found is None else found.seconds,
            heuristic={} if found is None else dataclasses.asdict(found.heuristic),
            heuristic_seconds=0.0 if found is None else found.heuristic_seconds,
            trials=0 if found is None else found.trials,
        )


class _Clock:
    """Counts candidates and seconds of a run."""

    def __init__(self, tuner: Tuner, start: float, total: int) -> None:
        self._tuner = tuner
        self._start = start
        self._total = total
        self._done = 0
        self._skipped = 0

    @property
    def left(self) -> float:
        """Seconds."""
        return self._start + self._tuner.timeout - time.monotonic()

    def step(self, kernel: str, gain: float) -> None:
        """One more candidate is done."""
        self._done += 1
        spent = time.monotonic() - self._start
        rest = min(self.left, spent / self._done * (self._total - self._done))
        self._tuner.progress(Progress(kernel, gain, self._done, self._total, max(rest, 0.0)))

    def skip(self, trials: int) -> None:
        """A kernel with so many candidates is done, though not all of them may have been tried."""
        self._skipped += trials
        self._done = self._skipped


def _others(site: Site, larger: Mapping[Site, Site]) -> tuple[Site, ...]:
    """Shapes that a kernel serves too, and must not lose on."""
    return tuple(other for other in (larger.get(site), few_rows(site)) if other is not None)


def _status(record: Record | None) -> str:
    return "left" if record is None else "unbeaten" if record.config == record.heuristic else "faster"


def _work(site: Site) -> float:
    """What a call costs, roughly: every result is a sum over the last axis of the first operand, or passes by once."""
    return float(sum(math.prod(tensor.shape) for tensor in site.outputs)) * site.inputs[0].shape[-1]
