"""Try one pass after the other: keep it, weaken it, or roll it back, and say why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xopt.errors import InputError
from xopt.measure.accuracy import REFERENCE
from xopt.measure.latency import Latency
from xopt.pipeline import text
from xopt.pipeline.base import Effect, OptionValue, Pass, PassReport
from xopt.search.lab import UNCOMPILED, Candidate, Lab
from xopt.search.strength import weaker

if TYPE_CHECKING:
    import onnx_ir as ir

FASTER = 0.99
"""A lossy pass must bring the latency below this share of the best so far; the rest is noise of the measurement."""
ROUNDING = 1e-6
"""A loss up to this is rounding of the metric."""
BISECTIONS = 3
"""How often the strength of a pass that costs too much is halved between what failed and what held."""

Apply = Callable[[Pass, "ir.Model"], PassReport]
"""Runs a pass on a model in place, with all instruments."""


@dataclass(frozen=True)
class Trial:
    """One attempt at a strength: the options, what they cost, and the verdict."""

    options: dict[str, OptionValue]
    quality: float | None
    drop: float | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {"options": self.options, "quality": self.quality, "drop": self.drop, "verdict": self.verdict}


@dataclass
class Step:
    """What became of one pass.

    Attributes:
        report: what the pass did to the model, at its final strength.
        kept: whether its result was kept.
        reason: why, in words.
        candidate: the model after the pass, with quality, cost and artifact (also when it was not kept).
        trials: every attempt, in order.
        race: latency of the candidate and of the best before it, as measured for the decision.
        latency: of the final measurement, in turns with all other steps and the peers.
    """

    report: PassReport
    kept: bool
    reason: str
    candidate: Candidate
    trials: list[Trial] = field(default_factory=list)
    race: tuple[Latency, Latency] | None = None
    latency: Latency | None = None
    seconds: float = 0.0
    measured: Candidate = field(init=False)
    """Whose latency stands for this step: the candidate's, or that of the last exact pass in a row of them."""

    def __post_init__(self) -> None:
        self.measured = self.candidate

    def to_dict(self) -> dict[str, Any]:
        """The step as in report.json (docs/cli-json.md)."""
        latency = self.latency
        done = self.report.to_dict()
        return {
            "pass": done.pop("pass"),
            "options": done.pop("options"),
            "kept": self.kept,
            "reason": self.reason,
            "quality": self.candidate.quality,
            "judged": self.candidate.judged,
            "latency_ms": None if latency is None else latency.to_dict(),
            "macs": int(self.candidate.cost.macs),
            "bytes": int(self.candidate.cost.bytes),
            "text": text.render([self.report.pass_]),
            "parameters": int(self.candidate.cost.parameters),
            "drop": self.candidate.drop,
            "effect": self.report.pass_.effect.value,
            **done,
            "trials": [trial.to_dict() for trial in self.trials],
            "samples_ms": None if latency is None else list(latency.samples_ms),
            "decision_samples_ms": None
            if self.race is None
            else {"candidate": list(self.race[0].samples_ms), "best": list(self.race[1].samples_ms)},
            "seconds": self.seconds,
        }


def step_from_record(one: Pass, model: ir.Model, record: dict[str, Any], best: Candidate, lab: Lab) -> Step:
    """A step that was finished before, from what ``Step.to_dict`` said of it and the model it led to."""
    from xopt.ir.cost import cost
    from xopt.pipeline import registry
    from xopt.pipeline.base import Refusal

    report = PassReport(registry.create(one.name, record["options"]), record["matched"], record["rewritten"])
    report.refused = [Refusal(**refusal) for refusal in record["refused"]]
    report.numbers = record["numbers"]
    candidate = best
    if report.rewritten or one.effect is Effect.EXACT:
        candidate = Candidate(
            model, record["quality"], record["drop"], cost(model, lab.dims), judged=record.get("judged", REFERENCE)
        )
    step = Step(report, record["kept"], record["reason"], candidate, [Trial(**trial) for trial in record["trials"]])
    if (race := record["decision_samples_ms"]) is not None:
        step.race = (Latency(tuple(race["candidate"])), Latency(tuple(race["best"])))
    step.seconds = record["seconds"]
    return step


def exact_step(one: Pass, best: Candidate, lab: Lab, apply: Apply) -> Step:
    """Run an exact pass: what it computes was verified, so the model goes on with it.

    Also a pass with nothing to rewrite leaves its model: canonicalize has inferred the shapes.
    """
    from xopt.ir.cost import cost

    assert one.effect is Effect.EXACT
    model = best.model.clone()
    report = apply(one, model)
    reason = "exact" if report.rewritten else _nothing(report)
    candidate = Candidate(model, best.quality, best.drop, cost(model, lab.dims), judged=best.judged)
    return Step(report, report.rewritten > 0, reason, candidate)


