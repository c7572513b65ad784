"""The compiled artifact and the ONNX file are the same model: how far they may differ, and that they do not.

At float32 both compute the same sums in another order: rounding (``rounding_bound``, or what noise shows that the model
makes of it) explains all that may differ. At bfloat16 the artifact rounds each operand of a product to 2**-9 of itself,
which moves a sum of K such products by about 2**-9 of its size whatever K is; the four products in a row of each of 24
layers, in quadrature, make 0.02 of an output, so that ``LOW_PRECISION_COSINE`` leaves a safety of seven. In a quantized
graph rounding tips numbers over the borders of steps, which is noise of the size of quantization itself
(``least_cosine``). How much any of that costs in quality is not for this module: quality is judged on the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.errors import InputError, VerificationError
from xopt.measure.peers import onnxruntime_runner
from xopt.pipeline.rounding import Magnified, rounding_bound
from xopt.pipeline.verify import Change, Tally, attends, compare, least_cosine
from xopt.search.steps import ROUNDING

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.measure.latency import Runner
    from xopt.search.job import Job
    from xopt.search.lab import Candidate, Lab
    from xopt.targets.base import Target

LOW_PRECISION_COSINE = 0.99
"""Least cosine where the compiled model multiplies in bfloat16, and model.onnx in float32."""
TIPPED = 0.01
"""Share of an integer output's elements that rounding may tip (the argmax of numbers that are nearly equal)."""
SAME_METRIC = 1e-3
"""How far rounding moves a metric, relative to the original's; one that counts samples moves by a sample or two."""


@dataclass(frozen=True)
class Agreement:
    """How the artifact and the ONNX file agree on the evaluation data.

    Attributes:
        onnx_quality: the metric of the ONNX file in onnxruntime.
        samples: how many were compared.
        bound: largest difference allowed, relative to an output's largest magnitude; None where ``cosine`` counts.
        cosine: least one allowed.
        changes: of each output, from the file to the artifact.
    """

    onnx_quality: float
    samples: int
    bound: float | None
    cosine: float | None
    changes: Mapping[str, Change]

    def record(self) -> dict[str, Any]:
        """As in report.json (docs/cli-json.md)."""
        return {"samples": self.samples, "bound": self.bound, "cosine": self.cosine, "outputs": _outputs(self.changes)}


def agree(best: Candidate, lab: Lab, job: Job) -> Agreement:
    """Run both on the evaluation data; VerificationError E-VERIFY where they differ by more than they may."""
    from xopt.runtime.reference import ReferenceSession

    assert best.runner is not None
    both = _Both(ReferenceSession(best.model, job.threads), best.runner, {}, attends(best.model))
    quality = lab.evaluator.evaluate(both, lab.progress)
    bound, cosine = bounds(best.model, job.target.precision)
    changes = {name: tally.change() for name, tally in both.tallies.items()}

    def differences(noisy: ir.Model) -> dict[str, float]:
        moved = _Both(both.portable, ReferenceSession(noisy, job.threads).run, {}, both.attends)
        lab.evaluator.evaluate(moved, lab.progress)
        return {name: tally.change().relative for name, tally in moved.tallies.items()}

    magnified = Magnified(best.model, differences)
    for name, tally in both.tallies.items():
        if (reason := _violation(tally, bound, cosine)) and not changes[name].is_rounding(name, magnified):
            raise _disagreement(f"output {name!r} of the evaluation data", reason)
    if cosine is None and not _same_metric(quality, best.quality, lab.evaluator.samples):
        raise _disagreement(f"{job.metric.name} of the evaluation data", f"{best.quality:.6g} and {quality:.6g}")
    return Agreement(quality, lab.evaluator.samples, bound, cosine, changes)


def prove(path: Path, best: Candidate, job: Job) -> dict[str, Any]:
    """Largest difference of the two on the timed feeds; VerificationError E-VERIFY where it may not be so large.

    Where the target cannot run here, only that the file runs.
    """
    from xopt.runtime.reference import ReferenceSession

    plain = onnxruntime_runner(path, job.threads)(job.feeds)
    if best.runner is None:
        finite = all(np.isfinite(array).all() for array in plain.values() if array.dtype.kind == "f")
        reason = f"{job.target.name} does not run here" if best.artifact is not None else "there is none"
        return {"compared": False, "reason": reason, "finite": bool(finite)}
    changes = compare([dict(plain)], [dict(best.runner(job.feeds))], attends=attends(best.model))

    def again(noisy: ir.Model) -> Mapping[str, Change]:
        return compare([dict(plain)], [dict(ReferenceSession(noisy, job.threads).run(job.feeds))])

    _require_equal(changes, best.model, job.target.precision, again)
    return {"compared": True, "bound": rounding_bound(best.model), "outputs": _outputs(changes)}


