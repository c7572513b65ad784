"""Find the pass that breaks a check, and within it the place.

The check is given the model after the first n passes. The smallest n that breaks it is searched by bisection, going
on from the longest prefix that is known to be good; then the number of places that this pass may rewrite is
bisected in the same way, for passes that ask ``report.accepts`` for each place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xopt.data.dataset import FAILURES
from xopt.errors import InputError, XoptError
from xopt.pipeline.base import Effect, Pass, application_limit
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.rounding import rounding_bound
from xopt.pipeline.signature import signature_change
from xopt.pipeline.verify import AT_THE_EDGES, attends, compare, compare_edges, fidelity, observe

if TYPE_CHECKING:
    import onnx_ir as ir

Check = Callable[["ir.Model"], "str | None"]
"""Says what is wrong with a model, or None."""


@dataclass(frozen=True)
class Culprit:
    """The first pass after which the check fails."""

    index: int
    """Place in the pipeline, from 1; 0 when the check fails before any pass."""
    pass_: Pass | None
    reason: str
    application: int | None
    """Which of the places that the pass accepted breaks it, from 1; None when it fails without any."""
    site: str
    probes: int
    """How many times the check was asked."""

    def __str__(self) -> str:
        if self.pass_ is None:
            return f"the model fails the check before any pass: {self.reason}"
        place = f", application {self.application} ({self.site})" if self.application is not None else ""
        return f"pass {self.index}, {self.pass_.name}{place}: {self.reason}"


def bisect(model: ir.Model, passes: Sequence[Pass], context: PassContext, check: Check | None = None) -> Culprit | None:
    """The pass of ``passes`` that breaks ``check`` on ``model`` (which is left alone); None when none does.

    Args:
        model: the input of the pipeline.
        passes: the pipeline.
        context: what the passes are run with.
        check: by default ``numeric_check`` against ``model``, exact when all passes are.
    """
    context.fill_in_samples(model)
    exact = all(one.effect is Effect.EXACT for one in passes)
    prober = _Prober(model, passes, context, check or numeric_check(model, context, exact=exact))
    try:
        reason = prober.check(model)
    except XoptError:
        raise
    except FAILURES as error:
        what = f"the check fails on the model itself ({type(error).__name__}: {error})"
        raise InputError("E-OPTION", what, where="--check") from error
    if reason is not None:
        return Culprit(0, None, reason, None, "", prober.probes)
    if prober.fails_after(len(passes)) is None:
        return None
    good, bad = 0, len(passes)
    while bad - good > 1:
        middle = (good + bad) // 2
        if prober.fails_after(middle) is None:
            good = middle
        else:
            bad = middle
    return prober.within(bad)


class _Prober:
    """Runs prefixes of the pipeline from the longest one known to be good."""

    def __init__(self, model: ir.Model, passes: Sequence[Pass], context: PassContext, check: Check) -> None:
        self.passes = passes
        self.context = context
        self.probes = 0
        self._check = check
        self._good = (0, model)

    def check(self, model: ir.Model) -> str | None:
        self.probes += 1
        return self._check(model)

    def run(self, model: ir.Model, passes: Sequence[Pass]) -> tuple[str | None, list[str]]:
        """What is wrong after ``passes`` (an error of a pass counts), and the places the last one accepted."""
        manager = PassManager(passes, instruments=())
        try:
            steps = manager.run(model, self.context)
            return self.check(model), steps[-1].report.accepted
        except FAILURES as error:  # a pass that fails is what we are looking for
            return str(error), []

    def fails_after(self, count: int) -> str | None:
        """What is wrong after the first ``count`` passes, or None."""
        done, model = self._good
        probe = model.clone()
        reason, _ = self.run(probe, self.passes[done:count])
        if reason is None:
            self._good = (count, probe)
        return reason

    def within(self, index: int) -> Culprit:
        """Bisect the places of pass ``index``, whose prefix of ``index - 1`` passes is known to be good."""
        assert self._good[0] == index - 1
        one = self.passes[index - 1]
        reason, places = self.run(self._good[1].clone(), [one])
        if reason is None:
            what = f"after {one.name} the check fails once and holds once"
            raise InputError("E-OPTION", what, where="--check", cure="give one that always says the same of a model")
        if not places or self._limited(one, 0)[0] is not None:
            return Culprit(index, one, reason, None, "", self.probes)
        good, bad = 0, len(places)
        while bad - good > 1:
            middle = (good + bad) // 2
            found, _ = self._limited(one, middle)
            good, bad = (middle, bad) if found is None else (good, middle)
        return Culprit(index, one, reason, bad, places[bad - 1], self.probes)

    def _limited(self, one: Pass, limit: int) -> tuple[str | None, list[str]]:
        with application_limit(limit):
            return self.run(self._good[1].clone(), [one])


def numeric_check(original: ir.Model, context: PassContext, *, exact: bool, minimum: float = 0.9) -> Check:
    """Check outputs against ``original``: to rounding when ``exact``, otherwise cosine of at least ``minimum``."""
    expected = observe(original, context.samples)
    tolerance, magnified = rounding_bound(original) if exact else None, expected.magnified(original)
    may_attend = attends(original)

    def check(model: ir.Model) -> str | None:
        if (reason := signature_change(original, model)) is not None:
            return reason
        actual = expected.again(model)
        changes = compare(expected.outputs, actual.outputs, attends=may_attend)
        for where, found in (("", changes), (AT_THE_EDGES, compare_edges(expected, actual, attends=may_attend))):
            for name, change in found.items():
                if (reason := change.violation(tolerance)) and not change.is_rounding(name, magnified):
                    return f"output {name!r}{where}: {reason}"
        cosine = fidelity(changes)
        return f"cosine with the original outputs is {cosine:.4f}, below {minimum}" if cosine < minimum else None

    return check
