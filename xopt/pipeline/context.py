"""What a pass may ask of its surroundings: data, seed, shapes, the target's tile and latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xopt.errors import InternalError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.data.dataset import Dataset


RANDOM_SAMPLES = 32
"""How many random samples stand in for calibration data that the caller did not give."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass
class PassContext:
    """Everything outside the model that a pass may depend on: same context and model, same result."""

    seed: int = 0
    calibration: Dataset | None = None
    """Samples to measure importance on; the manager fills in seeded random ones where the caller has none."""
    tile: int = 8
    """Widths are snapped to multiples of this (elements)."""
    dims: dict[str, int] = field(default_factory=dict)
    """Sizes to assume for symbolic dimensions when costs are counted."""
    latency: Callable[[ir.Model], float] | None = None
    """Latency of a model on the target in milliseconds; None where the target cannot be run."""
    progress: Callable[[str, int, int], None] = silent
    """Called with (stage, done, total)."""

    def fill_in_samples(self, model: ir.Model) -> None:
        """Make random calibration data for the inputs of ``model``, if it has any, where the caller gave none."""
        if self.calibration is None and model.graph.inputs:
            from xopt.data.dataset import Dataset

            self.calibration = Dataset.random(model, RANDOM_SAMPLES, self.seed)

    @property
    def samples(self) -> Dataset:
        """The calibration data; it is there whenever a pass runs under the manager on a model with inputs."""
        if self.calibration is None:
            raise InternalError("E-DATA", "a pass asked for calibration data before there were any")
        return self.calibration
