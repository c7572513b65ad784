"""Merge tokens: average tokens that are alike, so that later layers have fewer to work on. Needs no training.

    tome   x ─▶ attention ─▶ + ─▶ MergeTokens ─▶ MLP ─▶ +       (metric: the keys, averaged over heads)
    mctf   x ─▶ MergeTokensMCTF ─▶ attention ─▶ + ─▶ MLP ─▶ +   (importance: the share of this block's attention that
                                                                 a token receives, computed on the unmerged tokens)

The number r of tokens that go is fixed, so shapes stay static: N - r. Each token carries its size; attention after a
merge adds log(size) to its logits, so that a token of size s counts as s equal ones, and a mean over tokens becomes the
mean weighted by size. So does the attention of a pooling head, whose queries are learned or a class token. Models of
several towers (image and text) are merged tower by tower. The class token is never given away. The operators:
:mod:`xopt.ir.ops.merge_tokens` and :mod:`xopt.ir.ops.merge_tokens_mctf`.

Refuses  "causal", "cross-attention", "padding-mask", "position-bias", "rotary", "attention-4d": an attention, here or
         later, depends on the place of a token, or reads others.
         "position-dependent": a later op adds something to each place.
         "output-keeps-tokens": an output of the model has one row a token.
         "head-reads-tokens": the output is made from other tokens than the protected ones and the mean of the rest.
         "mixes-with-unmerged-tokens": a later op combines the tokens with some from before the merge.
         "read-by-<op>": a later op may rearrange tokens.
         "symbolic-token-count": a ratio of an unknown number; give a schedule.
         "too-few-tokens", "no-residual-stream", "not-float32", "already-merged", "grouped-queries" (mctf).
Source   ToMe (Bolya et al., ICLR 2023); MCTF (Lee et al., CVPR 2024) with the attention recomputed after the merge.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

import xopt.ir
from xopt.errors import InputError
from xopt.ir import edit, ops, quantized, walk
from xopt.ir.structure import AttentionSite, Block, transformer_blocks
from xopt.ir.tokens import layout, tokenwise
from xopt.pipeline.base import Between, Choice, Effect, Pass, PassReport, Strength
from xopt.pipeline.context import PassContext
from xopt.pipeline.requirements import require_attention

OPERATOR = {"tome": "MergeTokens", "mctf": "MergeTokensMCTF"}
FEWEST_EDGES = {"tome": 1, "mctf": 2}
"""MCTF merges in both directions, each with at least one edge."""
FEWEST_LEFT = 10
"""MCTF never goes below this many tokens."""


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Merge the most similar tokens at some or all blocks.

    Without a schedule, ``ratio`` of the tokens go at each of ``blocks`` blocks, spaced evenly. A schedule gives the
    number of tokens that go at each block with attention; one number stands for every block (with mctf every block but
    the first). No merge takes more than half of the tokens that are not protected.
    """

    name: ClassVar[str] = "merge-tokens"
    effect: ClassVar[Effect] = Effect.LOSSY

    score: Annotated[str, Choice("tome", "mctf")] = "tome"
    ratio: Annotated[float, Between(0.0, 0.5), Strength(0.0)] = 0.3
    blocks: Annotated[int, Between(1, 1024)] = 3
    schedule: Annotated[tuple[int, ...], Between(0, 65536), Strength(0)] = ()
    protected: Annotated[int, Between(0, 4096)] = 0
    """Leading tokens to leave alone, where that is more than the model's class tokens."""
    proportional: bool = True
    """Add log(size) to the logits; off for encoders trained by masking (MAE) and not fine-tuned."""
    tau_sim: Annotated[float, Between(1e-3, float("inf"))] = 1.0
    tau_info: Annotated[float, Between(1e-3, float("inf"))] = 20.0
    tau_size: Annotated[float, Between(1e-3, float("inf"))] = 40.0

    def requires(self, model: ir.Model, context: PassContext) -> None:
        require_attention(model, self)

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        blocks = [block for block in transformer_blocks(model) if block.attention is not None]
        order = walk.Order(model.graph)
        again = "already-merged" if any(node.op_type in OPERATOR.values() for node in order.nodes) else None
        merged: list[int] = []
        before: list[int | None] = []
        after: list[int | None] = []
        towers = _towers(order, blocks)
        amounts = self._by_tower(towers)
        judged = [self._judged(order, tower, wanted) for tower, wanted in amounts]
        for (tower, wanted), (protected, verdicts) in zip(amounts, judged):
            surgery = _Surgery(self, model, protected)
            tokens = start = _token_count(tower)
            for index, amount in wanted.items():
                r = self._edges(amount, tokens, protected)
                reason = again or self._problem(tower[index]) or verdicts[index].reason
                reason = reason or (r if isinstance(r, str) else None)
                if report.accepts(tower[index], reason) and isinstance(r, int):
                    surgery.merge(tower[index], verdicts[index], r)
                    report.rewrote(tower[index])
                    merged.append(r)
                    tokens = tokens - r if tokens is not None else None
            surgery.finish()
            if surgery.size is not None or len(towers) == 1:
                before.append(start)
                after.append(tokens)
        if merged:
            report.numbers["merged"] = " ".join(map(str, merged))
            edit.remove_dead(model)
            xopt.ir.infer_shapes(model)
        if before and None not in before and None not in after:
            report.numbers |= {"tokens-before": _shown(before), "tokens-after": _shown(after)}
        return report

    def _by_tower(self, towers: Sequence[Sequence[Block]]) -> list[tuple[Sequence[Block], dict[int, int | float]]]:
        """What each block of each tower is asked to merge; a schedule has one number for every block of the model."""
        amounts = [self._amounts(len(tower)) for tower in towers] if len(self.schedule) < 2 else []
        if not amounts:
            whole = sorted((block for tower in towers for block in tower), key=lambda block: block.index)
            of_block = dict(zip((block.index for block in whole), self._amounts(len(whole))))
            amounts = [[of_block[block.index] for block in tower] for tower in towers]
        return [(t, {i: amount for i, amount in enumerate(some) if amount}) for t, some in zip(towers, amounts)]

    def _judged(
        self, order: walk.Order, tower: Sequence[Block], wanted: Iterable[int]
    ) -> tuple[int, dict[int, _Verdict]]:
        """How many leading tokens of a tower are left alone, and what follows a merge in each block."""
        masks = [block.attention.mask for block in tower if block.attention is not None]
        protected = max(self.protected, layout(tower[0].input, tower[-1].output, masks).protected)
        return protected, {index: _judge(order, self._stream(tower[index]), protected) for index in wanted}

    def _amounts(self, count: int) -> Sequence[int | float]:
        """What each of ``count`` blocks is asked to merge: a number of tokens, or a share of them; 0 for nothing."""
        first = 1 if self.score == "mctf" else 0
        if not self.schedule:
            places = {max(first, (k + 1) * count // (self.blocks + 1)) for k in range(self.blocks)}
            return [self.ratio if index in places else 0 for index in range(count)]
        if len(self.schedule) == 1:
            return [self.schedule[0] if index >= first else 0 for index in range(count)]
        if len(self.schedule) != count:
            raise InputError(
                "E-OPTION",
                f"the schedule has {len(self.schedule)} numbers for {count} blocks with attention",
                where=f"option schedule of {self.name}",
                cure="give one number a block, or one for all",
            )
        return self.schedule

    def _edges(self, amount: int | float, tokens: int | None, protected: int) -> int | str:
        """How many tokens go, or the reason why none can."""
        if tokens is None:
            return amount if isinstance(amount, int) else "symbolic-token-count"
        r = min(amount if isinstance(amount, int) else int(amount * tokens), (tokens - protected) // 2)
        if self.score == "mctf":
            r = min(r, tokens - FEWEST_LEFT)
        return r if r >= FEWEST_EDGES[self.score] else "too-few-tokens"

    def _stream(self, block: Block) -> ir.Value:
        """The value that is merged: the residual stream after attention, or at the input of the block."""
        assert block.attention is not None
        after = block.attention.residual_out
        return after if self.score == "tome" and after is not None else block.input

    def _problem(self, block: Block) -> str | None:
        """Why tokens cannot be merged in this block, whatever comes later."""
        site = block.attention
        assert site is not None
        if site.residual_in is None or site.residual_out is None:
            return "no-residual-stream"
        if self._stream(block).dtype != ir.DataType.FLOAT:
            return "not-float32"
        if site.cross:
            return "cross-attention"
        if site.causal or site.mask is not None:
            return _attention_problem(site.node)
        if self.score == "mctf" and site.heads != site.kv_heads:
            return "grouped-queries"
        return None


def _towers(order: walk.Order, blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks whose tokens are the same ones, tower by tower: two encoders side by side, an encoder and a decoder."""
    towers: list[list[Block]] = []
    for block in blocks:
        sources = [
            tower
            for tower in towers
            if _same_tokens(tower[-1].output, block.input) and order.between(tower[-1].output, block.input) is not None
        ]
        if sources:
            max(sources, key=lambda tower: order.of(tower[-1].output)).append(block)
        else:
            towers.append([block])
    return towers


def _same_tokens(a: ir.Value, b: ir.Value) -> bool:
    """Whether two streams [B, N, D] have the same number of tokens, as far as that is known."""
    return a.shape is None or b.shape is None or list(a.shape)[1:2] == list(b.shape)[1:2]


def _token_count(blocks: Sequence[Block]) -> int | None:
    shape = walk.shape_of(blocks[0].input) if blocks else None
    return shape[1] if shape is not None and len(shape) == 3 else None


def _shown(counts: Sequence[int | None]) -> int | str:
    """The number of tokens, or of each tower."""
    return counts[0] if len(counts) == 1 and counts[0] is not None else " ".join(map(str, counts))


@dataclass(frozen=True)
class _Verdict:
    """Whether what follows a merge can do with merged tokens: why not, and what must heed sizes.

    Attributes:
        reason: why not.
        means: over tokens.
        attentions: to tokens.
        leads: how many other tokens stand before the merged ones in what such a node reads, where some do.
    """

    reason: str | None
    means: tuple[ir.Node, ...] = ()
    attentions: tuple[ir.Node, ...] = ()
    leads: Mapping[ir.Node, int] = field(default_factory=dict)


def _judge(order: walk.Order, stream: ir.Value, protected: int) -> _Verdict:
    """Follow the tokens from ``stream [B, N, D]`` to where they are pooled."""
    carriers = {stream: 0}
    means: list[ir.Node] = []
    attentions: list[ir.Node] = []
    leads: dict[ir.Node, int] = {}
    for node in order.nodes:
        found = {carriers[value] for value in node.inputs if value in carriers}
        if not found:
            continue
        lead = max(found)
        if lead:
            leads[node] = lead
        if _is_mean(node):
            means.append(node)
        elif _drops_protected(node, protected + lead) and all(map(_is_mean, edit.consumers(node.outputs[0]))):
            means += edit.consumers(node.outputs[0])
            leads |= dict.fromkeys(edit.consumers(node.outputs[0]), lead) if lead else {}
        elif _pools_by_attention(node, carriers):
            attentions.append(node)
        elif (more := _put_in_front(node, carriers)) is not None:
            carriers[node.outputs[0]] = lead + more
        elif not _reads_protected(node, protected + lead):
            if reason := _reader_problem(node, carriers):
                return _Verdict(reason)
            if len(found) > 1:
                return _Verdict("mixes-with-unmerged-tokens")
            attentions += [node] if edit.is_op(node, "Attention") else []
            carriers.update(dict.fromkeys(node.outputs, lead))
    if any(value.is_graph_output() for value in carriers):
        return _Verdict("output-keeps-tokens")
    return _Verdict(None, tuple(means), tuple(attentions), leads)


def _pools_by_attention(node: ir.Node, carriers: Mapping[ir.Value, int]) -> bool:
    """Whether other tokens (a learned query, latents, a class token) attend to merged ones, wherever these stand."""
    if not edit.is_op(node, "Attention") or len(node.inputs) > 4 or _attention_problem(node):
        return False
    q, k, v = (value in carriers for value in node.inputs[:3] if value is not None)
    return not q and k and v and carriers[edit.operand(node, 1)] == carriers[edit.operand(node, 2)]


def _put_in_front(node: ir.Node, carriers: Mapping[ir.Value, int]) -> int | None:
    """How many tokens a Concat puts before the merged ones; None where it does something else."""
    if not edit.is_op(node, "Concat") or walk.axis(node, 0) != 1 or node.inputs[-1] not in carriers:
        return None
    counts = [(walk.shape_of(value) or (None, None))[1] for value in node.inputs[:-1]]
    if None in counts or any(value in carriers for value in node.inputs[:-1]):
        return None
    return sum(count or 0 for count in counts)


def _reader_problem(node: ir.Node, carriers: Container[ir.Value | None]) -> str | None:
    """Why a node that reads tokens cannot take merged ones; None when it treats each token alone, or attends."""
    source = node.inputs[0]
    rank = len(walk.shape_of(source) or ())
    if edit.is_op(node, "Attention"):
        foreign = any(value not in carriers for value in node.inputs[:3])
        return "cross-attention" if foreign else _attention_problem(node)
    if edit.is_op(node, "RotaryEmbedding"):
        return "rotary"
    if tokenwise(node):
        return _operand_problem(node, carriers)
    if edit.is_op(node, "Gather", "Slice", "ReduceMean", "ReduceSum", "ReduceMax", "GlobalAveragePool"):
        return "head-reads-tokens"
    linear = edit.is_op(node, "MatMul") and source in carriers and quantized.stored_matrix(node.inputs[1]) is not None
    split = edit.is_op(node, "Split") and walk.axis(node, 0) == rank - 1
    per_head = edit.is_op(node, "Reshape") and (walk.ints(node.inputs[1]) or ())[:2] == [0, 0]
    return None if linear or split or per_head else f"read-by-{node.op_type.lower()}"


def _attention_problem(node: ir.Node) -> str | None:
    """Why an attention depends on the place of its keys."""
    if walk.int_attribute(node, "is_causal", 0):
        return "causal"
    if len(walk.shape_of(node.inputs[0]) or ()) != 3:
        return "attention-4d"
    mask = edit.input_at(node, 3)
    if mask is None:
        return None
    shape = walk.shape_of(mask)
    of_keys = shape is not None and shape[1:3] == (1, 1) and not walk.is_weight(mask)
    return "padding-mask" if of_keys else "position-bias"


def _operand_problem(node: ir.Node, carriers: Container[ir.Value | None]) -> str | None:
    """Whether an elementwise op brings in something along the token axis (1) that is not merged."""
    rank = max(len(walk.shape_of(value) or ()) for value in node.inputs if value in carriers)
    for value in node.inputs:
        if value is None or value in carriers:
            continue
        shape = walk.shape_of(value)
        axis = 1 - rank + len(shape or ())
        if shape is None or (axis >= 0 and shape[axis] != 1):
            return "position-dependent" if walk.is_weight(value) else "mixes-with-unmerged-tokens"
    return None


def _is_mean(node: ir.Node) -> bool:
    """Mean over the token axis of [B, N, D]."""
    return edit.is_op(node, "ReduceMean") and walk.ints(edit.input_at(node, 1)) in ([1], [-2])


def _drops_protected(node: ir.Node, protected: int) -> bool:
    """Whether a node leaves out some of the protected tokens in front, and no others."""
    if not edit.is_op(node, "Slice"):
        return False
    starts, ends, axes = (walk.ints(edit.input_at(node, place)) for place in (1, 2, 3))
    tokens = (walk.shape_of(node.inputs[0]) or (None, None))[1]
    whole = ends is not None and ends[0] >= (tokens if tokens is not None else np.iinfo(np.int32).max)
    return axes == [1] and starts is not None and 0 < starts[0] <= protected and whole and walk.in_order(node)


def _reads_protected(node: ir.Node, protected: int) -> bool:
    """Whether a node reads no tokens but protected ones, or only the batch size."""
    if edit.is_op(node, "Shape"):
        picked = [
            edit.is_op(reader, "Gather") and walk.ints(reader.inputs[1]) == [0]
            for reader in edit.consumers(node.outputs[0])
        ]
        return walk.int_attribute(node, "end", 1 << 31) == 1 or (all(picked) and "start" not in node.attributes)
    if edit.is_op(node, "Gather") and walk.axis(node, 0) == 1:
        index = walk.ints(node.inputs[1])
        return index is not None and all(0 <= place < protected for place in index)
    if edit.is_op(node, "Slice"):
        starts, ends, axes = (walk.ints(edit.input_at(node, place)) for place in (1, 2, 3))
        inside = starts is not None and ends is not None and 0 <= starts[0] < ends[0] <= protected
        return axes == [1] and inside and walk.in_order(node)
    return False


class _Surgery:
    """Puts merges into one tower and keeps track of the sizes of its tokens."""

    def __init__(self, options: MergeTokens, model: ir.Model, protected: int) -> None:
        self.options = options
        self.model = model
        self.protected = protected
        self.size: ir.Value | None = None
        self.means: dict[ir.Node, int] = {}

    def merge(self, block: Block, verdict: _Verdict, r: int) -> None:
        """Merge ``r`` tokens in a block; blocks come in their order."""
        options = self.options
        assert block.attention is not None
        stream, stem = options._stream(block), f"{block.attention.node.name}/merge"
        readers = list(stream.uses())
        before = min((use.node for use in readers), key=list(self.model.graph).index)
        size = self.size if self.size is not None else _ones(before, stream, stem)
        attributes: dict[str, edit.AttributeValue] = {"r": [r], "protected": self.protected}
        if options.score == "tome":
            guide = _mean_key(before, block.attention, stem)
        else:
            guide = self._importance(before, stream, block.attention, stem)
            attributes |= {"tau_sim": options.tau_sim, "tau_info": options.tau_info, "tau_size": options.tau_size}
        operator = OPERATOR[options.score]
        ops.add_function(self.model, operator)
        merged, self.size = edit.insert_many(
            before, operator, [stream, guide, size], attributes, 2, domain=ops.DOMAIN, name=stem, dtype=stream.dtype
        )
        for use in readers:
            use.node.replace_input_with(use.idx, merged)
        self.means = {node: verdict.leads.get(node, 0) for node in verdict.means}
        if options.proportional:
            self._weigh_keys(before, verdict, stem)

    def _weigh_keys(self, before: ir.Node, verdict: _Verdict, stem: str) -> None:
        """Add log(size) [B, 1, 1, N] to the logits of the attentions that read the merged tokens."""
        biases: dict[int, ir.Value] = {}
        for node in verdict.attentions:
            lead = verdict.leads.get(node, 0)
            if lead not in biases:
                biases[lead] = self._log_size(before, stem, lead)
            node.resize_inputs(4)
            node.replace_input_with(3, biases[lead])

    def _sizes(self, before: ir.Node, lead: int) -> ir.Value:
        """Sizes of the tokens, with those of ``lead`` others before them, which are single."""
        assert self.size is not None
        if not lead:
            return self.size
        pads = edit.initializer(self.model.graph, "lead", np.array([0, lead, 0, 0, 0, 0], np.int64))
        one = edit.initializer(self.model.graph, "single", np.array(1, np.float32))
        return edit.insert(before, "Pad", [self.size, pads, one])

    def _log_size(self, before: ir.Node, stem: str, lead: int = 0) -> ir.Value:
        sizes = self._sizes(before, lead)
        row = edit.insert(before, "Transpose", [edit.insert(before, "Log", [sizes])], {"perm": [0, 2, 1]})
        axis = edit.initializer(self.model.graph, f"{stem}.axis", np.array([1], np.int64))
        return edit.insert(before, "Unsqueeze", [row, axis], name=f"{stem}/log_size")

    def _importance(self, before: ir.Node, stream: ir.Value, site: AttentionSite, stem: str) -> ir.Value:
        """Mean over heads and queries of the attention that each unmerged token would receive, [B, N, 1]."""
        graph = self.model.graph
        query, key = _replay(before, stream, [edit.operand(site.node, 0), edit.operand(site.node, 1)])
        split = edit.initializer(graph, f"{stem}.heads", np.array([0, 0, -1, site.head_dim], np.int64))
        scale = edit.initializer(graph, f"{stem}.scale", np.float32(edit.attribute(site.node, "scale") or 1.0))
        query = edit.insert(
            before, "Transpose", [edit.insert(before, "Reshape", [query, split])], {"perm": [0, 2, 1, 3]}
        )
        key = edit.insert(before, "Transpose", [edit.insert(before, "Reshape", [key, split])], {"perm": [0, 2, 3, 1]})
        logits = edit.insert(before, "Mul", [edit.insert(before, "MatMul", [query, key]), scale])
        if self.size is not None and self.options.proportional:
            logits = edit.insert(before, "Add", [logits, self._log_size(before, f"{stem}/importance")])
        received = edit.insert(before, "Softmax", [logits], {"axis": -1})
        axes = edit.initializer(graph, f"{stem}.axes", np.array([1, 2], np.int64))
        last = edit.initializer(graph, f"{stem}.last", np.array([2], np.int64))
        mean = edit.insert(before, "ReduceMean", [received, axes], {"keepdims": 0})
        return edit.insert(before, "Unsqueeze", [mean, last], name=f"{stem}/importance")

    def finish(self) -> None:
        """Make means over tokens heed sizes."""
        for node, lead in self.means.items():
            keep = {"keepdims": walk.int_attribute(node, "keepdims", 1)}
            axes, size = edit.operand(node, 1), self._sizes(node, lead)
            if part := edit.producer(node.inputs[0], "Slice"):
                size = edit.insert(node, "Slice", [size, *part.inputs[1:]])
            weighted = edit.insert(node, "Mul", [node.inputs[0], size])
            total = edit.insert(node, "ReduceSum", [weighted, axes], keep)
            count = edit.insert(node, "ReduceSum", [size, axes], keep)
            edit.replace_uses(node.outputs[0], edit.insert(node, "Div", [total, count], name=f"{node.name}/by_size"))


def _ones(before: ir.Node, stream: ir.Value, stem: str) -> ir.Value:
    """Size 1 for each token of ``stream [B, N, D]``: [B, N, 1]."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    shape = edit.insert(before, "Shape", [stream], {"start": 0, "end": 2}, dtype=ir.DataType.INT64)
    one = edit.initializer(graph, f"{stem}.one", np.array([1], np.int64))
    whole = edit.insert(before, "Concat", [shape, one], {"axis": 0})
    value = ir.tensor(np.ones(1, np.float32))
    return edit.insert(
        before, "ConstantOfShape", [whole], {"value": value}, name=f"{stem}/sizes", dtype=ir.DataType.FLOAT
    )


def _mean_key(before: ir.Node, site: AttentionSite, stem: str) -> ir.Value:
    """Mean of a token's keys over heads, [B, N, head_dim]."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    split = edit.initializer(graph, f"{stem}.heads", np.array([0, 0, -1, site.head_dim], np.int64))
    axis = edit.initializer(graph, f"{stem}.axis", np.array([2], np.int64))
    heads = edit.insert(before, "Reshape", [edit.operand(site.node, 1), split])
    return edit.insert(before, "ReduceMean", [heads, axis], {"keepdims": 0}, name=f"{stem}/metric")


def _replay(before: ir.Node, start: ir.Value, ends: Sequence[ir.Value]) -> list[ir.Value]:
    """Compute ``ends`` from ``start`` a second time, by copies of the nodes between."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    order = walk.Order(graph)
    between = {node for end in ends for node in order.between(start, end) or ()}
    copies: dict[ir.Value | None, ir.Value | None] = {}
    for node in sorted(between, key=order.position.__getitem__):
        made = edit.insert_many(
            before,
            node.op_type,
            [copies.get(value, value) for value in node.inputs],
            {name: attribute.value for name, attribute in node.attributes.items()},
            len(node.outputs),
            domain=node.domain,
            name=f"{node.name}/ahead",
            dtype=node.outputs[0].dtype,
        )
        copies.update(zip(node.outputs, made, strict=True))
    found = [copies.get(end, end) for end in ends]
    return [value for value in found if value is not None]
