"""Which slices of which weights must be cut together, and the cut.

Attention heads couple columns of the query, key and value weights, their biases, rows of the output weight and
head-indexed masks; a neuron couples a column of the up (and gate) weight with a row of the down weight; a channel of
the residual stream couples embeddings, norms and every projection into and out of the stream. Weights that several
sites share join their groups: groups are the connected components of a graph of slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import numpy as np
import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir import edit, walk
from xopt.ir.projection import Projection, before_per_head_ops
from xopt.ir.shapes import infer_shapes
from xopt.ir.structure import POINTWISE, AttentionSite, FeedForward, Unrecognized, transformer_blocks
from xopt.ir.width import BlockedError, Retarget, stream_width

#: Ops of a division by the length of each head that are not pointwise with numbers.
LENGTH = ("ReduceL2", "ReduceSumSquare", "Sqrt")
#: Ops that may stand between the projections of a site: they treat heads or neurons alike, whatever their number.
BETWEEN = (*POINTWISE, *walk.NORMS, *LENGTH, *"MatMul Split Reshape RotaryEmbedding Attention".split())  # noqa: SIM905

Kind = Literal["heads", "neurons", "width"]
Site = AttentionSite | FeedForward


@dataclass(frozen=True)
class Member:
    """Unit i of a group is ``[start + i*unit, start + (i+1)*unit)`` of an axis of an initializer.

    A vector (a bias, a norm's scale) is cut for one ``reader``; other readers keep it as it is. Exporters let equal
    vectors share an initializer without meaning anything by it.
    """

    initializer: ir.Value
    axis: int
    start: int
    unit: int
    reader: ir.Node | None = None

    @property
    def parameters(self) -> int:
        """Number of elements of one unit."""
        assert self.initializer.const_value is not None
        shape = self.initializer.const_value.shape.numpy()
        return self.unit * math.prod(shape) // shape[self.axis]


@dataclass(frozen=True)
class ChannelGroup:
    """Slices that are cut together.

    Attributes:
        kind: "heads" (a unit is a key-value head with its query heads; a query head where there is a single key-value
            head), "neurons", or "width" (a unit is a channel of the residual stream).
        units: how many units there are.
        members: the slices of each unit.
        sites: the attentions or FFNs that the group belongs to: one, unless weights are shared; none for "width".
        retargets: constants that hold the width (of Reshape, Expand), for "width".
    """

    kind: Kind
    units: int
    members: tuple[Member, ...]
    sites: tuple[Site, ...]
    retargets: tuple[Retarget, ...] = ()

    @property
    def name(self) -> str:
        """Name of the first site's main node."""
        if not self.sites:
            return self.kind
        site = self.sites[0]
        return str(site.node.name if isinstance(site, AttentionSite) else site.activation.name)

    @property
    def parameters_per_unit(self) -> int:
        """How many parameters each unit has."""
        return sum(member.parameters for member in self.members)


def channel_groups(model: ir.Model) -> list[ChannelGroup]:
    """Everything that can be cut with :func:`cut`: heads and neurons in the order of the blocks, then the width."""
    return _Analysis(model).groups


def uncuttable(model: ir.Model) -> list[Unrecognized]:
    """Sites of the structure that are in no group, and why.

    Reasons: "no-projection", "read-elsewhere" (a value between the projections has another reader),
    "shared-weight" (something else reads a weight, or slices it differently), "mask-heads-unknown", "quantized" (a
    weight is dequantized from integers); for the width "width-..." with the op that stands in the way.
    """
    return _Analysis(model).refused


def cut(model: ir.Model, group: ChannelGroup, keep: Sequence[int]) -> None:
    """Keep these units of a group: slice its weights, and update attributes, Split sizes, masks and shapes, in place.

    The group is used up; other groups of the same :func:`channel_groups` stay valid.

    Raises:
        InputError: ``E-OPTION`` when ``keep`` is empty, or names a unit twice or one that does not exist.
    """
    units = sorted(set(keep))
    if not units or len(units) != len(keep) or units[0] < 0 or units[-1] >= group.units:
        raise InputError(
            "E-OPTION",
            f"units to keep must be different numbers from 0 to {group.units - 1}, at least one",
            where=f"channel group {group.name}",
        )
    regions = [_region(walk.Order(model.graph), site) for site in group.sites]
    for key in dict.fromkeys((member.initializer, member.reader) for member in group.members):
        _slice(model.graph, [m for m in group.members if (m.initializer, m.reader) == key], group.units, units)
    for site, region in zip(group.sites, regions):
        _cut_splits(model.graph, _ups(site), group.units, len(units))
        if isinstance(site, AttentionSite):
            _cut_heads(model.graph, site, group.units, units)
        for node in region:
            _refresh(node)
    for retarget in group.retargets:
        retarget.apply(model.graph, len(units))
    if group.kind == "width":
        infer_shapes(model)


class _Analysis:
    """One pass over the blocks: candidate slices per site, joined where sites share them."""

    def __init__(self, model: ir.Model) -> None:
        self.order = walk.Order(model.graph)
        self.refused: list[Unrecognized] = []
        self.slices = nx.Graph()
        blocks = transformer_blocks(model)
        for block in blocks:
            if block.attention is not None:
                self._join(block.attention, *_head_slices(block.attention))
            if block.ffn is not None:
                self._join(block.ffn, *_neuron_slices(block.ffn))
        found = [self._group(component) for component in nx.connected_components(self.slices)]
        self.groups = [group for group in found if group is not None]
        if blocks:
            first = blocks[0].attention or blocks[0].ffn
            assert first is not None  # a block has one of them
            self._width(blocks[0].input, _main_node(first))

    def _join(self, site: Site, units: int, members: list[Member]) -> None:
        """Tie a site's slices together, unless something else reads what lies between its projections."""
        if not members:
            self._refuse(site, "no-projection")
            return
        if any(part.quantized for part in (*_ups(site), _down(site))):
            self._refuse(site, "quantized")
            return
        region = set(_region(self.order, site))
        inside = region | {_down(site).matmul}
        foreign = any(not edit.is_op(node, *BETWEEN) for node in region)
        for value in (value for node in region for value in node.outputs):
            if foreign or value.is_graph_output() or not inside.issuperset(edit.consumers(value)):
                self._refuse(site, "read-elsewhere")
                return
        if (
            isinstance(site, AttentionSite)
            and site.head_mask
            and (walk.shape_of(site.mask) or ())[1:2] != (site.heads,)
        ):
            self._refuse(site, "mask-heads-unknown")
            return
        nx.add_path(self.slices, members)
        for member in members:
            self.slices.nodes[member].setdefault("sites", {})[id(site)] = (site, units)

    def _group(self, component: set[Member]) -> ChannelGroup | None:
        """One component as a group, if nothing else reads its weights, and all its sites have the same units."""
        members = [member for member in self.slices.nodes if member in component]
        owners = {key: pair for m in members for key, pair in self.slices.nodes[m]["sites"].items()}
        sites = [site for site, _ in owners.values()]
        readers = {node for site in sites for node in _readers(site)}
        shared = [member for member in members if member.reader is None]
        foreign = any(not readers.issuperset(edit.consumers(member.initializer)) for member in shared)
        claimed = {(m.initializer, m.axis) for m in self.slices.nodes if m not in component}
        clash = any((m.initializer, m.axis) in claimed for m in shared)
        if foreign or clash or len({units for _, units in owners.values()}) > 1:
            for site in sites:
                self._refuse(site, "shared-weight")
            return None
        kind: Kind = "heads" if isinstance(sites[0], AttentionSite) else "neurons"
        return ChannelGroup(kind, next(iter(owners.values()))[1], tuple(members), tuple(sites))

    def _width(self, stream: ir.Value, node: ir.Node) -> None:
        try:
            width = stream_width(stream)
        except BlockedError as blocked:
            self.refused.append(Unrecognized(node, str(blocked)))
            return
        members = tuple(Member(value, axis, 0, 1, reader) for value, axis, reader in width.weights)
        self.groups.append(ChannelGroup("width", width.size, members, (), tuple(width.retargets)))

    def _refuse(self, site: Site, reason: str) -> None:
        self.refused.append(Unrecognized(_main_node(site), reason))


def _main_node(site: Site) -> ir.Node:
    return site.node if isinstance(site, AttentionSite) else site.activation


def _ups(site: Site) -> list[Projection]:
    """The projections whose columns are cut."""
    if isinstance(site, FeedForward):
        return [part for part in (site.up, site.gate) if part is not None]
    parts = [site.q] if _shares_one_head(site) else [site.q, site.k, site.v]
    return [part for part in parts if part is not None]


def _down(site: Site) -> Projection:
    down = site.out if isinstance(site, AttentionSite) else site.down
    assert down is not None  # a site without one is in no group
    return down


def _readers(site: Site) -> Iterable[ir.Node]:
    """The nodes of a site that may read the weights of its group."""
    for part in _ups(site):
        yield from (node for node in (part.matmul, part.bias) if node is not None)
    yield _down(site).matmul
    yield _main_node(site)


def _shares_one_head(site: AttentionSite) -> bool:
    """Multi-query attention: query heads come and go alone."""
    return site.kv_heads == 1 and site.heads > 1


def _columns(part: Projection, unit: int) -> list[Member]:
    start = part.part.start if part.part is not None else 0
    members = [Member(part.weight, 1, start, unit)]
    if part.bias_value is not None:
        members.append(Member(part.bias_value, 0, start, unit, part.bias))
    return members


def _head_slices(site: AttentionSite) -> tuple[int, list[Member]]:
    """Number of units and the slices of an attention; no slices when it lacks a projection."""
    if site.q is None or site.k is None or site.v is None or site.out is None:
        return 0, []
    units = site.heads if _shares_one_head(site) else site.kv_heads
    group = site.heads // units
    members = _columns(site.q, group * site.head_dim)
    if not _shares_one_head(site):
        members += _columns(site.k, site.head_dim) + _columns(site.v, site.v_head_dim)
    members.append(Member(site.out.weight, 0, 0, group * site.v_head_dim))
    cut = ((site.q, group * site.head_dim), (site.k, site.head_dim), (site.v, site.v_head_dim))
    for (part, unit), value in zip(cut, site.node.inputs):
        if part in _ups(site):
            members += [Member(vector, 0, 0, unit, reader) for vector, reader in before_per_head_ops(value)[1]]
    if site.mask is not None and _own_mask(site):
        members.append(Member(site.mask, 1, 0, group))
    return units, list(dict.fromkeys(members))


def _own_mask(site: AttentionSite) -> bool:
    """Whether the mask is an initializer with a head axis that this attention alone reads."""
    return site.head_mask and site.mask is not None and walk.is_weight(site.mask, rank=4) and len(site.mask.uses()) == 1


def _neuron_slices(ffn: FeedForward) -> tuple[int, list[Member]]:
    members = [member for part in _ups(ffn) for member in _columns(part, 1)]
    return ffn.width, list(dict.fromkeys([*members, Member(ffn.down.weight, 0, 0, 1)]))


def _region(order: walk.Order, site: Site) -> list[ir.Node]:
    """The nodes from the projections that are cut to the value that the last projection reads, in order."""
    end = _down(site).input
    nodes = {part.matmul: None for part in _ups(site)}
    for part in _ups(site):
        nodes |= dict.fromkeys(order.between(part.matmul.outputs[0], end) or [])
    return sorted(nodes, key=order.position.__getitem__)


def _slice(graph: ir.Graph, members: Sequence[Member], total: int, units: Sequence[int]) -> None:
    """Keep the units in the axes and regions of one initializer that the members name."""
    value, reader = members[0].initializer, members[0].reader
    assert value.const_value is not None
    data = value.const_value.numpy()
    for axis in sorted({member.axis for member in members}):
        keep = np.ones(data.shape[axis], bool)
        for member in (m for m in members if m.axis == axis):
            region = np.zeros((total, member.unit), bool)
            region[list(units)] = True
            keep[member.start : member.start + region.size] = region.reshape(-1)
        data = np.compress(keep, data, axis=axis)
    tensor = ir.tensor(data, dtype=value.const_value.dtype, name=value.name)
    if reader is None or edit.consumers(value) == [reader]:
        value.const_value, value.shape = tensor, ir.Shape(data.shape)
    else:
        own = edit.initializer(graph, f"{reader.name}.{value.name}", tensor)
        for index in (index for index, operand in enumerate(reader.inputs) if operand is value):
            reader.replace_input_with(index, own)


def _cut_splits(graph: ir.Graph, parts: Iterable[Projection], total: int, kept: int) -> None:
    """Give the Split of a fused projection its own new sizes."""
    for output in dict.fromkeys(part.output for part in parts if part.part is not None):
        split, index = output.producer(), output.index()
        assert split is not None and index is not None
        sizes = walk.ints(split.inputs[1])
        assert sizes is not None
        sizes[index] = sizes[index] // total * kept
        split.replace_input_with(1, edit.initializer(graph, f"{split.name}.sizes", np.array(sizes, np.int64)))


def _cut_heads(graph: ir.Graph, site: AttentionSite, total: int, units: Sequence[int]) -> None:
    """Update head counts and, where it is not a member of the group, the mask with a head axis."""
    node = site.node
    kv_heads = site.kv_heads if _shares_one_head(site) else len(units)
    edit.set_attributes(node, q_num_heads=site.heads // total * len(units), kv_num_heads=kv_heads)
    mask = node.inputs[3] if site.head_mask else None
    if mask is None or _own_mask(site):
        return
    group = site.heads // total
    heads = np.array([unit * group + i for unit in units for i in range(group)], np.int64)
    node.replace_input_with(3, _pick_heads(graph, node, mask, heads))


def _pick_heads(graph: ir.Graph, node: ir.Node, mask: ir.Value, heads: np.ndarray) -> ir.Value:
    """The mask of some heads: a new initializer for a constant, otherwise a Gather (one, however often it is cut)."""
    data = edit.constant(mask)
    if data is not None:
        return edit.initializer(graph, f"{mask.name}.heads", data[:, heads])
    assert mask.shape is not None
    shape = ir.Shape([mask.shape[0], len(heads), *list(mask.shape)[2:]])
    gather = edit.producer(mask, "Gather")
    earlier = edit.constant(gather.inputs[1]) if gather is not None and walk.axis(gather, 0) == 1 else None
    if gather is not None and earlier is not None and earlier.ndim == 1 and edit.consumers(mask) == [node]:
        gather.replace_input_with(1, edit.initializer(graph, f"{node.name}.heads", earlier[heads]))
        mask.shape = shape
        return mask
    return edit.insert(
        node, "Gather", [mask, edit.initializer(graph, f"{node.name}.heads", heads)], {"axis": 1}, shape=shape
    )


def _refresh(node: ir.Node) -> None:
    """Recompute the width in the shape of a node's outputs, and the head count of a rotary embedding."""
    source = max(
        (value for value in node.inputs if value is not None and value.shape), key=lambda v: len(v.shape or ())
    )
    if edit.is_op(node, "MatMul", "Attention"):
        source = edit.operand(node, 0)
    assert source.shape is not None
    lead, width = list(source.shape)[:-1], (walk.shape_of(source) or ())[-1]
    if edit.is_op(node, "MatMul"):
        width = (walk.shape_of(node.inputs[1]) or ())[-1]
    elif edit.is_op(node, "Attention"):
        values = (walk.shape_of(node.inputs[2]) or ())[-1] or 0
        width = values // walk.int_attribute(node, "kv_num_heads", 1) * walk.int_attribute(node, "q_num_heads", 1)
    elif edit.is_op(node, "ReduceL2", "ReduceSumSquare"):
        width = 1
    elif edit.is_op(node, "RotaryEmbedding") and width is not None:
        before = (walk.shape_of(node.outputs[0]) or ())[-1] or 0
        edit.set_attributes(node, num_heads=width * walk.int_attribute(node, "num_heads", 1) // before)
    elif edit.is_op(node, "Reshape") and width is not None:
        target = walk.ints(node.inputs[1]) or []
        if len(target) == 4:  # [0, 0, -1, head_dim]
            lead, width = [*lead, width // target[3]], target[3]
        else:  # [0, 0, -1]
            heads = lead.pop()
            width = width * heads if isinstance(heads, int) else None
    widths = walk.ints(node.inputs[1]) if edit.is_op(node, "Split") else [width]
    for value, extent in zip(node.outputs, widths or []):
        value.shape = ir.Shape([*lead, extent])
