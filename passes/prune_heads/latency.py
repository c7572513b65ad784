"""What units cost in measured time: a piecewise-linear table for heads and one for neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.ir.dependency import channel_groups, cut
from xopt.passes.prune_heads.sites import Site
from xopt.pipeline.context import PassContext

Array = npt.NDArray[np.float64]

SHARES = (0.25, 0.5, 0.75)
"""Shares of the units of all layers at which the model is timed, besides all."""


def latency_costs(
    model: ir.Model, context: PassContext, sites: Sequence[Site]
) -> Callable[[Site, npt.NDArray[np.int64]], Array]:
    """Cost functions for :func:`xopt.passes.prune_heads.allocation.allocate`, in milliseconds.

    The model is timed with the same share of heads (then of neurons) left in every layer. What that takes beyond the
    time extrapolated to no units at all is shared out among the sites by their multiply-accumulates.
    """
    assert context.latency is not None
    full = context.latency(model)
    curves = {}
    for heads in {site.heads for site in sites}:
        some = [site for site in sites if site.heads is heads]
        times = []
        for done, share in enumerate(SHARES):
            context.progress("latency of " + ("heads" if heads else "neurons"), done, len(SHARES))
            times.append(context.latency(_cut_to(model, some, share)))
        curves[heads] = (_curve([*times, full]), sum(site.macs * site.units for site in some))

    def costs(site: Site, sizes: npt.NDArray[np.int64]) -> Array:
        (shares, milliseconds), macs = curves[site.heads]
        kept = np.concatenate([[0.0], np.cumsum(sizes)]) / site.units
        return np.interp(kept, shares, milliseconds) * (site.macs * site.units / macs)

    return costs


def _cut_to(model: ir.Model, sites: Sequence[Site], share: float) -> ir.Model:
    """A copy of the model with the first units of each site."""
    copy = model.clone()
    names = {site.name: site for site in sites}
    for group in channel_groups(copy):
        site = names.get(group.name)
        if site is not None and site.group.kind == group.kind:
            count = max(int(share * site.units) // site.step, 1) * site.step
            cut(copy, group, range(count))
    return copy


def _curve(times: Sequence[float]) -> tuple[Array, Array]:
    """Shares from 0 to 1 and the time above that of no units; noise must not make fewer units slower."""
    shares = np.array([*SHARES, 1.0])
    rising = np.maximum.accumulate(np.asarray(times, np.float64))
    slope = (rising[1] - rising[0]) / (shares[1] - shares[0])
    base = max(rising[0] - slope * shares[0], 0.0)
    return np.concatenate([[0.0], shares]), np.concatenate([[0.0], rising - base])
