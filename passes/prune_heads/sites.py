"""Where units can be removed: each attention with its heads, each FFN with its neurons, and what a unit costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from xopt.ir import edit, walk
from xopt.ir.cost import cost
from xopt.ir.dependency import ChannelGroup, channel_groups, uncuttable
from xopt.ir.projection import Projection
from xopt.ir.structure import AttentionSite, explain


@dataclass(frozen=True)
class Site:
    """One attention or FFN whose units may go.

    A unit is a key-value head with its query heads, a query head where all share one key-value head, or a neuron.

    Attributes:
        group: the slices that are cut together.
        down: the projection that alone reads the units: its input [..., units * span].
        units: how many there are.
        span: columns of the input of ``down`` that one unit makes.
        step: units are kept in multiples of this (or all of them).
        macs: multiply-accumulates of one unit in one run at the assumed sizes.
        residual: what the output of ``down`` is added to, when an Add alone reads it.
    """

    group: ChannelGroup
    down: Projection
    units: int
    span: int
    step: int
    macs: int
    residual: ir.Value | None

    @property
    def heads(self) -> bool:
        """Whether the units are heads."""
        return self.group.kind == "heads"

    @property
    def name(self) -> str:
        """Name of the attention or activation node."""
        return self.group.name

    @property
    def columns(self) -> int:
        """Width of the input of ``down``."""
        return self.units * self.span


def find_sites(
    model: ir.Model, *, ffn: bool, tile: int, dims: Mapping[str, int]
) -> Iterator[tuple[Site | ir.Node, str | None]]:
    """Every attention (and FFN, if asked for), in order: what can be cut with None, the rest with the reason.

    Args:
        ffn: whether FFNs are wanted.
        tile: neurons are kept in multiples of this.
        dims: sizes of symbolic dimensions, for the cost of a unit.
    """
    wanted = ("heads", "neurons") if ffn else ("heads",)
    macs = cost(model, dims).per_node
    groups = [group for group in channel_groups(model) if group.kind in wanted]
    for group in groups:
        yield _site(group, tile, macs), _problem(group)
    seen = {_main_node(group) for group in groups}
    for left in (*uncuttable(model), *explain(model)):
        attention = edit.is_op(left.node, "Attention")
        if left.node not in seen and not left.reason.startswith("width-") and (attention or ffn):
            seen.add(left.node)
            yield left.node, left.reason


def _main_node(group: ChannelGroup) -> ir.Node:
    site = group.sites[0]
    return site.node if isinstance(site, AttentionSite) else site.activation


def _problem(group: ChannelGroup) -> str | None:
    if len(group.sites) > 1:
        return "shared-weight"
    return "single-unit" if group.units < 2 else None


def _site(group: ChannelGroup, tile: int, macs: Mapping[str, int]) -> Site:
    owner = group.sites[0]
    down = owner.out if isinstance(owner, AttentionSite) else owner.down
    assert down is not None  # the group has a slice of it
    span = next(member.unit for member in group.members if member.initializer is down.weight)
    step = 1 if group.kind == "heads" else min(tile, group.units)
    return Site(group, down, group.units, span, step, _unit_macs(group, down, macs), _residual(down))


def _unit_macs(group: ChannelGroup, down: Projection, macs: Mapping[str, int]) -> int:
    """A unit's share of the products it takes part in; its parameters where their size is unknown."""
    owner = group.sites[0]
    ups = (owner.q, owner.k, owner.v) if isinstance(owner, AttentionSite) else (owner.up, owner.gate)
    matmuls = {part.matmul: part.weight for part in (*ups, down) if part is not None}
    total = 0
    for matmul, weight in matmuls.items():
        units = [member for member in group.members if member.initializer is weight]
        for member in units:
            extent = (walk.shape_of(weight) or ())[member.axis] or 1
            total += macs.get(str(matmul.name), 0) * member.unit // extent
    if isinstance(owner, AttentionSite):
        total += macs.get(str(owner.node.name), 0) // group.units
    return total or group.parameters_per_unit


def _residual(down: Projection) -> ir.Value | None:
    readers = edit.consumers(down.output)
    if len(readers) != 1 or not edit.is_op(readers[0], "Add") or down.output.is_graph_output():
        return None
    others = [value for value in readers[0].inputs if value is not down.output]
    return others[0] if len(others) == 1 and not walk.is_weight(others[0]) else None
