"""Remove padding: tokens that the padding mask hides are computed nowhere between the first block and the last.

    before   x [B, S, D] ─▶ block ─▶ … ─▶ block ─▶ y [B, S, D]
    after    x ─▶ PackTokens ─▶ block ─▶ … ─▶ block ─▶ UnpackTokens ─▶ y          all [T, D] between, T real tokens

What treats each token alone (linear layers, norms, activations, residuals) runs on the T tokens of all sequences, one
behind the other; attention becomes ``xopt::PackedAttention``, where each token sees its own sequence. Tokens that are
shown keep their values; where there was padding the outputs become zeros, which is why the pass counts as lossy.

Refuses  "no-padding-mask": attention has no mask, or one that does not come from an input of [batch, sequence] which is
         nonzero for tokens.
         "sees-padding": this attention has another mask, or none, and so reads hidden tokens.
         "soft-cap", "attention-4d", "cross-attention": forms that the packed attention does not have.
         "tokens-together": something before this attention does not treat each token alone (rotary embeddings do not:
         they count positions from the first token of the padded batch).
Source   Zhai et al. (IPDPS 2023), ByteTransformer: padding-free computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xopt.ir import edit, infer_shapes, ops, quantized, walk
from xopt.ir.structure import Block, transformer_blocks
from xopt.ir.tokens import tokenwise
from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.requirements import require_attention
from xopt.runtime.reference import ReferenceSession

HIDDEN = -1e4
"""An additive mask at or below this hides a key."""


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Compute nothing for padding: tokens of all sequences of a batch lie one behind the other."""

    name: ClassVar[str] = "remove-padding"
    effect: ClassVar[Effect] = Effect.LOSSY

    def requires(self, model: ir.Model, context: PassContext) -> None:
        if not any(node.op_type == "PackedAttention" for node in model.graph):
            require_attention(model, self)

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        blocks = [block for block in transformer_blocks(model) if block.attention is not None]
        if not blocks:
            return report  # packed already
        masks = _padding_masks(model, [block.attention.mask for block in blocks if block.attention is not None])
        source = next(iter(masks.values()), None)
        problems = [_problem(block, masks, source) for block in blocks]
        fitting = [block.attention for block, problem in zip(blocks, problems) if block.attention and problem is None]
        region = _Region(model.graph, blocks[0].input, {site.node for site in fitting})
        region.find()
        accepted = []
        for block, problem in zip(blocks, problems):
            outside = block.attention is None or block.attention.node not in region.nodes
            if report.accepts(block, problem or ("tokens-together" if outside else None)):
                accepted.append(block)
        if accepted and source is not None:
            region.rewrite(source)
            for name in ("PackTokens", "UnpackTokens", "PackedAttention"):
                ops.add_function(model, name)
            for block in accepted:
                report.rewrote(block)
            edit.remove_dead(model)
            infer_shapes(model)
        return report


def _problem(block: Block, masks: dict[ir.Value, ir.Value], source: ir.Value | None) -> str | None:
    site = block.attention
    assert site is not None
    if source is None:
        return "no-padding-mask"
    if site.mask is None or masks.get(site.mask) is not source:
        return "sees-padding"
    if site.cross:
        return "cross-attention"
    if len(walk.shape_of(site.node.inputs[0]) or ()) != 3:
        return "attention-4d"
    return "soft-cap" if edit.attribute(site.node, "softcap", 0.0) else None


# -- which masks hide padding ------------------------------------------------------------------------------------------
def _padding_masks(model: ir.Model, masks: list[ir.Value | None]) -> dict[ir.Value, ir.Value]:
    """Masks that show exactly the keys for which an input [B, S] is nonzero, with that input."""
    found = {}
    for mask in dict.fromkeys(masks):
        for source in _inputs_before(mask):
            if mask is not None and _shows(model, mask, source):
                found[mask] = source
                break
    return found


def _inputs_before(value: ir.Value | None) -> Iterator[ir.Value]:
    """Graph inputs of rank 2 that ``value`` is computed from."""
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        if one.is_graph_input() and one.shape is not None and len(one.shape) == 2:
            yield one
        node = one.producer()
        pending += [] if node is None else node.inputs


def _shows(model: ir.Model, mask: ir.Value, source: ir.Value) -> bool:
    """Try it: a batch in which sequences of different lengths stand at the left or at the right."""
    part = model.clone()
    by_name = {output.name: output for node in part.graph for output in node.outputs}
    part.graph.outputs.clear()
    part.graph.outputs.append(by_name[mask.name])
    edit.remove_dead(part)
    feeds = {value.name or "": _zeros(value) for value in part.graph.inputs}
    shown = feeds[source.name or ""]
    batch, length = shown.shape
    for row in range(batch):
        few = 1 + row % length
        shown[row, :few] = row % 2 == 0
        shown[row, length - few :] = row % 2 == 1 or few == length
    found: np.ndarray = np.asarray(next(iter(ReferenceSession(part).run(feeds).values())))
    visible = found if found.dtype == np.bool_ else found.astype(np.float32) > HIDDEN
    if visible.ndim != 4 or visible.shape[1:] != (1, 1, length) or visible.shape[0] not in (1, batch):
        return False  # of more keys than this input has positions, say
    return bool((visible[:, 0, 0] == (shown != 0)).all())