def lossy_step(one: Pass, best: Candidate, lab: Lab, apply: Apply, max_drop: float | None) -> Step:
    """Try a lossy pass at its full strength, and weaker ones by bisection when it costs more than ``max_drop``.

    The strongest version within the budget is then raced against the best so far, and kept when it is faster.
    """
    trials: list[Trial] = []
    first = _attempt(one, best, lab, apply, max_drop, trials)
    found = first if first.kept else None
    if found is None and max_drop is not None and first.report.rewritten:
        found = _strongest_within(one, best, lab, apply, max_drop, trials)
    step = found or first
    if step is not first:
        lab.discard(first.candidate)
    step.trials = trials
    if found is not None:
        _decide_by_latency(found, best, lab)
    return step


def _attempt(one: Pass, best: Candidate, lab: Lab, apply: Apply, max_drop: float | None, trials: list[Trial]) -> Step:
    """Run the pass and judge its quality; ``kept`` says whether that is within the budget."""
    model = best.model.clone()
    report = apply(one, model)
    if not report.rewritten:
        trials.append(Trial(one.values(), None, None, _nothing(report)))
        return Step(report, False, _nothing(report), best)
    try:
        candidate = lab.judge(model)
    except InputError as error:
        if error.code != UNCOMPILED:
            raise
        reason = f"it can no longer be compiled: {error.what}"
        trials.append(Trial(one.values(), None, None, reason))
        return Step(report, False, reason, best)
    within = within_budget(candidate, max_drop)
    reason = f"drop {candidate.drop:.4f}" if within else too_much(candidate, max_drop)
    trials.append(Trial(one.values(), candidate.quality, candidate.drop, "within budget" if within else reason))
    return Step(report, within, reason, candidate)


def _strongest_within(
    one: Pass, best: Candidate, lab: Lab, apply: Apply, max_drop: float, trials: list[Trial]
) -> Step | None:
    low, high = 0.0, 1.0
    found: Step | None = None
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        candidate = weaker(one, share)
        if candidate is None:
            break
        step = _attempt(candidate, best, lab, apply, max_drop, trials)
        if step.kept:
            if found is not None:
                lab.discard(found.candidate)
            found, low = step, share
        elif not step.report.rewritten:
            break
        else:
            lab.discard(step.candidate)
            high = share
    return found


def within_budget(candidate: Candidate, max_drop: float | None) -> bool:
    """Whether a candidate loses no more than is allowed, and computes numbers."""
    limit = float("inf") if max_drop is None else max_drop + ROUNDING
    return candidate.drop <= limit and not math.isnan(candidate.quality)


def _decide_by_latency(step: Step, best: Candidate, lab: Lab) -> None:
    """Keep the step when it is faster on the target, or does less work where that cannot be measured."""
    weakened = "weakened, " if len(step.trials) > 1 else ""
    if not lab.runs:
        before, after = best.cost.macs, step.candidate.cost.macs
        step.kept = after < before or step.candidate.cost.bytes < best.cost.bytes
        change = f"MACs {_short(before)} -> {_short(after)}"
        step.reason = f"{weakened}{step.reason}, {change}" if step.kept else f"no less work, {change}"
        step.reason += ", latency not measured"
        return
    step.race = lab.race(step.candidate, best)
    now, then = step.race
    ratio = _paired_ratio(now, then)
    step.kept = ratio <= FASTER
    if step.kept:
        step.reason = f"{weakened}{step.reason}, {1 / ratio:.2f}x faster"
    else:
        word = "slower" if ratio > 1 / FASTER else "not faster"
        step.reason = f"{word}, {1 / ratio:.3g}x the speed in paired runs"
    step.trials.append(Trial(step.report.pass_.values(), step.candidate.quality, step.candidate.drop, step.reason))


def _paired_ratio(now: Latency, then: Latency) -> float:
    """Median over the rounds of candidate / best: a slow minute of the machine hits both sides of a pair."""
    ratios = sorted(a / b for a, b in zip(now.samples_ms, then.samples_ms))
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


def too_much(candidate: Candidate, max_drop: float | None) -> str:
    if math.isnan(candidate.quality) or max_drop is None:
        return "the outputs are no longer finite"
    places = next((p for p in range(4, 10) if round(candidate.drop, p) > round(max_drop, p)), 10)
    return f"drop {candidate.drop:.{places}f} > {max_drop:.{places}f}"


def _nothing(report: PassReport) -> str:
    if not report.reasons:
        return "nothing to rewrite"
    return "nothing to rewrite: " + ", ".join(f"{reason} ({count})" for reason, count in report.reasons.items())


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} T"
