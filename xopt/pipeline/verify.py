"""Verify each pass: valid ONNX, the same signature, and outputs that keep what the pass promised about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from xopt.data.edges import edge_feeds
from xopt.errors import InputError, VerificationError
from xopt.ir.shapes import without_weights
from xopt.pipeline.base import Effect
from xopt.pipeline.instruments import Instrument
from xopt.pipeline.rounding import FLOATS, Magnified, rounding_bound
from xopt.pipeline.signature import signature_change

if TYPE_CHECKING:
    from xopt.data.dataset import Dataset
    from xopt.pipeline.context import PassContext
    from xopt.pipeline.manager import StepResult

Outputs = list[dict[str, np.ndarray]]
"""What a model computes: outputs by name, one dict a batch."""

SAMPLES = 4
"""How many samples each verification runs."""
AT_THE_EDGES = " on zeros, the ends of tables, masks that hide everything or shorter axes"
DISCRETE_COSINE = 0.99
"""Least cosine for a model with xopt ops, whose choices (which tokens are alike) rounding may tip."""
QUANTIZED_COSINE = 0.95
"""Least cosine for a quantized model; MiniLM in two runtimes has 0.988, as far apart as it is from float32."""


_DISCRETE = frozenset({"ArgMax", "ArgMin", "Ceil", "Floor", "Hardmax", "NonMaxSuppression", "Round", "Sign", "TopK"})


class VerifyEach(Instrument):
    """Check the graph and its signature after each pass, and its outputs by the pass's declared effect.

    An exact pass may move an output by ``rounding_bound(model) * max|output|``, or by what noise shows that the model
    makes of rounding. A lossy pass must run and stay finite wherever the original was; the cosine of its outputs with
    those before is kept in the step's notes. Both hold on usual samples and on inputs at the edges
    (:mod:`xopt.data.edges`).

    Args:
        samples: how many calibration samples to run.
    """

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self._known: tuple[ir.Graph, Observed] | None = None

    def before(self, step: StepResult, model: ir.Model, context: PassContext) -> None:
        if self._known is None or self._known[0] is not model.graph:
            self._known = (model.graph, observe(model, context.samples, self.samples))

    def after(self, step: StepResult, before: ir.Model, model: ir.Model, context: PassContext) -> None:
        assert self._known is not None
        name = step.pass_.name
        check_graph(model, name)
        if (change := signature_change(before, model, widened=step.pass_.widens)) is not None:
            raise VerificationError("E-VERIFY", f"{name} changes what callers know of the model: {change}")
        try:
            actual = self._known[1].again(model)
        except Exception as error:  # whatever the runtime raises, the pass has made a model that does not run
            raise VerificationError(
                "E-VERIFY", f"the model does not run after {name} ({_first_line(error)})"
            ) from error
        may_attend = attends(before)
        changes = compare(self._known[1].outputs, actual.outputs, attends=may_attend)
        step.notes["fidelity"] = {output: change.cosine for output, change in changes.items()}
        exact = step.pass_.effect is Effect.EXACT
        quantized = exact and _is_quantized(before)
        tolerance = rounding_bound(before) if exact and not quantized else None
        magnified = self._known[1].magnified(before)
        for where, found in (("", changes), (AT_THE_EDGES, compare_edges(self._known[1], actual, attends=may_attend))):
            for output, change_ in found.items():
                reason = change_.violation(tolerance, QUANTIZED_COSINE if quantized else None)
                if reason and not change_.is_rounding(output, magnified):
                    raise VerificationError("E-VERIFY", f"{name} breaks output {output!r}{where}: {reason}")
        self._known = (model.graph, actual)


@dataclass(frozen=True)
class Observed:
    """What a model makes of samples, and of inputs at the edges (those that it runs on)."""

    batches: Sequence[Mapping[str, np.ndarray]]
    outputs: Outputs
    edges: Sequence[Mapping[str, np.ndarray]]
    edge_outputs: Outputs

    def again(self, model: ir.Model) -> Observed:
        """The same of another model; raises where that does not run."""
        from xopt.runtime.reference import ReferenceSession

        session = ReferenceSession(model)
        outputs, edge_outputs = ([dict(session.run(feeds)) for feeds in group] for group in (self.batches, self.edges))
        return Observed(self.batches, outputs, self.edges, edge_outputs)

    def magnified(self, model: ir.Model) -> Magnified:
        """What ``model``, which gave these outputs, makes of rounding."""

        def differences(noisy: ir.Model) -> dict[str, float]:
            actual = self.again(noisy)
            both = (compare(self.outputs, actual.outputs), compare_edges(self, actual))
            names = [*both[0], *both[1]]
            return {name: max(found[name].relative for found in both if name in found) for name in names}

        return Magnified(model, differences)


def observe(model: ir.Model, samples: Dataset, count: int = SAMPLES) -> Observed:
    """Run ``count`` samples, and inputs at the edges, through onnxruntime."""
    from xopt.runtime.reference import ReferenceSession

    session = ReferenceSession(model)
    samples = samples.fitted(model)
    batches = _batches(samples, count)
    outputs = [dict(session.run(feeds)) for feeds in batches]
    edges, edge_outputs = [], []
    for feeds in edge_feeds(model, samples):
        try:
            found = dict(session.run(feeds))
        except InputError:  # it need not take what is no usual sample
            continue
        edges.append(feeds)
        edge_outputs.append(found)
    return Observed(batches, outputs, edges, edge_outputs)


def compare_edges(expected: Observed, actual: Observed, *, attends: bool = False) -> dict[str, Change]:
    """As ``compare`` for each floating output on inputs at the edges. (An argmax over equal numbers may be any.)"""
    wanted, found = [], []
    for before, after in zip(expected.edge_outputs, actual.edge_outputs, strict=True):
        names = [name for name, array in before.items() if array.dtype.kind == "f" and name in after]
        wanted.append({name: before[name] for name in names})
        found.append({name: after[name] for name in names})
    return compare(wanted, found, attends=attends)


@dataclass(frozen=True)
class Change:
    """How one output differs from what it was."""

    largest: float
    """Largest absolute difference where both are finite."""
    scale: float
    """Largest magnitude before."""
    cosine: float
    newly_bad: int
    """Elements that were finite and no longer are, or the other way round."""
    mismatch: str
    """Why the two cannot be compared; empty when they can."""

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest magnitude."""
        return self.largest / self.scale if self.scale else math.inf if self.largest else 0.0

    def is_rounding(self, output: str, magnified: Magnified) -> bool:
        """Whether the change of ``output`` is what the model makes of rounding."""
        return not self.mismatch and not self.newly_bad and magnified.explains(output, self.relative)

    def violation(self, tolerance: float | None, cosine: float | None = None) -> str | None:
        """Why this change is not allowed.

        Args:
            tolerance: largest difference relative to the scale; None allows any finite change.
            cosine: least one; None allows any.
        """
        if self.mismatch:
            return self.mismatch
        if self.newly_bad:
            return f"{self.newly_bad} elements are no longer finite, or no longer infinite"
        if cosine is not None and not self.cosine >= cosine:  # not a number where squares overflow
            return f"cosine {self.cosine:.4f}, at least {cosine:g} is expected"
        if tolerance is None or self.largest <= tolerance * self.scale:
            return None
        return (
            f"max abs difference {self.largest:.3g}, relative to the largest magnitude {self.relative:.3g} "
            f"(rounding explains {tolerance:.3g})"
        )


