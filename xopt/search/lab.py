"""Where candidates are measured: quality against the original, latency on the target beside the best so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from xopt.measure.accuracy import Evaluator
from xopt.measure.latency import Contender, Latency, Local, Runner, in_turns, pinned
from xopt.pipeline.context import silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.ir.cost import Cost
    from xopt.targets.base import Target

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
    """

    model: ir.Model
    quality: float
    drop: float
    cost: Cost
    artifact: Path | None = None
    runner: Runner | None = None


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
    """

    target: Target
    evaluator: Evaluator
    baseline: float
    feeds: Mapping[str, np.ndarray]
    dims: Mapping[str, int]
    threads: int
    folder: Path
    progress: Callable[[str, int, int], None] = silent
    _built: int = field(default=0)

    @property
    def runs(self) -> bool:
        """Whether the target's code runs on this machine, so that latency can be measured."""
        return self.target.can_run()

    def judge(self, model: ir.Model) -> Candidate:
        """Quality and cost of ``model``, which is computed by the reference runtime."""
        from xopt.ir.cost import cost
        from xopt.runtime.reference import ReferenceSession

        quality = self.evaluator.evaluate(ReferenceSession(model, self.threads), self.progress)
        return Candidate(model, quality, self.evaluator.drop(self.baseline, quality), cost(model, self.dims))

    def build(self, candidate: Candidate) -> None:
        """Compile the candidate for the target, and load it where that runs."""
        if candidate.artifact is None:
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
