"""Keep, weaken, roll back: every decision and its words, with a lab whose measurements are written by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ir import builders
from xopt.data import metrics
from xopt.ir.cost import cost
from xopt.measure.accuracy import Evaluator
from xopt.measure.latency import Latency
from xopt.pipeline.base import Between, Effect, Pass, PassReport, Strength
from xopt.search.lab import Candidate, Lab
from xopt.search.steps import exact_step, lossy_step
from xopt.search.strength import weaker


@dataclass(frozen=True)
class Shrink(Pass):
    """Writes its strength into the model."""

    name: ClassVar[str] = "shrink"
    effect: ClassVar[Effect] = Effect.LOSSY

    amount: Annotated[float, Between(0.0, 1.0), Strength(0.0)] = 0.8
    steps: Annotated[tuple[int, ...], Between(0, 99), Strength(0)] = ()
    other: int = 7

    def run(self, model: ir.Model, context: Any) -> PassReport:
        model.metadata_props["amount"] = str(self.amount)
        report = PassReport(self)
        report.rewrote(count=1 if self.amount else 0)
        return report


@dataclass(frozen=True)
class Exactly(Shrink):
    """The same, said to be exact."""

    effect: ClassVar[Effect] = Effect.EXACT


@dataclass
class FakeTarget:
    """A target that runs here, or does not."""

    runs: bool

    def can_run(self) -> bool:
        return self.runs


@dataclass
class FakeLab(Lab):
    """Quality and latency are functions of the strength that the pass has left in the model."""

    quality: Callable[[float], float] = field(default=lambda amount: 1.0)
    speed: Callable[[float], float] = field(default=lambda amount: 1.0 - amount / 2)

    def judge(self, model: ir.Model) -> Candidate:
        quality = self.quality(_amount(model))
        return Candidate(model, quality, self.evaluator.drop(1.0, quality), cost(model))

    def race(self, candidate: Candidate, best: Candidate) -> tuple[Latency, Latency]:
        pair = [self.speed(_amount(c.model)) for c in (candidate, best)]
        return Latency((pair[0],) * 5), Latency((pair[1],) * 5)


def _amount(model: ir.Model) -> float:
    return float(model.metadata_props.get("amount", 0.0))


def lab(runs: bool = True, **behaviour: Callable[[float], float]) -> FakeLab:
    evaluator = Evaluator(metrics.get("top-1"), None, None)  # type: ignore[arg-type]
    target: Any = FakeTarget(runs)
    return FakeLab(target, evaluator, 1.0, {}, {}, 1, Path("unused"), **behaviour)


def apply(one: Pass, model: ir.Model) -> PassReport:
    return one.run(model, None)  # type: ignore[arg-type]


@pytest.fixture
def best() -> Candidate:
    model = builders.vit()
    return Candidate(model, 1.0, 0.0, cost(model))


def test_within_the_budget_and_faster_is_kept(best: Candidate) -> None:
    step = lossy_step(Shrink(), best, lab(), apply, 0.01)
    assert step.kept
    assert step.reason == "drop 0.0000, 1.67x faster"
    assert _amount(step.candidate.model) == 0.8
    assert _amount(best.model) == 0.0


def test_slower_is_rolled_back(best: Candidate) -> None:
    step = lossy_step(Shrink(), best, lab(speed=lambda amount: 1 + amount), apply, None)
    assert not step.kept
    assert step.reason == "slower, 0.556x the speed in paired runs"


def test_as_fast_as_before_is_rolled_back(best: Candidate) -> None:
    step = lossy_step(Shrink(), best, lab(speed=lambda amount: 1 - amount / 1000), apply, None)
    assert not step.kept
    assert step.reason.startswith("not faster")


def test_too_costly_is_weakened_to_what_the_budget_allows(best: Candidate) -> None:
    """Quality falls linearly to 0.9; a budget of 0.05 allows half of the strength; three halvings find 3/8 ... 1/2."""
    step = lossy_step(Shrink(amount=0.8), best, lab(quality=lambda amount: 1 - amount / 8), apply, 0.0501)
    assert step.kept
    assert step.reason.startswith("weakened, drop 0.0500")
    assert step.report.pass_.values()["amount"] == 0.4
    assert [trial.verdict for trial in step.trials[:1]] == ["drop 0.1000 > 0.0501"]
    assert len(step.trials) == 5  # full strength, three halvings, the decision by latency


def test_too_costly_at_every_strength_is_rolled_back(best: Candidate) -> None:
    step = lossy_step(Shrink(), best, lab(quality=lambda amount: 0.5 if amount else 1.0), apply, 0.01)
    assert not step.kept
    assert step.reason == "drop 0.5000 > 0.0100"
    assert [trial.options["amount"] for trial in step.trials] == [0.8, 0.4, 0.2, 0.1]


def test_without_a_budget_only_sense_and_speed_count(best: Candidate) -> None:
    assert lossy_step(Shrink(), best, lab(quality=lambda amount: 0.1), apply, None).kept
    broken = lossy_step(Shrink(), best, lab(quality=lambda amount: float("nan")), apply, None)
    assert not broken.kept
    assert broken.reason == "the outputs are no longer finite"


def test_nothing_to_rewrite_is_said_with_the_reasons(best: Candidate) -> None:
    def refuse(one: Pass, model: ir.Model) -> PassReport:
        report = PassReport(one)
        for place in ("a", "b"):
            report.accepts(place, "shared-weight")
        return report

    for step in (lossy_step(Shrink(), best, lab(), refuse, 0.01), exact_step(Exactly(), best, lab(), refuse)):
        assert not step.kept
        assert step.reason == "nothing to rewrite: shared-weight (2)"
        assert step.candidate.quality == best.quality


def test_where_the_target_cannot_run_the_cost_model_decides(best: Candidate) -> None:
    def cut(one: Pass, model: ir.Model) -> PassReport:
        smaller = builders.vit(layers=1)
        model.graph = smaller.graph
        return apply(one, model)

    kept = lossy_step(Shrink(), best, lab(runs=False), cut, 0.01)
    assert kept.kept
    assert "MACs" in kept.reason and kept.reason.endswith("latency not measured")
    same = lossy_step(Shrink(), best, lab(runs=False), apply, 0.01)
    assert not same.kept
    assert same.reason.startswith("no less work") and same.reason.endswith("latency not measured")


def test_an_exact_pass_is_kept_without_a_trial(best: Candidate) -> None:
    step = exact_step(Exactly(), best, lab(), apply)
    assert step.kept and step.reason == "exact"
    assert step.candidate.quality == best.quality


@given(amount=st.floats(0.01, 1.0), share=st.floats(0.0, 1.0), steps=st.lists(st.integers(0, 99), max_size=5))
def test_weaker_lies_between_harmless_and_given(amount: float, share: float, steps: list[int]) -> None:
    given_pass = Shrink(amount=amount, steps=tuple(steps), other=9)
    found = weaker(given_pass, share)
    if found is None:
        assert share * amount < 1e-4
        return
    assert isinstance(found, Shrink)
    assert 0 <= found.amount <= amount + 5e-5
    assert all(0 <= now <= before for now, before in zip(found.steps, given_pass.steps, strict=True))
    assert found.other == 9


def test_a_pass_without_strength_cannot_be_weaker() -> None:
    @dataclass(frozen=True)
    class Plain(Pass):
        """No strength."""

        name: ClassVar[str] = "plain"
        effect: ClassVar[Effect] = Effect.LOSSY
        width: int = 3

        def run(self, model: ir.Model, context: Any) -> PassReport:
            return PassReport(self)

    assert weaker(Plain(), 0.5) is None