def attends(model: ir.Model) -> bool:
    """Whether a row of ``model`` may attend to nothing: NaN by a softmax, 0 by ``Attention`` and by guarded kernels.

    That is the only place where a number for what was none is no change; see ``compare``.
    """
    nodes = [*model.graph.all_nodes(), *(node for body in model.functions.values() for node in body)]
    return any(node.op_type.endswith(("Softmax", "Attention")) for node in nodes)


def compare(expected: Outputs, actual: Outputs, *, attends: bool = False) -> dict[str, Change]:
    """Change of each output over all batches; where the model ``attends``, what was no number may become one."""
    names = list(dict.fromkeys(name for batch in (*expected, *actual) for name in batch))
    return {name: _change([b.get(name) for b in expected], [b.get(name) for b in actual], attends) for name in names}


def _change(expected: list[np.ndarray | None], actual: list[np.ndarray | None], attends: bool) -> Change:
    tally = Tally(attends=attends)
    for a, b in zip(expected, actual, strict=True):
        tally.add(a, b)
    return tally.change()


@dataclass
class Tally:
    """The change of one output, batch by batch.

    Attributes:
        attends: see ``compare``.
    """

    attends: bool = False
    largest: float = 0.0
    scale: float = 0.0
    newly_bad: int = 0
    mismatch: str = ""
    elements: int = 0
    unequal: int = 0
    floating: bool = True
    _products: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """x . x, y . y and x . y over the finite elements."""

    def add(self, before: np.ndarray | None, after: np.ndarray | None) -> None:
        """Count one batch."""
        if before is None or after is None:
            self.mismatch = self.mismatch or ("it is new" if before is None else "it is gone")
            return
        nothing = before.size == after.size == 0 and before.ndim == after.ndim  # what a loop stacks of no iterations
        if (before.shape != after.shape and not nothing) or before.dtype != after.dtype:
            was, now = (f"{array.dtype}{list(array.shape)}" for array in (before, after))
            self.mismatch = self.mismatch or f"{was} became {now}"
            return
        x, y = (np.ravel(array).astype(np.float64) for array in (before, after))
        finite = np.isfinite(x) & np.isfinite(y)
        same = finite | (x == y) | (np.isnan(x) & (np.isnan(y) | self.attends))
        x, y = x[finite], y[finite]
        self.largest = max(self.largest, float(np.abs(x - y).max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(x).max(initial=0.0)))
        self.newly_bad += int((~same).sum())
        self.elements += before.size
        self.floating = before.dtype.kind not in "iub"
        self.unequal += int((x != y).sum())
        with np.errstate(over="ignore"):
            self._products += (x @ x, y @ y, x @ y)

    def change(self) -> Change:
        """What was counted."""
        if self.mismatch:
            return Change(0, 0, 0, 0, self.mismatch)
        xx, yy, xy = self._products.tolist()
        norms = math.sqrt(xx) * math.sqrt(yy)
        cosine = xy / norms if norms else float(self.largest == 0)
        return Change(self.largest, self.scale, cosine, self.newly_bad, "")


