"""What values the inputs of linear layers take on calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from xopt.ir.fx import run_with_values
from xopt.recover.samples import Batch


@dataclass
class Range:
    """Smallest and largest number seen in a value; tokens of padding do not count."""

    low: float = 0.0
    high: float = 0.0
    finite: bool = True

    def watch(self, rows: Tensor) -> None:
        """Take in the rows [tokens, K] of one batch."""
        if rows.numel():
            low, high = rows.aminmax()
            self.finite &= bool(torch.isfinite(low) and torch.isfinite(high))
            self.low, self.high = min(self.low, low.item()), max(self.high, high.item())


def ranges(view: fx.GraphModule, batches: Sequence[Batch], names: Sequence[str]) -> Mapping[str, Range]:
    """The range of each named value over all batches."""
    found = {name: Range() for name in names}
    for batch in batches:

        def watched(name: str, value: Tensor, batch: Batch = batch) -> Tensor:
            found[name].watch(batch.rows(value))
            return value

        hooks = {name: lambda value, name=name: watched(name, value) for name in names}
        with torch.no_grad():
            run_with_values(view, batch.feeds, None, hooks)
    return found
