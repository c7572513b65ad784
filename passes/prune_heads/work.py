"""One run of the pass, step by step: score, allocate, choose, compensate, cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import fx

from xopt.ir import edit
from xopt.ir.cost import cost
from xopt.ir.dependency import cut
from xopt.ir.fx import to_fx
from xopt.ir.structure import transformer_blocks
from xopt.passes.prune_heads.allocation import allocate, uniform
from xopt.passes.prune_heads.compensate import Refit, refit
from xopt.passes.prune_heads.latency import latency_costs
from xopt.passes.prune_heads.optin import optin
from xopt.passes.prune_heads.rearrange import rearrange
from xopt.passes.prune_heads.scores import fisher, gate_gradients, magnitude
from xopt.passes.prune_heads.sites import Site, find_sites
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.recover.samples import Batch, batches

if TYPE_CHECKING:
    from xopt.passes.prune_heads import PruneHeads

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]


def prune(options: PruneHeads, model: ir.Model, context: PassContext) -> PassReport:
    """Prune ``model`` in place."""
    report = PassReport(options)
    found = find_sites(model, ffn=options.ffn, tile=context.tile, dims=context.dims)
    sites = [site for site, reason in found if report.accepts(site, reason) and isinstance(site, Site)]
    if not sites or options.keep == 1.0:
        return report
    order = {node: index for index, node in enumerate(model.graph)}
    sites.sort(key=lambda site: order[site.down.matmul])
    work = _Work(options, model, context, sites)
    before = cost(model, context.dims).macs
    importance, gradients = work.score()
    counts = work.allocate(importance, report)
    kept = [_choose(*args) for args in zip(importance, counts, gradients)]
    fits = refit(work.view, work.data, sites, kept, options.ridge, context.progress) if options.compensate else {}
    for index, (site, units) in enumerate(zip(sites, kept)):
        if len(units) < site.units:
            if index in fits:
                _write(model.graph, site, fits[index])
            cut(model, site.group, [int(unit) for unit in units])
            report.rewrote(site)
    edit.remove_dead(model)
    report.numbers.update(_numbers(sites, kept, fits), macs_before=before, macs_after=cost(model, context.dims).macs)
    return report


@dataclass(frozen=True)
class _Work:
    """What one run works on: the options, the model, its surroundings, and where units may go."""

    options: PruneHeads
    model: ir.Model
    context: PassContext
    sites: list[Site]

    @cached_property
    def view(self) -> fx.GraphModule:
        """The model for torch; weights have memory of their own, so that cutting the model leaves it alone."""
        return to_fx(self.model, copy=True)

    @cached_property
    def data(self) -> list[Batch]:
        """The calibration samples."""
        return batches(self.model, self.view, self.context.samples)

    def score(self) -> tuple[list[Array], list[Array | None]]:
        """Importance of each unit of each site, and the gate gradients where they are to be used."""
        options, context = self.options, self.context
        outputs = [str(value.name) for value in self.model.graph.outputs]
        nothing: list[Array | None] = [None] * len(self.sites)
        if options.score == "magnitude":
            return magnitude(self.sites), nothing
        if options.score == "optin":
            streams = dict.fromkeys(str(block.output.name) for block in transformer_blocks(self.model))
            sample = self.data[len(self.data) // 2]
            return (
                optin(
                    self.view, sample, self.sites, list(streams), outputs, seed=context.seed, progress=context.progress
                ),
                nothing,
            )
        rows = gate_gradients(
            self.view,
            self.data,
            self.sites,
            outputs,
            ridge=options.ridge if options.compensate else None,
            seed=context.seed,
            progress=context.progress,
        )
        return fisher(rows), list(rows) if options.rearrange else nothing

    def allocate(self, importance: list[Array], report: PassReport) -> list[int]:
        """How many units each site keeps."""
        options = self.options
        if options.uniform:
            return uniform(self.sites, options.keep)
        if options.budget == "latency" and self.context.latency is not None:
            table = latency_costs(self.model, self.context, self.sites)
            return allocate(self.sites, importance, options.keep, table)
        if options.budget == "latency":
            report.numbers["budget"] = "macs: latency was not measured"
        return allocate(self.sites, importance, options.keep)


def _choose(importance: Array, count: int, gradients: Array | None) -> Indices:
    """The units to keep: the most important, of equals the first; swapped by their joint effect."""
    removed = np.argsort(-importance, kind="stable")[count:]
    if gradients is not None and len(removed):
        removed = rearrange(gradients, removed)
    return np.setdiff1d(np.arange(len(importance)), removed)


def _write(graph: ir.Graph, site: Site, fit: Refit) -> None:
    """Put a new output projection in place; rows of removed units stay until they are cut."""
    weight, bias = site.down.weight, site.down.bias_value
    assert weight.const_value is not None
    full = weight.const_value.numpy().copy()
    full[fit.columns] = fit.solution.weight
    weight.const_value = ir.tensor(full, dtype=weight.const_value.dtype, name=weight.name)
    add = site.down.bias
    if add is not None and bias is not None and bias.const_value is not None:
        own = fit.solution.bias.astype(bias.const_value.numpy().dtype)
        # The old vector may be shared: equal ones are merged by other passes.
        add.replace_input_with(list(add.inputs).index(bias), edit.initializer(graph, str(bias.name), own))


def _numbers(sites: list[Site], kept: list[Indices], fits: dict[int, Refit]) -> dict[str, float | int | str]:
    """The report's figures: kept units of every site, shares, and the error of the fits."""
    numbers: dict[str, float | int | str] = {}
    for kind, heads in (("heads", True), ("neurons", False)):
        chosen = [(site, units) for site, units in zip(sites, kept) if site.heads is heads]
        if chosen:
            numbers[f"{kind}_kept"] = " ".join(str(len(units)) for _, units in chosen)
            numbers[f"{kind}_before"] = " ".join(str(site.units) for site, _ in chosen)
    whole = sum(site.macs * site.units for site in sites)
    numbers["kept_share"] = sum(site.macs * len(units) for site, units in zip(sites, kept)) / whole
    if fits:
        numbers["error_plain"] = sum(fit.before for fit in fits.values())
        numbers["error_compensated"] = sum(fit.after for fit in fits.values())
    return numbers
