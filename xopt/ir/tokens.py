"""Where tokens are special: a class token in front, padding, and how tokens become the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from xopt.ir import edit, quantized, walk

Pooled = Literal["cls", "mean", "none", "unknown"]

#: Ops that treat each token alone; a value that takes part elementwise must not carry the token axis itself.
TOKENWISE = walk.NORMS + tuple(
    "Add Sub Mul Div Pow Sqrt Gelu Swish Relu Tanh Sigmoid Erf Clip Cast Identity Dropout Neg Abs Where".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens a pass must leave alone, and what the output reads.

    Attributes:
        class_token: learned tokens are put in front of the sequence.
        protected: number of leading tokens to keep as they are: the learned ones, at least 1 when the first token
            is what the output reads.
        padding_mask: the computed mask of the keys that attention may read, if there is one: [B, 1, 1, T], or
            [B, 1, T, T] when it is causal too (padding may not even read itself).
        pooled: "cls" (index 0), "mean" (over tokens, weighted or not), "none" (the output has all tokens),
            "unknown".
    """

    class_token: bool
    protected: int
    padding_mask: ir.Value | None
    pooled: Pooled


def tokenwise(node: ir.Node) -> bool:
    """Whether a node treats each token alone."""
    return edit.is_op(node, *TOKENWISE) or quantized.rounds_alike(node)


def class_tokens(stream: ir.Value) -> int:
    """How many learned tokens are put in front of the sequence, walking back from the first block's input."""
    value: ir.Value | None = stream
    while value is not None and (node := value.producer()) is not None:
        if edit.is_op(node, "Concat") and walk.axis(node, 0) == 1:
            return _learned_lead(node)
        if edit.is_op(node, "Add"):
            # The tokens come from the operand that is not a table of positions: the one made latest from inputs.
            computed = [v for v in node.inputs if not walk.is_weight(v)]
            lead = [class_tokens(v) for v in computed if v is not None]
            return max(lead, default=0)
        if not edit.is_op(node, *walk.NORMS, "Identity", "Dropout", "Cast", "Mul"):
            return 0
        value = node.inputs[0]
    return 0


def _learned_lead(concat: ir.Node) -> int:
    """Leading operands of a Concat along tokens that are learned, summed over their token counts."""
    count = 0
    for value in concat.inputs:
        source = value
        while (node := edit.producer(source, "Expand", "Tile", "Identity", "Cast")) is not None:
            source = node.inputs[0]
        shape = walk.shape_of(source)
        if not walk.is_weight(source) or shape is None or len(shape) < 2 or shape[-2] is None:
            break
        count += shape[-2]
    return count


def pooling(stream: ir.Value) -> Pooled:
    """How the stream [B, T, D] after the last block becomes the outputs of the graph."""
    kinds: set[Pooled] = set()
    seen = {stream}
    pending = [(stream, 1)]
    while pending:
        value, axis = pending.pop()
        if value.is_graph_output():
            kinds.add("none")
        for node in edit.consumers(value):
            kind, after = _pools(node, value, axis)
            if kind is not None:
                kinds.add(kind)
            elif node.outputs[0] not in seen and after is not None:
                seen.add(node.outputs[0])
                pending.append((node.outputs[0], after))
    if "none" in kinds:
        return "none"
    return kinds.pop() if len(kinds) == 1 else "unknown"


def _pools(node: ir.Node, value: ir.Value, axis: int) -> tuple[Pooled | None, int | None]:
    """What a reader does to the token axis: a kind of pooling, or the axis in its output (None: it reads no token)."""
    if edit.is_op(node, "Shape", "Size"):
        return None, None
    linear = edit.is_op(node, "MatMul") and node.inputs[0] is value
    if (linear and quantized.stored_matrix(node.inputs[1]) is not None) or tokenwise(node):
        return None, axis
    if edit.is_op(node, "Transpose"):
        permutation = node.attributes.get("perm")
        return None, None if permutation is None else list(permutation.as_ints()).index(axis)
    if node.inputs[0] is value:
        if edit.is_op(node, "Gather") and walk.axis(node, 0) == axis:
            return ("cls" if walk.ints(node.inputs[1]) == [0] else "unknown"), None
        if edit.is_op(node, "Slice"):
            return _slice_kind(node, axis)
        if edit.is_op(node, "ReduceMean", "ReduceSum"):
            return _reduce_kind(node, axis)
        if edit.is_op(node, "GlobalAveragePool"):
            return "mean", None
    return "unknown", None


def _slice_kind(node: ir.Node, axis: int) -> tuple[Pooled | None, int | None]:
    starts, ends, axes = (walk.ints(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2, 3))
    rank = len(walk.shape_of(node.inputs[0]) or ())
    if starts is None or ends is None or axes is None or not rank or not walk.in_order(node):
        return "unknown", None
    for start, end, along in zip(starts, ends, axes):
        if along % rank == axis and (start, end) == (0, 1):
            return "cls", None
        if along % rank == axis and start != 0:
            return "unknown", None
    return None, axis


def _reduce_kind(node: ir.Node, axis: int) -> tuple[Pooled | None, int | None]:
    axes = walk.ints(edit.input_at(node, 1))
    rank = len(walk.shape_of(node.inputs[0]) or ())
    if axes is None or not rank:
        return "unknown", None
    if {along % rank for along in axes} == {axis}:
        return "mean", None
    return ("unknown", None) if axis in {along % rank for along in axes} else (None, axis)


def padding_mask(masks: Sequence[ir.Value | None]) -> ir.Value | None:
    """The first mask of attention that is computed and tells the keys of a sample apart, and not heads."""
    for mask in masks:
        if mask is None or mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1 or walk.is_weight(mask):
            continue
        samples, _, queries, keys = mask.shape
        if queries == 1 or (samples != 1 and queries == keys and not _given(mask)):
            return mask
    return None


def _given(mask: ir.Value) -> bool:
    """Whether the caller gives the mask whole: it is an input, or converted from an input of its shape."""
    producer = mask.producer()
    if producer is None:
        return not walk.is_weight(mask)
    return any(value is not None and value.shape == mask.shape and _given(value) for value in producer.inputs)


def layout(stream: ir.Value | None, last: ir.Value | None, masks: Sequence[ir.Value | None]) -> TokenLayout:
    """The layout of a model from the stream before its first block and after its last, and its attention masks."""
    learned = class_tokens(stream) if stream is not None else 0
    pooled: Pooled = pooling(last) if last is not None else "unknown"
    return TokenLayout(learned > 0, max(learned, int(pooled == "cls")), padding_mask(masks), pooled)
