"""Quality of a model on data: one metric, fed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from xopt.data.dataset import Dataset
from xopt.data.metrics import Batch, Metric
from xopt.ir.unshared import read_only

BATCH = 32
"""Samples that a metric sees at once; runs are smaller where the model's own batch is."""
ARTIFACT, REFERENCE = "artifact", "onnxruntime"
"""What quality is judged on: the compiled artifact, or where that cannot run here, the ONNX file in onnxruntime."""
KEPT_BYTES = 256 << 20
"""How much of the original's outputs is kept for comparing with; samples beyond that are not compared."""


class Runnable(Protocol):
    """A session of any runtime."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Outputs by name."""


@dataclass
class Evaluator:
    """A metric on a data set, with what the original model makes of it.

    Attributes:
        metric: what is computed.
        data: the samples, as the model takes them.
        original: the original model; its outputs are computed once and kept where the metric compares.
        batch: samples that the metric sees at once.
        samples: how many samples the metric sees (known after ``baseline``).
    """

    metric: Metric
    data: Dataset
    original: Runnable
    batch: int = BATCH
    samples: int = 0
    _kept: list[Mapping[str, np.ndarray]] = field(default_factory=list)

    def baseline(self) -> float:
        """The metric of the original itself."""
        if self.metric.compares:
            self._remember()
        self.samples = len(self.data)
        return self.evaluate(self.original)

    def evaluate(self, runner: Runnable, progress: Callable[[str, int, int], None] | None = None) -> float:
        """The metric of ``runner``'s outputs; not-a-number where one of them is."""
        sound = True

        def watched() -> Iterator[Batch]:
            nonlocal sound
            for batch in self._batches(runner, progress):
                floats = (array for array in batch.outputs.values() if array.dtype.kind == "f")
                sound = sound and not any(np.isnan(array).any() for array in floats)
                yield batch

        with np.errstate(all="ignore"):
            score = self.metric.score(watched())
        return score if sound else float("nan")

    def drop(self, baseline: float, quality: float) -> float:
        """How much of the baseline is lost, in units of the metric; infinite for a quality that is no number."""
        return self.metric.drop(baseline, quality) if np.isfinite(quality) else float("inf")

    def _batches(self, runner: Runnable, progress: Callable[[str, int, int], None] | None) -> Iterator[Batch]:
        parts = self._parts()
        for index, part in enumerate(parts):
            yield Batch(
                _samples_first(part.inputs, {name: part.axis(name) for name in part.inputs}),
                outputs_of(runner, part),
                part.labels,
                self._kept[index] if self._kept else None,
            )
            if progress is not None:
                progress("evaluate", index + 1, len(parts))

    def _parts(self) -> list[Dataset]:
        """The samples of one batch after the other, in whole groups."""
        size = max(self.batch // self.data.group, 1) * self.data.group
        return [self.data.part(start, start + size) for start in range(0, len(self.data), size)]

    def _remember(self) -> None:
        """Run the original, and cut the data where its outputs would take too much memory."""
        self._kept = []
        kept_bytes = samples = 0
        for part in self._parts():
            outputs = outputs_of(self.original, part)
            self._kept.append({name: read_only(array) for name, array in outputs.items()})  # metrics are others' code
            kept_bytes += sum(array.nbytes for array in outputs.values())
            samples += len(part)
            if kept_bytes > KEPT_BYTES:
                self.data = self.data.take(samples)
                return


def outputs_of(runner: Runnable, data: Dataset) -> dict[str, np.ndarray]:
    """What ``runner`` makes of all samples, which come first in every output that runs over them.

    The runs are as many as the model's fixed batch asks for, and what fills the last of them up is left out again.
    """
    axes = data.axes.outputs if data.axes is not None else {}
    found: dict[str, list[np.ndarray]] = {}
    for index, feeds in data.runs(np.arange(len(data)), len(data)):
        outputs = runner.run(feeds)
        for name, array in _samples_first(outputs, {n: axes.get(n, 0) for n in outputs}).items():
            shared = axes.get(name, 0) is None or not array.ndim
            found.setdefault(name, []).append(array if shared else array[: len(index)])
    return {
        n: parts[0] if len(parts) == 1 or axes.get(n, 0) is None else np.concatenate(parts)
        for n, parts in found.items()
    }


def _samples_first(arrays: Mapping[str, np.ndarray], axes: Mapping[str, int | None]) -> dict[str, np.ndarray]:
    """Views whose first axis runs over samples, where there is such an axis."""
    return {n: np.moveaxis(a, axis, 0) if (axis := axes[n]) and axis < a.ndim else a for n, a in arrays.items()}
