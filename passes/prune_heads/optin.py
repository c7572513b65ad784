"""OPTIN's score (Khaki & Plataniotis, ICLR 2024): how far later features move when a unit is masked, without gradients.

    score = sum over blocks z from the unit's own on: |M_z - M'_z|^2    M: Gram matrix of a sample of normalized tokens
          + a share of the divergence of the outputs                    T^2 KL(softmax(o/T) | softmax(o'/T)), T = 4

Masks are reset for every unit, one sample of tokens serves all, and only what follows the unit is computed again.
Neurons are masked a group at a time (units of like contribution together), the score is shared out by contribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.nn import functional

from xopt.ir.fx import run_node
from xopt.passes.prune_heads.compensate import weights
from xopt.passes.prune_heads.sites import Site
from xopt.pipeline.context import silent
from xopt.recover.samples import Batch

Array = npt.NDArray[np.float64]

TOKENS = 768
"""Tokens in the Gram matrices."""
TEMPERATURE = 4.0
OUTPUT_SHARE = 0.1
"""The outputs' term sits one decade below the features' (the paper's lambda)."""
NEURON_GROUPS = 32
"""Groups that the neurons of one FFN are masked in."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def optin(
    gm: fx.GraphModule,
    batch: Batch,
    sites: Sequence[Site],
    features: Sequence[str],
    outputs: Sequence[str],
    *,
    seed: int,
    progress: Callable[[str, int, int], None] = silent,
) -> list[Array]:
    """Importance of each unit of each site.

    Args:
        gm: view of the model.
        batch: the samples to look at.
        sites: in the order of execution.
        features: names of the residual stream after each block.
        outputs: names of the model's outputs.
        seed: of the sample of tokens.
    """
    probe = _Probe.of(gm, batch, features, outputs, seed)
    parts: list[tuple[Array, Array]] = []
    shares: list[Array] = []
    for done, site in enumerate(sites):
        progress("optin", done, len(sites))
        scores, share = _site_scores(probe, site)
        parts.append(scores)
        shares.append(share)
    moved, diverged = (np.concatenate([part[i] for part in parts]).mean() for i in range(2))
    balance = OUTPUT_SHARE * moved / diverged if diverged > 0 else 0.0
    return [(part[0] + balance * part[1]) * share for part, share in zip(parts, shares)]


def _site_scores(probe: _Probe, site: Site) -> tuple[tuple[Array, Array], Array]:
    """Both terms of the group that each unit is in, and the unit's share of its group."""
    matrix = torch.from_numpy(weights(site)[0]).float()
    x = probe.value(str(site.down.input.name)).float()
    y = probe.value(str(site.down.output.name))
    tokens = probe.batch.rows(str(site.down.input.name), x)
    norms = (tokens.square().mean(0) * matrix.square().sum(1)).reshape(site.units, site.span).sum(1).double().numpy()
    count = site.units if site.heads else min(NEURON_GROUPS, site.units)
    moved, diverged, share = np.zeros(site.units), np.zeros(site.units), np.zeros(site.units)
    for group in np.array_split(np.argsort(norms, kind="stable"), count):
        columns = torch.from_numpy((group[:, None] * site.span + np.arange(site.span)).reshape(-1))
        masked = y - (x[..., columns] @ matrix[columns]).to(y.dtype)
        moved[group], diverged[group] = probe.change(str(site.down.output.name), masked)
        total = norms[group].sum()
        share[group] = norms[group] / total if total > 0 else 1 / len(group)
    return (moved, diverged), share


@dataclass
class _Probe:
    """One batch through the graph with every value kept, to compute again what follows a changed value."""

    gm: fx.GraphModule
    batch: Batch
    features: list[fx.Node]
    outputs: list[fx.Node]
    sample: Tensor
    values: dict[fx.Node, Tensor]
    nodes: dict[str, fx.Node]

    @classmethod
    def of(cls, gm: fx.GraphModule, batch: Batch, features: Sequence[str], outputs: Sequence[str], seed: int) -> _Probe:
        named = {node.name: node for node in gm.graph.nodes}
        nodes = {value: named[name] for value, name in gm.meta["values"].items()}
        inputs = {target: name for name, target in gm.meta["inputs"].items()}
        interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        values: dict[fx.Node, Tensor] = {}
        interpreter.env = values
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = batch.feeds[inputs[str(node.target)]]
            elif node.op != "output":
                values[node] = run_node(interpreter, node)
        kept = [nodes[name] for name in outputs if values[nodes[name]].is_floating_point()]
        tokens = min((len(batch.rows(name, values[nodes[name]])) for name in features), default=0)
        sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:TOKENS]
        return cls(gm, batch, [nodes[name] for name in features], kept, sample, values, nodes)

    def value(self, name: str) -> Tensor:
        return self.values[self.nodes[name]]

    def change(self, name: str, value: Tensor) -> tuple[float, float]:
        """How far features move, and how far outputs diverge, when a value is replaced by another."""
        changed = {self.nodes[name]: value}
        interpreter = fx.Interpreter(self.gm, garbage_collect_values=False)
        for node in self.gm.graph.nodes:
            if node not in changed and node.op != "output" and any(n in changed for n in node.all_input_nodes):
                interpreter.env = {n: changed.get(n, self.values[n]) for n in node.all_input_nodes}
                changed[node] = run_node(interpreter, node)
        moved = sum(
            float((self._gram(node, changed[node]) - self._gram(node, self.values[node])).square().sum())
            for node in self.features
            if node in changed
        )
        diverged = sum(
            float(self._divergence(node, self.values[node], changed[node])) for node in self.outputs if node in changed
        )
        return moved, diverged

    def _gram(self, node: fx.Node, feature: Tensor) -> Tensor:
        tokens = functional.normalize(self.batch.rows(node.meta["value"], feature)[self.sample], dim=-1)
        return tokens @ tokens.T

    def _divergence(self, node: fx.Node, before: Tensor, after: Tensor) -> Tensor:
        name = node.meta["value"]
        p, q = (functional.log_softmax(self.batch.rows(name, o) / TEMPERATURE, dim=-1) for o in (before, after))
        return TEMPERATURE**2 * functional.kl_div(q, p, reduction="sum", log_target=True)