def check_artifact(library: Path, model: ir.Model, compiled: ir.Model, target: Target) -> dict[str, Any]:
    """Compare a compiled library with the graph that it was made of, on small random inputs of two sizes.

    Args:
        library: the artifact.
        model: the graph as it was given, which onnxruntime runs.
        compiled: the same in canonical form, whose inputs say more of their sizes.
        target: what was compiled for.

    Returns:
        ``compared``, and how far each output is from onnxruntime's, or the ``reason`` why they were not compared: the
        target does not run here, or random inputs are not what the model takes.

    Raises:
        VerificationError: E-VERIFY, they differ by more than rounding explains.
    """
    from xopt.runtime.reference import ReferenceSession
    from xopt.runtime.session import Session

    if not target.can_run():
        return {"compared": False, "reason": f"{target.name} does not run here"}
    try:
        portable, runner = ReferenceSession(model), Session.load(library, threads=2).run
        feeds = _small(compiled)
        expected = [dict(portable.run(one)) for one in feeds]
        found = [dict(runner(one)) for one in feeds]
    except InputError as error:
        return {"compared": False, "reason": error.what}
    changes = compare(expected, found, attends=attends(model))

    def again(noisy: ir.Model) -> Mapping[str, Change]:
        session = ReferenceSession(noisy)
        return compare(expected, [dict(session.run(one)) for one in feeds])

    _require_equal(changes, model, target.precision, again)
    return {"compared": True, "bound": rounding_bound(model), "outputs": _outputs(changes)}


SIZES = ((1, 16), (2, 24))
"""Samples, and symbolic axes, of the runs that a compiled model is compared on; twice the same where all is fixed."""


def _small(model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Random inputs of each size that the model takes; InputError E-DATA where it takes none of these."""
    from xopt.data.dataset import Dataset
    from xopt.search.job import evaluation_batch, timed_feeds

    if not model.graph.inputs:
        return [{}]
    found: list[dict[str, np.ndarray]] = []
    for samples, size in SIZES:
        batch = evaluation_batch(model, samples)
        feeds = timed_feeds(Dataset.random(model, batch, samples, usual=size), batch)
        if not found or any(feeds[name].shape != array.shape for name, array in found[0].items()):
            found.append(feeds)
    return found


def _require_equal(
    changes: Mapping[str, Change], model: ir.Model, precision: str, again: Callable[[ir.Model], Mapping[str, Change]]
) -> None:
    """VerificationError E-VERIFY where an output is further off than the precision, or rounding, makes it."""
    bound, cosine = bounds(model, precision)
    magnified = Magnified(model, lambda noisy: {name: change.relative for name, change in again(noisy).items()})
    for name, change in changes.items():
        if (reason := change.violation(bound, cosine)) and not change.is_rounding(name, magnified):
            raise _disagreement(f"output {name!r}", reason)


def bounds(model: ir.Model, precision: str) -> tuple[float | None, float | None]:
    """(largest relative difference, least cosine) of the artifact and the ONNX file; one of them is None."""
    cosine = least_cosine(model)
    if precision != "fp32":
        cosine = min(cosine or 1.0, LOW_PRECISION_COSINE)
    return (rounding_bound(model) if cosine is None else None), cosine


def check_precision(compiled: Candidate, lab: Lab, job: Job) -> None:
    """What the precision of the compiled model costs before any lossy pass must leave something of the budget.

    Raises:
        InputError: E-BUDGET.
        VerificationError: E-VERIFY, the artifact computes no numbers where the original does.
    """
    if math.isnan(compiled.quality) and not math.isnan(lab.baseline):
        raise _disagreement("the evaluation data", "the compiled model's outputs are not numbers")
    if job.max_drop is None or compiled.drop <= job.max_drop + ROUNDING:
        return
    _, cosine = bounds(compiled.model, job.target.precision)
    if cosine is None and _same_metric(compiled.quality, lab.baseline, lab.evaluator.samples):
        return  # a sample or two that rounding tips: no precision has less of it
    lower = job.target.precision != "fp32"
    what = f"{job.target.precision} alone" if lower else "the model as it is compiled"
    cures = ["give --precision fp32"] * lower + [f"allow --max-drop {math.ceil(compiled.drop * 1e4) / 1e4:g}"]
    raise InputError(
        "E-BUDGET",
        f"{what} loses {compiled.drop:.4f} of {job.metric.name} before any pass, --max-drop allows {job.max_drop:g}",
        where=f"{(lower and job.target.precision) or 'artifact'} for {job.target.name}",
        cure=" or ".join(cures),
    )


@dataclass(frozen=True)
class _Both:
    """The ONNX file, with an eye on what the artifact makes of the same feeds."""

    portable: Any
    runner: Runner
    tallies: dict[str, Tally]
    attends: bool

    def run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        expected: dict[str, np.ndarray] = dict(self.portable.run(feeds))
        actual = dict(self.runner(feeds))
        for name in dict.fromkeys([*expected, *actual]):
            self.tallies.setdefault(name, Tally(attends=self.attends)).add(expected.get(name), actual.get(name))
        return expected


def _violation(tally: Tally, bound: float | None, cosine: float | None) -> str | None:
    if not tally.floating and not tally.mismatch:
        share = tally.unequal / max(tally.elements, 1)
        return f"{share:.1%} of its elements differ" if share > TIPPED else None
    return tally.change().violation(bound, cosine)


def _same_metric(a: float, b: float, samples: int) -> bool:
    slack = SAME_METRIC * max(abs(a), abs(b), 1.0) + 2 / max(samples, 1)
    return abs(a - b) <= slack or (math.isnan(a) and math.isnan(b))


def _outputs(changes: Mapping[str, Change]) -> dict[str, dict[str, float]]:
    return {name: {"max_abs": c.largest, "scale": c.scale, "cosine": c.cosine} for name, c in changes.items()}


def _disagreement(where: str, reason: str) -> VerificationError:
    what = f"the compiled model and model.onnx disagree on {where}"
    return VerificationError("E-VERIFY", what, where=reason)