def outputs_of(model: ir.Model, samples: Dataset, count: int = SAMPLES) -> Outputs:
    """Run ``count`` samples through onnxruntime, in batches of the size that the model demands (or all at once)."""
    from xopt.runtime.reference import ReferenceSession

    session = ReferenceSession(model)
    samples = samples.fitted(model)
    return [dict(session.run(batch)) for batch in _batches(samples, count)]


def _batches(samples: Dataset, count: int) -> list[dict[str, np.ndarray]]:
    taken = samples.take(count)
    return list(taken.batches(max(len(taken), 1)))


def least_cosine(model: ir.Model) -> float | None:
    """What two ways to run a model must agree to where rounding tips decisions; None where a bound on rounding holds.

    In a quantized graph a number on the border of two steps goes to either. That moves later numbers over borders in
    turn, so that after some layers the noise of quantization is another one, though of the same size.
    """
    if _is_quantized(model):
        return QUANTIZED_COSINE
    return DISCRETE_COSINE if any(_is_discrete(node) for node in model.graph.all_nodes()) else None


def _is_discrete(node: ir.Node) -> bool:
    """Whether a small change of what it reads may be a large one of what it gives."""
    floats = bool(node.inputs) and node.inputs[0] is not None and node.inputs[0].dtype in FLOATS
    return node.domain == "xopt" or (node.op_type in _DISCRETE and floats)


def _is_quantized(model: ir.Model) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())


def check_graph(model: ir.Model, name: str) -> None:
    """The ONNX checker and strict shape inference; VerificationError when ``model`` is not valid after ``name``."""
    import onnx

    for value in model.graph.initializers.values():
        held, declared = value.const_value, value.shape
        if held is not None and declared is not None and held.shape.numpy() != declared:
            raise VerificationError(
                "E-VERIFY", f"initializer {value.name!r} holds {held.shape}, declared {declared}, after {name}"
            )
    try:
        onnx.checker.check_model(without_weights(model), full_check=True)
    except Exception as error:  # the checker raises several unrelated types
        raise VerificationError(
            "E-VERIFY", f"the graph is not valid ONNX after {name} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def fidelity(changes: Mapping[str, Change]) -> float:
    """Smallest cosine over all outputs; -1 when an output cannot be compared or is no longer finite."""
    return min((-1.0 if c.mismatch or c.newly_bad else c.cosine for c in changes.values()), default=1.0)
