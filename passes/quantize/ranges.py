"""What values the inputs of linear layers take on calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from xopt.ir.fx import run_with_values
from xopt.recover.samples import Batch


@dataclass
class Range:
    """Smallest and largest number seen in a value, 0 among them; tokens of padding do not count.

    Attributes:
        lows, highs: of each column.
    """

    lows: Tensor = field(default_factory=lambda: torch.zeros(1))
    highs: Tensor = field(default_factory=lambda: torch.zeros(1))

    @property
    def low(self) -> float:
        """Over all columns."""
        return float(self.lows.min())

    @property
    def high(self) -> float:
        """Over all columns."""
        return float(self.highs.max())

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return bool(torch.isfinite(self.lows).all() and torch.isfinite(self.highs).all())

    def watch(self, rows: Tensor) -> None:
        """Take in the rows [tokens, K] of one batch."""
        if rows.numel():
            low, high = rows.aminmax(dim=0)
            self.lows, self.highs = torch.minimum(self.lows, low), torch.maximum(self.highs, high)


def ranges(view: fx.GraphModule, batches: Sequence[Batch], names: Sequence[str]) -> Mapping[str, Range]:
    """The range of each named value over all batches."""
    found = {name: Range() for name in names}
    for batch in batches:

        def watched(name: str, value: Tensor, batch: Batch = batch) -> Tensor:
            found[name].watch(batch.rows(name, value))
            return value

        hooks = {name: lambda value, name=name: watched(name, value) for name in names}
        with torch.no_grad():
            run_with_values(view, batch.feeds, None, hooks)
    return found
