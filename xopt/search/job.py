"""What an optimization is asked to do, with every default filled in and every input checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data import metrics
from xopt.data.dataset import Dataset
from xopt.data.metrics import Metric
from xopt.errors import InputError
from xopt.pipeline import registry, text
from xopt.pipeline.base import Pass

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.targets.base import Target

EXACT = ("canonicalize", "fold-constants", "deduplicate", "fuse-qkv", "eliminate-dead")
"""Passes that every optimization starts with."""
SEARCHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("prune-heads", {"keep": 0.75, "ffn": True}),
    ("merge-tokens", {"ratio": 0.2}),
)
"""Lossy passes that are tried when the caller names none, and gives data and a budget to judge them with."""
RANDOM_SAMPLES = 32
"""Random samples that fidelity is measured on when there are no data."""
PEERS = ("onnxruntime", "openvino", "torch")


@dataclass(frozen=True)
class Job:
    """An optimization, ready to run.

    Attributes:
        model: the original; it is not changed.
        path: its file; None when it came from memory.
        passes: what is run after the exact passes, in order.
        optional: the passes were chosen by xopt: one that cannot work with this model is left out, not an error.
        target: what is compiled for.
        calibration: samples that passes may look at.
        evaluation: samples that quality is measured on.
        metric: of quality.
        max_drop: how much quality may be lost; None sets no limit.
        threads: CPU threads of everything that is timed.
        seed: of everything that is random.
        feeds: arrays of the run that is timed.
        dims: size of each symbolic axis in them.
        peers: runtimes that are timed beside.
        verify: check each pass.
        dump: folder for the model after each pass, or None.
    """

    model: ir.Model
    path: Path | None
    passes: tuple[Pass, ...]
    optional: bool
    target: Target
    calibration: Dataset
    evaluation: Dataset
    metric: Metric
    max_drop: float | None
    threads: int
    seed: int
    feeds: Mapping[str, np.ndarray] = field(repr=False)
    dims: Mapping[str, int]
    peers: tuple[str, ...]
    verify: bool
    dump: Path | None

    @property
    def exact(self) -> list[Pass]:
        """The passes that come first."""
        return [registry.create(name, {}) for name in EXACT]

    def plan(self) -> dict[str, Any]:
        """What ``--dry-run`` prints."""
        return {
            "model": str(self.path or "from memory"),
            "target": self.target.name,
            "passes": [_planned(p) for p in self.all_passes],
            "metric": self.metric.name,
            "max_drop": self.max_drop,
            "calibration": {"data": self.calibration.name, "samples": len(self.calibration)},
            "evaluation": {"data": self.evaluation.name, "samples": len(self.evaluation)},
            "latency": {
                "measured": self.target.can_run(),
                "feeds": {name: list(array.shape) for name, array in self.feeds.items()},
                "threads": self.threads,
                "peers": list(self.peers),
            },
            "seed": self.seed,
        }

    @property
    def all_passes(self) -> list[Pass]:
        """The exact passes, and the others."""
        return [*self.exact, *self.passes]


def _planned(one: Pass) -> dict[str, Any]:
    return {"pass": one.name, "effect": one.effect.value, "options": one.values(), "text": text.render([one])}


def resolve_passes(passes: str | Sequence[Pass] | None, *, searching: bool) -> tuple[tuple[Pass, ...], bool]:
    """The passes to run after the exact ones, and whether they were chosen here.

    Args:
        passes: a textual pipeline, passes, or None for the defaults.
        searching: there are data and a budget, so that lossy passes can be judged.
    """
    if passes is None:
        return tuple(registry.create(name, options) for name, options in SEARCHED) if searching else (), True
    listed = (
        text.parse(passes) if isinstance(passes, str) else list(passes) if isinstance(passes, Iterable) else [passes]
    )
    for one in listed:
        if not isinstance(one, Pass):
            cure = "give passes, or a text such as 'prune-heads{keep=0.75}'"
            raise InputError("E-PASS", f"{type(one).__name__} is not a pass", cure=cure)
    plain = {name: registry.create(name, {}) for name in EXACT}
    return tuple(one for one in listed if plain.get(one.name) != one), False


def resolve_metric(metric: Any, evaluation: Dataset) -> Metric:
    """The metric of the caller, or the one that the data suggest; random data can only be compared on."""
    chosen = metrics.default_for(evaluation) if metric is None else metrics.get(metric)
    if evaluation.synthetic and not chosen.compares:
        cure = "give data, or use cosine or agreement"
        raise InputError("E-DATA", f"metric {chosen.name} means nothing on random inputs", where="--metric", cure=cure)
    return chosen


def evaluation_batch(model: ir.Model, wanted: int) -> int:
    """Samples in one run: the model's own batch where that is fixed, else ``wanted``."""
    from xopt.ir.batch import batch_axes

    return batch_axes(model).size or wanted


def timed_feeds(data: Dataset, batch: int) -> dict[str, np.ndarray]:
    """The first ``batch`` samples, over again where there are fewer."""
    feeds = data.feeds(np.arange(batch) % len(data))
    return {name: np.asarray(array, order="C") for name, array in feeds.items()}
