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
"""Samples in one run, unless the model's own batch is fixed."""
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
        batch: samples in one run.
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
        size = max(self.batch // self.data.group, 1) * self.data.group
        total = -(-len(self.data) // size)
        for index, feeds in enumerate(self.data.batches(size)):
            labels = self.data.labels
            rows = size // self.data.group
            yield Batch(
                feeds,
                runner.run(feeds),
                None if labels is None else labels[index * rows : (index + 1) * rows],
                self._kept[index] if self._kept else None,
            )
            if progress is not None:
                progress("evaluate", index + 1, total)

    def _remember(self) -> None:
        """Run the original, and cut the data where its outputs would take too much memory."""
        self._kept = []
        kept_bytes = 0
        size = max(self.batch // self.data.group, 1) * self.data.group
        for feeds in self.data.batches(size):
            outputs = self.original.run(feeds)
            self._kept.append({name: read_only(array) for name, array in outputs.items()})  # metrics are others' code
            kept_bytes += sum(array.nbytes for array in outputs.values())
            if kept_bytes > KEPT_BYTES:
                self.data = self.data.take(len(self._kept) * size)
                return