def _zeros(value: ir.Value) -> np.ndarray:
    """An array for an input; symbolic sizes become small numbers, the same for the same name."""
    assert value.shape is not None and value.dtype is not None
    shape = [dim if isinstance(dim, int) else 4 + axis for axis, dim in enumerate(value.shape)]
    return np.zeros(shape, value.dtype.numpy())


# -- the rewrite -------------------------------------------------------------------------------------------------------
@dataclass
class _Region:
    """The nodes behind ``entry`` that can work on packed tokens.

    Attributes:
        graph: where they are.
        entry: the residual stream before the first block, [B, S, D].
        attentions: the attention nodes that may be packed.
        inside: values that will be packed.
        nodes: what computes them, in order.
    """

    graph: ir.Graph
    entry: ir.Value
    attentions: set[ir.Node]
    inside: set[ir.Value] = field(default_factory=set)
    nodes: list[ir.Node] = field(default_factory=list)

    def rewrite(self, source: ir.Value) -> None:
        """Pack the tokens for which ``source`` is nonzero, and unpack what the rest of the graph reads."""
        shown = edit.insert(
            self.graph[0], "Cast", [source], {"to": ir.DataType.BOOL}, name="shown", dtype=ir.DataType.BOOL
        )
        packed: dict[ir.Value, ir.Value] = {}
        for node in self.nodes:
            self._unpack_for_others(node, shown)
            for index, value in enumerate(node.inputs):
                if value is None or value in self.inside or not self._has_tokens(value, node, index):
                    continue
                if value not in packed:
                    packed[value] = edit.insert(node, "PackTokens", [value, shown], domain=ops.DOMAIN)
                node.replace_input_with(index, packed[value])
            if node.op_type == "Attention":
                self._pack_attention(node, shown)
            elif "axis" in node.attributes:
                edit.set_attributes(node, axis=-1)

    def find(self) -> None:
        """Collect the nodes and values of the region."""
        carriers = {self.entry}
        for node in self.graph:
            if any(value in carriers for value in node.inputs) and self._fits(node, carriers):
                carriers.update(node.outputs)
                self.inside.update(node.outputs)
                self.nodes.append(node)

    def _fits(self, node: ir.Node, carriers: set[ir.Value]) -> bool:
        """Whether a node that reads tokens can read packed ones."""
        if node.op_type == "Attention":
            return node in self.attentions and all(value in carriers for value in node.inputs[:3])
        if edit.is_op(node, "MatMul"):
            return node.inputs[0] in carriers and quantized.stored_matrix(node.inputs[1]) is not None
        if edit.is_op(node, "Split", *walk.NORMS):
            return node.inputs[0] in carriers and walk.axis(node, 0 if node.op_type == "Split" else -1) == 2
        others = [value for value in node.inputs if value is not None and value not in carriers]
        return tokenwise(node) and all(self._is_small(value) or self._is_stream(value) for value in others)

    def _has_tokens(self, value: ir.Value, node: ir.Node, index: int) -> bool:
        """Whether an input of a node in the region is a tensor of tokens that is not packed yet."""
        if value is self.entry:
            return True
        return tokenwise(node) and not edit.is_op(node, *walk.NORMS) and not self._is_small(value)

    @staticmethod
    def _is_small(value: ir.Value) -> bool:
        """One number, or one a column: it broadcasts over packed tokens as over others."""
        shape = walk.shape_of(value)
        return shape is not None and (len(shape) <= 1 or (len(shape) == 2 and shape[0] == 1))

    def _is_stream(self, value: ir.Value) -> bool:
        """Whether a value has the shape and type of the residual stream, but for the width."""
        mine, its = self.entry.shape, value.shape
        same = mine is not None and its is not None and len(its) == 3 and tuple(its)[:2] == tuple(mine)[:2]
        return same and value.dtype == ir.DataType.FLOAT

    def _unpack_for_others(self, node: ir.Node, shown: ir.Value) -> None:
        """Let readers outside the region read unpacked tokens."""
        members = set(self.nodes)
        for value in node.outputs:
            others = [(reader, index) for reader, index in value.uses() if reader not in members]
            if not others and not value.is_graph_output():
                continue
            unpack = ir.node("UnpackTokens", [value, shown], domain=ops.DOMAIN)
            result = unpack.outputs[0]
            unpack.name = result.name = edit.unique_name(self.graph, f"{value.name}/UnpackTokens")
            result.type, result.shape = value.type, value.shape
            self.graph.insert_after(node, unpack)
            for reader, index in others:
                reader.replace_input_with(index, result)
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    name, value.name = value.name, f"{value.name}/packed"
                    self.graph.outputs[index], result.name = result, name

    def _pack_attention(self, node: ir.Node, shown: ir.Value) -> None:
        names = ("q_num_heads", "kv_num_heads", "scale", "is_causal")
        attributes = {name: node.attributes[name].value for name in names}
        operands = [*node.inputs[:3], shown]
        result = edit.insert(
            node, "PackedAttention", operands, attributes, domain=ops.DOMAIN, name=f"{node.name}/packed"
        )
        self.inside.add(result)
        node.outputs[0].replace_all_uses_with(result)
