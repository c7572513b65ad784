"""How much each unit matters. Importance is >= 0; only its order and its sums mean something.

fisher     the second-order loss of removal, without labels. With outputs o and a gate m_u = 1 on unit u, the squared
           change of the outputs is (Gauss-Newton) E |do/dm_u|^2, here by random projections r: E (d(r.o)/dm_u)^2.
           Under compensation only what the other units of the site cannot replace is lost, so the gate acts on the
           unit's residual in the regression on the others (optimal brain surgeon, on the outputs of the whole model).
           The gate and the budget search are Kwon et al.'s (NeurIPS 2022).
optin      change of later features when the unit is masked (OPTIN, ICLR 2024): Gram matrices of normalized tokens, plus
           the divergence of the outputs. Neurons go in groups, one fixed sample of tokens, masks reset for each unit.
magnitude  squared norm of the unit's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from xopt.errors import InputError
from xopt.ir.dependency import Member
from xopt.ir.fx import run_with_values
from xopt.passes.prune_heads.sites import Site
from xopt.pipeline.context import silent
from xopt.recover.ridge import Moments
from xopt.recover.samples import Batch

Array = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]

PROJECTIONS = 4
"""Random projections of the outputs of each sample."""
LEAST_LEFT = 0.05
"""Bound of the share of the residual that fitting leaves: with fewer tokens than unknowns nothing is known of it."""


def magnitude(sites: Sequence[Site]) -> list[Array]:
    """Sum of squares of all weights of each unit."""
    return [sum((_squares(site, member) for member in site.group.members), np.zeros(site.units)) for site in sites]


def _squares(site: Site, member: Member) -> Array:
    assert member.initializer.const_value is not None
    data = np.moveaxis(member.initializer.const_value.numpy().astype(np.float64), member.axis, 0)
    part = data[member.start : member.start + site.units * member.unit]
    squares: Array = np.square(part).reshape(site.units, -1).sum(axis=1)
    return squares


def gate_gradients(
    gm: fx.GraphModule,
    data: Sequence[Batch],
    sites: Sequence[Site],
    outputs: Sequence[str],
    *,
    ridge: float | None,
    seed: int,
    progress: Progress = silent,
) -> list[Array]:
    """Gradients of projected outputs by the gate of each unit: [samples * PROJECTIONS, units] for each site.

    Args:
        outputs: names of the model's outputs.
        ridge: penalty of the regression on the other units; None to gate the whole unit (nothing compensates).

    Raises:
        InputError: ``E-OPTION``: no output changes smoothly with a unit (all are ids or what was rounded).
    """
    residuals = None if ridge is None else _residual_maps(gm, data, sites, ridge)
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[] for _ in sites]
    for done, batch in enumerate(data):
        progress("fisher", done, len(data))
        values, results = _forward(gm, batch, sites, outputs)
        if not any(output.requires_grad for output in results):
            what = "no output has gradients, which the score is made of"
            raise InputError("E-OPTION", what, cure='choose score="optin" or "magnitude"')
        gated = [value.detach().float() for value in values]
        if residuals is not None:
            gated = [(x - mean) @ matrix for x, (mean, matrix) in zip(gated, residuals)]
        for _ in range(PROJECTIONS):
            loss = sum((_project(output, batch, generator) for output in results), torch.zeros(()))
            gradients = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
            for part, site, x, gradient in zip(rows, sites, gated, gradients):
                part.append(_per_sample(site, x, gradient, batch))
    return [torch.cat(parts).numpy().astype(np.float64) for parts in rows]


def fisher(rows: Sequence[Array]) -> list[Array]:
    """Importance from gate gradients: the diagonal of the Fisher matrix."""
    return [np.square(part).mean(axis=0) for part in rows]


def _forward(
    gm: fx.GraphModule, batch: Batch, sites: Sequence[Site], outputs: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of the output projections, and the floating outputs, with gradients between them."""
    names = [str(site.down.input.name) for site in sites]
    with torch.enable_grad():
        found = run_with_values(gm, batch.feeds, [*names, *outputs])
    return [found[name] for name in names], [found[n] for n in outputs if found[n].is_floating_point()]


def _project(output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """A random projection of each sample's output, summed: samples do not mix, so gradients stay apart.

    Padding is left out, and each output counts by its own scale.
    """
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    if batch.valid is not None and tuple(output.shape[:2]) == tuple(batch.valid.shape):
        direction = direction * batch.valid.reshape(*batch.valid.shape, *[1] * (output.ndim - 2))
    scale = output.detach().float().norm() / batch.size**0.5
    return (output.float() * direction).sum() / scale.clamp_min(1e-12)


def _per_sample(site: Site, x: Tensor, gradient: Tensor | None, batch: Batch) -> Tensor:
    """Gate gradients [samples, units] from values and gradients [..., units * span]."""
    if gradient is None:
        return torch.zeros(batch.count, site.units)
    product = batch.by_sample(str(site.down.input.name), x * gradient.float())
    if batch.valid is not None and tuple(product.shape[:2]) == tuple(batch.valid.shape):
        product = product * batch.valid[..., None]
    return product.reshape(len(product), -1, site.units, site.span).sum(dim=(1, 3))


def _residual_maps(
    gm: fx.GraphModule, data: Sequence[Batch], sites: Sequence[Site], ridge: float
) -> list[tuple[Tensor, Tensor]]:
    """For each site, mean [K] and matrix [K, K] with (x - mean) @ matrix = each unit less its prediction by the others.

    With P the inverse of the penalized Gram matrix, the residual of unit u is x P[:, u] P[u, u]^-1. It is larger on
    tokens that were not fitted, by 1 / (1 - degrees of freedom / tokens): the leave-one-out residual, on average.
    """
    names = [str(site.down.input.name) for site in sites]
    moments = [Moments(site.columns, 0) for site in sites]
    for batch in data:
        with torch.no_grad():
            found = run_with_values(gm, batch.feeds, names)
        for name, moment in zip(names, moments):
            rows = batch.rows(name, found[name]).numpy()
            moment.add(rows, np.zeros((len(rows), 0), np.float32))
    maps = []
    for site, moment in zip(sites, moments):
        inverse = moment.precision(ridge)
        spans = [slice(u * site.span, (u + 1) * site.span) for u in range(site.units)]
        matrix = np.concatenate([inverse[:, s] @ np.linalg.inv(inverse[s, s]) for s in spans], axis=1)
        matrix /= max(1 - moment.freedom(inverse, ridge) / moment.rows, LEAST_LEFT)
        maps.append((torch.from_numpy(moment.mean_x).float(), torch.from_numpy(matrix).float()))
    return maps
