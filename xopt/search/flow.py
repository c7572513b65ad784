"""Run a job: exact passes, then each lossy one on trial, then one measurement of everything side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from xopt.errors import InputError
from xopt.ir.cost import cost
from xopt.ir.exporting import export
from xopt.ir.io import save
from xopt.measure import peers
from xopt.measure.accuracy import Evaluator
from xopt.measure.isolated import isolated
from xopt.measure.latency import Latency
from xopt.pipeline.base import Effect, Pass, PassReport, Refusal
from xopt.pipeline.context import PassContext, silent
from xopt.pipeline.manager import PassManager
from xopt.runtime.reference import ReferenceSession
from xopt.search.cache import StepCache
from xopt.search.job import Job
from xopt.search.lab import UNCOMPILED, Candidate, Lab
from xopt.search.proof import Agreement, agree, check_precision
from xopt.search.steps import Step, exact_step, lossy_step, step_from_record, too_much, within_budget

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.instruments import Instrument

Progress = Callable[[str, int, int], None]
FINAL_ROUNDS = 30
FINAL_SECONDS = 15.0
OPTIMIZED = "onnxruntime-optimized"
"""The optimized model's ONNX file in onnxruntime, among the runtimes."""


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        best: the model after all kept passes, with its artifact.
        steps: one for each pass, in order.
        baseline: quality of the original.
        samples: how many samples quality was measured on.
        runtimes: latency of each peer, and of the optimized ONNX file in onnxruntime.
        skipped: peers that could not be measured, and why.
        precision: quality and drop of the original as it is compiled, before any lossy pass.
        agreement: how ``best``'s artifact and its ONNX file agree; None where the target cannot run here.
        missing: why there is no artifact; None where there is one.
    """

    best: Candidate
    steps: list[Step]
    baseline: float
    samples: int
    runtimes: dict[str, Latency] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    precision: tuple[float, float] | None = None
    agreement: Agreement | None = None
    missing: InputError | None = None


def run(
    job: Job, folder: Path, cache: StepCache, *, instruments: Sequence[Instrument] = (), progress: Progress = silent
) -> Outcome:
    """Run the job; artifacts are left in ``folder``.

    Args:
        job: what to do.
        folder: an empty one.
        cache: steps that were finished before.
        instruments: what watches each run of a pass.
        progress: called with (stage, done, total).
    """
    original = ReferenceSession(job.model, job.threads)
    evaluator = Evaluator(job.metric, job.evaluation, original)
    baseline = evaluator.baseline()
    lab = Lab(job.target, evaluator, baseline, job.feeds, job.dims, job.threads, folder, progress)
    outcome = _passes(job, lab, cache, instruments)
    _compiled(lab, lambda: lab.build(outcome.best))
    outcome.missing = lab.missing
    if lab.runs:
        _measure(job, lab, outcome)
    return outcome


def _compiled(lab: Lab, build: Callable[[], None]) -> bool:
    """Whether the target has code for a model that nothing lossy was done to; where not, the lab goes on without."""
    try:
        build()
    except InputError as error:
        if error.code != UNCOMPILED:
            raise
        lab.missing = error
    return lab.missing is None


def _passes(job: Job, lab: Lab, cache: StepCache, instruments: Sequence[Instrument]) -> Outcome:
    manager = PassManager(job.all_passes, instruments=instruments)
    context = PassContext(
        seed=job.seed,
        calibration=job.calibration,
        tile=job.target.tile,
        dims=dict(job.dims),
        latency=lab.latency if lab.runs else None,
        progress=lab.progress,
    )
    outcome = Outcome(
        Candidate(job.model, lab.baseline, 0.0, cost(job.model, job.dims)), [], lab.baseline, lab.evaluator.samples
    )
    for index, one in enumerate(manager.passes, start=1):
        lab.progress(one.name, index - 1, len(manager.passes))
        apply = _applier(manager, context, index, optional=job.optional and one.effect is Effect.LOSSY)
        step = _one_step(one, outcome.best, lab, apply, job.max_drop, cache)
        outcome.steps.append(step)
        if step.kept or one.effect is Effect.EXACT:
            outcome.best = step.candidate
        following = manager.passes[index] if index < len(manager.passes) else None
        if one.effect is Effect.EXACT and (following is None or following.effect is Effect.LOSSY):
            _judge_exact(job, lab, outcome)
        lab.progress(one.name, index, len(manager.passes))
    return outcome


def _judge_exact(job: Job, lab: Lab, outcome: Outcome) -> None:
    """Judge what the last exact passes led to, where the compiled model may differ from what was verified.

    The first time, that is the original as it is compiled: what its precision costs. Later on, exact passes whose
    compiled model goes over the budget are left out.

    Raises:
        InputError: E-BUDGET, the precision alone costs more than is allowed.
        VerificationError: E-VERIFY, the compiled model computes no numbers where the original does.
    """
    first = outcome.precision is None
    if not lab.runs or (first and not _compiled(lab, lambda: lab.build(outcome.best))):
        outcome.precision = outcome.precision or (outcome.best.quality, outcome.best.drop)
        return
    row = list(takewhile(lambda step: step.report.pass_.effect is Effect.EXACT, reversed(outcome.steps)))
    lab.assess(outcome.best)
    for step in row:
        step.candidate.quality, step.candidate.drop = outcome.best.quality, outcome.best.drop
        step.candidate.judged = outcome.best.judged
    if first:
        outcome.precision = (outcome.best.quality, outcome.best.drop)
        check_precision(outcome.best, lab, job)
    elif not within_budget(outcome.best, job.max_drop):
        reason = too_much(outcome.best, job.max_drop)
        for step in row:
            step.kept, step.reason = False, reason if step.report.rewritten else step.reason
        before = reversed(outcome.steps[: -len(row)])
        outcome.best = next(s.candidate for s in before if s.kept or s.report.pass_.effect is Effect.EXACT)


def _one_step(
    one: Pass,
    best: Candidate,
    lab: Lab,
    apply: Callable[[Pass, ir.Model], PassReport],
    max_drop: float | None,
    cache: StepCache,
) -> Step:
    cache.enter(one)
    if (known := cache.recall()) is not None:
        return step_from_record(one, *known, best, lab)
    start = time.perf_counter()
    if one.effect is Effect.EXACT:
        step = exact_step(one, best, lab, apply)
    else:
        step = lossy_step(one, best, lab, apply, max_drop)
    step.seconds = time.perf_counter() - start
    model = cache.keep(step.candidate.model, step.to_dict())
    if step.candidate is not best:
        step.candidate.model = model
    return step


def _applier(
    manager: PassManager, context: PassContext, index: int, *, optional: bool
) -> Callable[[Pass, ir.Model], PassReport]:
    """Runs a pass as step ``index`` of the manager, with its instruments."""

    def apply(one: Pass, model: ir.Model) -> PassReport:
        try:
            return manager.step(one, model, context, index=index, remaining=manager.passes[index:]).report
        except InputError as error:
            if not optional:
                raise
            report = PassReport(one)
            report.refused.append(Refusal(error.where or "model", error.what))
            return report

    return apply


def _measure(job: Job, lab: Lab, outcome: Outcome) -> None:
    """Time every step and every peer in turns, so that all ratios come from one run."""
    stages = _stages(outcome.steps)
    for candidate in stages:
        lab.build(candidate)
    runners = {f"step {id(c)}": c.runner for c in stages if c.runner is not None}
    others = peers.factories(_original_file(job, lab.folder), job.feeds, threads=job.threads, names=job.peers)
    optimized = lab.folder / "optimized.onnx"
    save(export(outcome.best.model), optimized)
    others[OPTIMIZED] = partial(peers.onnxruntime_runner, optimized, job.threads)
    with isolated(others, job.feeds, job.threads) as found:
        times = lab.measure(runners, beside=found.contenders, rounds=FINAL_ROUNDS, seconds=FINAL_SECONDS)
    outcome.skipped = found.skipped
    outcome.runtimes = {name: times[name] for name in found.contenders}
    for step in outcome.steps:
        step.latency = times[f"step {id(step.measured)}"]
    outcome.agreement = agree(outcome.best, lab, job)


def _stages(steps: Sequence[Step]) -> list[Candidate]:
    """The models to time, each once: exact passes in a row are measured after the last of them."""
    following: Candidate | None = None
    for step in reversed(steps):
        exact = step.report.pass_.effect is Effect.EXACT
        if exact and following is not None:
            step.measured = following
        following = step.measured if exact else None
    found: list[Candidate] = []
    for step in steps:
        if all(step.measured is not candidate for candidate in found):
            found.append(step.measured)
    return found


def _original_file(job: Job, folder: Path) -> Path:
    """The file of the original, written where the model came from memory."""
    if job.path is not None:
        return job.path
    path = folder / "original.onnx"
    save(job.model, path)
    return path
