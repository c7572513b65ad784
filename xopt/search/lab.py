"""Where candidates are measured: quality against the original, latency on the target beside the best so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from xopt.errors import InputError
from xopt.measure.accuracy import ARTIFACT, REFERENCE, Evaluator
from xopt.measure.latency import Contender, Latency, Local, Runner, in_turns, pinned
from xopt.pipeline.context import silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.ir.cost import Cost
    from xopt.targets.base import Target

UNCOMPILED = "E-UNSUPPORTED-OP"
"""The error of a model that the target has no code for."""
DECISION_ROUNDS = 15
DECISION_SECONDS = 10.0
NOBODY: Mapping[str, Contender] = MappingProxyType({})


@dataclass
class Candidate:
    """A canonical model with what is known about it.

    Attributes:
        model: the graph.
        quality: the metric on the evaluation data.
        drop: how much of the original's quality is lost.
        cost: parameters, bytes, multiply-accumulates.
        artifact: the compiled library; None until it is built.
        runner: the loaded artifact; None where the target cannot run here.
        judged: what ``quality`` is of; that of a model before it which an exact pass has left as it was also counts.
    """

    model: ir.Model
    quality: float
    drop: float
    cost: Cost
    artifact: Path | None = None
    runner: Runner | None = None
    judged: str = REFERENCE


@dataclass(frozen=True)
class Running:
    """A loaded artifact as something that runs."""

    runner: Runner

    def run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return self.runner(feeds)


@dataclass
class Lab:
    """The means to judge a candidate.

    Attributes:
        target: what is compiled for.
        evaluator: the metric, the data, the original.
        baseline: the original's quality.
        feeds: arrays of the run that is timed.
        dims: sizes of the symbolic axes in ``feeds``.
        threads: CPU threads for everything that is timed.
        folder: for artifacts; the caller removes it.
        progress: called with (stage, done, total).
        missing: why there is no artifact, once the original was found not to compile; nothing is compiled then.
    """

    target: Target
    evaluator: Evaluator
    baseline: float
    feeds: Mapping[str, np.ndarray]
    dims: Mapping[str, int]
    threads: int
    folder: Path
    progress: Callable[[str, int, int], None] = silent
    missing: InputError | None = None
    _built: int = field(default=0)

    @property
    def runs(self) -> bool:
        """Whether there is code of the target, and it runs on this machine, so that latency can be measured."""
        return self.missing is None and self.target.can_run()

    def judge(self, model: ir.Model) -> Candidate:
        """Quality and cost of ``model``."""
        from xopt.ir.cost import cost

        candidate = Candidate(model, float("nan"), float("inf"), cost(model, self.dims))
        self.assess(candidate)
        return candidate

    def assess(self, candidate: Candidate) -> None:
        """Measure the quality of the compiled artifact, or in onnxruntime where that cannot run here."""
        from xopt.runtime.reference import ReferenceSession

        if self.runs:
            self.build(candidate)
        if candidate.runner is not None:
            candidate.judged = ARTIFACT
            quality = self.evaluator.evaluate(Running(candidate.runner), self.progress)
        else:
            candidate.judged = REFERENCE
            quality = self.evaluator.evaluate(ReferenceSession(candidate.model, self.threads), self.progress)
        candidate.quality, candidate.drop = quality, self.evaluator.drop(self.baseline, quality)

    def discard(self, candidate: Candidate) -> None:
        """Remove the artifact of a candidate that nobody asks about any more."""
        import shutil

        if candidate.artifact is not None:
            shutil.rmtree(candidate.artifact.parent, ignore_errors=True)
        candidate.artifact = candidate.runner = None

    def build(self, candidate: Candidate) -> None:
        """Compile the candidate for the target, and load it where that runs."""
        if candidate.artifact is None and self.missing is None:
            self.progress("compile", 0, 1)
            candidate.artifact, candidate.runner = self._compile(candidate.model)
            self.progress("compile", 1, 1)

    def race(self, candidate: Candidate, best: Candidate) -> tuple[Latency, Latency]:
        """Latency of the candidate and of the best so far, measured in turns."""
        self.build(best)
        self.build(candidate)
        assert candidate.runner is not None and best.runner is not None
        times = self.measure({"candidate": candidate.runner, "best": best.runner})
        return times["candidate"], times["best"]

    def measure(
        self,
        runners: Mapping[str, Runner],
        *,
        beside: Mapping[str, Contender] = NOBODY,
        rounds: int = DECISION_ROUNDS,
        seconds: float = DECISION_SECONDS,
    ) -> dict[str, Latency]:
        """Latency of each runner on the feeds, in turns with others, on the first ``threads`` cores."""
        ours = {name: Local(run, self.feeds) for name, run in runners.items()}
        with pinned(self.threads):
            return in_turns({**ours, **beside}, rounds=rounds, seconds=seconds, progress=self.progress)

    def latency(self, model: ir.Model) -> float:
        """Median milliseconds of ``model`` on the target, for passes that optimize it."""
        with self._forgotten():
            _, runner = self._compile(model)
            assert runner is not None
            return self.measure({"model": runner}, rounds=7, seconds=2.0)["model"].median

    def _compile(self, model: ir.Model) -> tuple[Path, Runner | None]:
        from xopt import targets
        from xopt.runtime.session import Session

        folder = self.folder / f"{self._built:03d}"
        self._built += 1
        folder.mkdir()
        library = targets.compile(model, self.target, folder / "model.so")
        return library, Session.load(library, threads=self.threads).run if self.runs else None

    @contextmanager
    def _forgotten(self) -> Iterator[None]:
        """Remove the artifact that is built inside."""
        import shutil

        folder = self.folder / f"{self._built:03d}"
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
