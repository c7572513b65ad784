"""Fold what was removed into what is left: each site's output projection is fitted anew, in the order of execution.

    teacher  the original model:      y = x W + b,          stream + y
    student  pruned up to this site:  x' of kept units only, stream'
    fit      x'[:, kept] W' + b'  to  y + stream - stream'      (all tokens that are not padding)

Student and teacher run side by side, so a site also makes up for what earlier sites lost: each one aims at the
teacher's residual stream. Where a branch does not join the stream by a plain addition, it aims at its own output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from xopt.passes.prune_heads.replay import Replay
from xopt.passes.prune_heads.sites import Site
from xopt.pipeline.context import silent
from xopt.recover.ridge import Moments, Solution
from xopt.recover.samples import Batch

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Refit:
    """A site's new output projection, with the mean squared error of the fit before and after."""

    columns: Indices
    solution: Solution
    before: float
    after: float


@torch.no_grad()  # type: ignore[untyped-decorator]
def refit(
    gm: fx.GraphModule,
    data: Sequence[Batch],
    sites: Sequence[Site],
    kept: Sequence[Indices],
    ridge: float,
    progress: Callable[[str, int, int], None] = silent,
) -> dict[int, Refit]:
    """New output weights and biases of the sites that lose units, by index.

    Args:
        gm: view of the original model.
        data: calibration samples.
        sites: in the order of execution.
        kept: units that each site keeps, ascending.
        ridge: penalty of the fit (:meth:`xopt.recover.ridge.Moments.solve`).
        progress: called with (stage, done, total).
    """
    feeds = [batch.feeds for batch in data]
    teacher, student = Replay(gm, feeds), Replay(gm, feeds)
    found = {}
    for index, (site, units) in enumerate(zip(sites, kept)):
        progress("compensate", index, len(sites))
        if len(units) == site.units:
            continue
        for replay in (teacher, student):
            replay.advance(site.down.matmul.outputs[0])
        found[index] = _refit(site, columns_of(site, units), teacher, student, data, ridge)
    return found


def columns_of(site: Site, units: Indices) -> Indices:
    """Columns of the input of the output projection that these units make."""
    return (units[:, None] * site.span + np.arange(site.span)).reshape(-1)


def _refit(
    site: Site, columns: Indices, teacher: Replay, student: Replay, data: Sequence[Batch], ridge: float
) -> Refit:
    inputs = student.values(site.down.input)
    assert inputs is not None  # the node before has run
    streams = [(s.values(site.residual) if site.residual is not None else None) for s in (teacher, student)]
    teacher.complete(site.down.output)
    wanted = teacher.values(site.down.output)
    assert wanted is not None
    ahead, behind = streams
    if ahead is not None and behind is not None:
        wanted = [y + _on_average(t - s, y) for y, t, s in zip(wanted, ahead, behind)]
    weight, bias = weights(site)
    moments = Moments(site.columns, weight.shape[1], intercept=bias is not None)
    for batch, x, y in zip(data, inputs, wanted):
        down = site.down
        moments.add(batch.rows(str(down.input.name), x).numpy(), batch.rows(str(down.output.name), y).numpy())
    plain = Solution(weight[columns], np.zeros(weight.shape[1]) if bias is None else bias)
    fitted = moments.solve(columns, ridge)
    student.give(site.down.output, [_apply(fitted, x, columns) for x in inputs])
    return Refit(columns, fitted, moments.error(columns, plain), moments.error(columns, fitted))


def _on_average(change: Tensor, branch: Tensor) -> Tensor:
    """A change of the stream where the branch joins it: the mean over the axes that the branch broadcasts over, which
    is what the squares over all of these places ask of the one value that they share.
    """
    whole = torch.broadcast_shapes(change.shape, branch.shape)
    return change.expand(whole).sum_to_size(branch.shape) * (branch.numel() / math.prod(whole))


def weights(site: Site) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """The output projection's weight [K, D] and bias [D], in float64."""
    weight, bias = site.down.weight.const_value, site.down.bias_value
    assert weight is not None
    vector = None if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float64)
    return weight.numpy().astype(np.float64), vector


def _apply(solution: Solution, x: Tensor, columns: Indices) -> Tensor:
    weight, bias = (torch.from_numpy(part).to(x.dtype) for part in (solution.weight, solution.bias))
    return x[..., torch.from_numpy(columns)] @ weight + bias
