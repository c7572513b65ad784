"""Run passes one after the other, watched by instruments; a pass that fails leaves no trace in the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xopt.errors import InputError, InternalError, XoptError
from xopt.ir.unshared import unshare
from xopt.pipeline.base import Pass, PassReport
from xopt.pipeline.containment import Seals, checked_report, clear_words, contained, private
from xopt.pipeline.context import PassContext

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.instruments import Instrument


@dataclass
class StepResult:
    """One pass of a run: what it did, how long it took (seconds), and what the instruments noted about it."""

    index: int
    pass_: Pass
    report: PassReport
    remaining: tuple[Pass, ...] = ()
    """The passes that come after it."""
    seconds: float = 0.0
    notes: dict[str, object] = field(default_factory=dict)


def restore(model: ir.Model, snapshot: ir.Model) -> None:
    """Put ``model`` back into the state of ``snapshot`` (made by ``model.clone()``), which is used up by that."""
    model.graph = snapshot.graph
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, name, getattr(snapshot, name))
    for mine, kept in ((model.functions, snapshot.functions), (model.metadata_props, snapshot.metadata_props)):
        mine.clear()
        mine.update(kept)  # type: ignore[arg-type]


class PassManager:
    """Passes in their order.

    Args:
        passes: passes, or managers whose passes are taken over in their place.
        instruments: what watches each step; by default it is verified, and a failure leaves a reproducer.
    """

    def __init__(
        self, passes: Iterable[Pass | PassManager], *, instruments: Sequence[Instrument] | None = None
    ) -> None:
        from xopt.pipeline.reproduce import Reproducer
        from xopt.pipeline.verify import VerifyEach

        self.passes: tuple[Pass, ...] = tuple(
            one for item in passes for one in (item.passes if isinstance(item, PassManager) else (item,))
        )
        self.instruments = (VerifyEach(), Reproducer()) if instruments is None else tuple(instruments)

    def run(self, model: ir.Model, context: PassContext) -> list[StepResult]:
        """Run all passes on ``model`` in place.

        Raises:
            InputError: a pass cannot work with this model or this data.
            VerificationError: a pass broke its promise.
            InternalError: a pass failed in another way.
        In each case ``model`` is as it was before that pass.
        """
        return [
            self.step(one, model, context, index=index, remaining=self.passes[index:])
            for index, one in enumerate(self.passes, start=1)
        ]

    def step(
        self,
        one: Pass,
        model: ir.Model,
        context: PassContext,
        *,
        index: int = 1,
        remaining: tuple[Pass, ...] = (),
    ) -> StepResult:
        """Run one pass with all instruments; the ``index`` counts from 1. Raises as ``run`` does."""
        context.fill_in_samples(model)
        step = StepResult(index, one, PassReport(one), remaining)
        before = model.clone()
        unshare(model)
        seals = Seals(before, context)
        try:
            for instrument in self.instruments:
                instrument.before(step, model, context)
            with seals.unbroken():
                start = time.perf_counter()
                step.report = _run(one, model, private(context))
                step.seconds = time.perf_counter() - start
            for instrument in self.instruments:
                instrument.after(step, before, model, context)
        except BaseException as error:
            restore(model, before.clone())
            if not isinstance(error, Exception) or isinstance(error, InputError):
                raise
            for instrument in self.instruments:
                instrument.failed(step, before, context, error)
            raise _explained(error, step) from error
        return step


def _run(one: Pass, model: ir.Model, context: PassContext) -> PassReport:
    """Run a pass, contained, between its own checks."""
    with clear_words(), contained("the pass"):
        one.requires(model, context)
        report = checked_report(one.run(model, context), one)
        one.ensures(model, context)
    return report


def _explained(error: Exception, step: StepResult) -> XoptError:
    """``error`` with the pass it comes from and the way to run it again."""
    where = f"in pass {step.pass_.name} (step {step.index})"
    cure = str(step.notes.get("reproducer", ""))
    if isinstance(error, XoptError):
        places, cures = ([part for part in pair if part] for pair in ((error.where, where), (error.cure, cure)))
        return type(error)(error.code, error.what, where=", ".join(places), cure="; ".join(cures))
    return InternalError("E-INTERNAL", f"{type(error).__name__}: {error}", where=where, cure=cure)
