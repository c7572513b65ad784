"""What a canonical graph is made of: attention sites, feed-forward networks, norms, the residual stream.

A transformer is a stream of width D to which branches add:

    pre-norm   x ─▶ norm ─▶ attention ─▶ + ─▶ norm ─▶ ffn ─▶ + ─▶      (parallel: both branches read one norm)
               └─────────────────────────┘└──────────────────┘
    post-norm  x ─▶ attention ─▶ + ─▶ norm ─▶ ffn ─▶ + ─▶ norm ─▶

What is not recognized is left out, never an error; :func:`explain` gives the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from xopt.ir import edit, quantized, walk
from xopt.ir.canonical.masks import hides_later_keys
from xopt.ir.projection import Projection, projection_from, projection_into
from xopt.ir.schema import unread
from xopt.ir.symbolic import Symbols
from xopt.ir.tokens import TokenLayout, layout

__all__ = [
    "AttentionSite",
    "Block",
    "FeedForward",
    "Projection",
    "TokenLayout",
    "Unrecognized",
    "explain",
    "token_layout",
    "transformer_blocks",
]

#: What may stand between the projections of an FFN.
ACTIVATIONS = tuple("Gelu Swish Relu Tanh Sigmoid Elu LeakyRelu Celu Selu Mish HardSwish Softplus".split())  # noqa: SIM905
#: Of these and numbers other activations are made: relu(x)², x * tanh(softplus(x)).
LINEAR = ("Mul", "Add", "Sub", "Div", "Neg")
POINTWISE = (*ACTIVATIONS, *LINEAR, *"Pow Clip Min Max HardSigmoid Softsign ThresholdedRelu Exp Erf Abs".split())  # noqa: SIM905
#: Ops that carry a branch to its residual addition: they move, scale or normalize, and mix in no other stream.
CARRIERS = walk.NORMS + tuple(
    "Reshape Transpose Slice Concat Split Pad Cast Identity Dropout Squeeze Unsqueeze Gather Mul Div "  # noqa: SIM905
    "QuantizeLinear DequantizeLinear".split()
)


@dataclass(frozen=True)
class AttentionSite:
    """One ``Attention`` node in 3-D form and what surrounds it.

    Attributes:
        node: Q [B, S, heads*head_dim], K [B, T, kv_heads*head_dim], V [B, T, kv_heads*v_head_dim].
        q, k, v, out: the projections; None where the operand is something else.
        causal: no query attends to later keys, by attribute or by the mask.
        mask: operand attn_mask, if any.
        cross: keys come from another stream than queries.
        residual_in, residual_out: the stream that the branch reads and adds to, and the sum (after its norm in a
            post-norm block); None when there is no such addition.
        norms: norms of the branch, in order.
    """

    node: ir.Node
    q: Projection | None
    k: Projection | None
    v: Projection | None
    out: Projection | None
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    causal: bool
    mask: ir.Value | None
    cross: bool
    residual_in: ir.Value | None
    residual_out: ir.Value | None = None
    norms: tuple[ir.Node, ...] = ()

    @property
    def head_mask(self) -> bool:
        """Whether the mask differs between heads (its axis 1 is not 1), so that cutting heads cuts it too."""
        shape = walk.shape_of(self.mask)
        return self.mask is not None and (shape is None or (len(shape) == 4 and shape[1] != 1))


@dataclass(frozen=True)
class FeedForward:
    """``down(act(up(x)))`` or, gated, ``down(act(gate(x)) * up(x))``; ``width`` is the number of neurons."""

    up: Projection
    gate: Projection | None
    down: Projection
    activation: ir.Node
    width: int
    gated: bool
    residual_in: ir.Value | None = None
    residual_out: ir.Value | None = None
    norms: tuple[ir.Node, ...] = ()


@dataclass(frozen=True)
class Block:
    """Attention and the FFN after (or beside) it; one of them may be missing. The stream: ``input`` to ``output``."""

    index: int
    attention: AttentionSite | None
    ffn: FeedForward | None
    norms: tuple[ir.Node, ...]
    input: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class Unrecognized:
    """A node that looks like part of a transformer but is not in any block, and why."""

    node: ir.Node
    reason: str


def transformer_blocks(model: ir.Model) -> list[Block]:
    """The blocks of a canonical model in the order of execution; [] when there are none."""
    return _Anatomy(model.graph).blocks


def explain(model: ir.Model) -> list[Unrecognized]:
    """Why attention nodes, their operands or feed-forward look-alikes are missing in :func:`transformer_blocks`.

    Reasons: "attention-4d", "unknown-shape", "no-projection-q" (k, v, out), "no-residual", "attention-with-past_key"
    (or whatever else of ONNX's names it has that passes do not read).
    """
    return _Anatomy(model.graph).unrecognized


def token_layout(model: ir.Model) -> TokenLayout:
    """Which tokens are special, and how tokens become the output; see :class:`TokenLayout`."""
    blocks = transformer_blocks(model)
    masks = [block.attention.mask for block in blocks if block.attention is not None]
    return layout(blocks[0].input if blocks else None, blocks[-1].output if blocks else None, masks)


@dataclass(frozen=True)
class _Branch:
    """Where a branch leaves the residual stream, and the sum where it joins it again."""

    start: ir.Value
    end: ir.Value
    norms: tuple[ir.Node, ...]


@dataclass
class _Anatomy:
    """One analysis of a graph: blocks found, and what was left out."""

    graph: ir.Graph
    blocks: list[Block] = field(default_factory=list)
    unrecognized: list[Unrecognized] = field(default_factory=list)
    causal_masks: dict[ir.Value, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = walk.Order(self.graph)
        sites = [site for node in self.order.nodes if (site := self._attention(node)) is not None]
        ffns = [ffn for node in self.order.nodes if (ffn := self._feed_forward(node)) is not None]
        self.blocks = self._pair(sites, ffns)

    def _attention(self, node: ir.Node) -> AttentionSite | None:
        if node.op_type != "Attention" or node.domain:
            return None
        if reason := attention_problem(node):
            self.unrecognized.append(Unrecognized(node, reason))
            return None
        q, k, v = (projection_into(value) for value in node.inputs[:3])
        out = projection_from(node.outputs[0])
        for name, part in {"q": q, "k": k, "v": v, "out": out}.items():
            if part is None:
                self.unrecognized.append(Unrecognized(node, f"no-projection-{name}"))
        queries, keys = (p.input if p else value for p, value in zip((q, k), node.inputs))
        assert queries is not None
        branch = self._branch(queries, out.output if out else node.outputs[0])
        if branch is None:
            self.unrecognized.append(Unrecognized(node, "no-residual"))
        heads, kv_heads = (walk.int_attribute(node, f"{x}_num_heads", 1) for x in ("q", "kv"))
        widths = [(walk.shape_of(value) or ())[-1] or 0 for value in node.inputs[:3]]
        return AttentionSite(
            node=node,
            q=q,
            k=k,
            v=v,
            out=out,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=widths[0] // heads,
            v_head_dim=widths[2] // kv_heads,
            causal=bool(walk.int_attribute(node, "is_causal", 0)) or self._hides_later_keys(edit.input_at(node, 3)),
            mask=edit.input_at(node, 3),
            cross=_before_norm(queries) is not _before_norm(keys),
            residual_in=branch.start if branch else None,
            residual_out=branch.end if branch else None,
            norms=branch.norms if branch else (),
        )

    def _hides_later_keys(self, mask: ir.Value | None) -> bool:
        """Whether a mask that differs from query to query is causal; blocks share it, so it is read once."""
        shape = walk.shape_of(mask) if mask is not None else None
        if mask is None or shape is None or len(shape) != 4 or shape[2] == 1:
            return False
        if mask not in self.causal_masks:
            self.causal_masks[mask] = hides_later_keys(Symbols(self.graph), mask)
        return self.causal_masks[mask]

    def _feed_forward(self, node: ir.Node) -> FeedForward | None:
        if not edit.is_op(node, "MatMul") or quantized.stored_matrix(node.inputs[1]) is None:
            return None
        hidden = quantized.before(edit.operand(node, 0))
        found = _gated(hidden) or _ungated(hidden)
        if found is None:
            return None
        up, gate, activation = found
        down = projection_from(hidden)
        branch = self._branch(up.input, down.output) if down else None
        if down is None or branch is None:
            self.unrecognized.append(Unrecognized(node, "no-residual" if down else "hidden-is-read-elsewhere"))
            return None
        return FeedForward(
            up, gate, down, activation, up.width, gate is not None, branch.start, branch.end, branch.norms
        )

    def _branch(self, source: ir.Value, end: ir.Value) -> _Branch | None:
        """Follow ``end`` through carriers to the Add whose other operand is the stream that ``source`` came from."""
        after: list[ir.Node] = []
        carried = {end}
        pending = set(edit.consumers(end))
        while pending:
            node = min(pending, key=lambda n: self.order.position.get(n, -1))
            pending.remove(node)
            others = [v for v in node.inputs if v is not None and v not in carried and not walk.is_weight(v)]
            if edit.is_op(node, "Add") and len(others) == 1:
                for stream in _summands(others[0]):
                    path = self.order.between(stream, source)
                    if path is not None:
                        return self._joined(stream, node.outputs[0], path, after)
            elif edit.is_op(node, "Shape"):
                continue
            elif not edit.is_op(node, *CARRIERS) or (others and edit.is_op(node, "Concat")):
                return None
            after.append(node)
            carried.update(node.outputs)
            pending.update(reader for value in node.outputs for reader in edit.consumers(value))
        return None

    def _joined(self, start: ir.Value, end: ir.Value, before: list[ir.Node], after: list[ir.Node]) -> _Branch:
        norms = [node for node in (*before, *after) if edit.is_op(node, *walk.NORMS)]
        readers = edit.consumers(end)
        if not norms and len(readers) == 1 and edit.is_op(readers[0], *walk.NORMS) and not end.is_graph_output():
            norms, end = [readers[0]], readers[0].outputs[0]  # post-norm
        return _Branch(start, end, tuple(norms))

    def _pair(self, sites: list[AttentionSite], ffns: list[FeedForward]) -> list[Block]:
        """Each attention with the FFN that reads its sum, or the stream it read itself (parallel)."""
        blocks: list[tuple[AttentionSite | None, FeedForward | None]] = []
        left = list(ffns)
        for site in sites:
            near = [ffn for ffn in left if _before_merge(ffn.residual_in) in (site.residual_out, site.residual_in)]
            blocks.append((site, near[0] if near else None))
            left = [ffn for ffn in left if ffn is not blocks[-1][1]]
        blocks += [(None, ffn) for ffn in left]
        blocks.sort(key=lambda pair: self.order.position[_first_node(pair)])
        return [self._block(index, *pair) for index, pair in enumerate(blocks)]

    def _block(self, index: int, site: AttentionSite | None, ffn: FeedForward | None) -> Block:
        parts = [part for part in (site, ffn) if part is not None]
        ends = [part.residual_out for part in parts if part.residual_out is not None]
        starts = [part.residual_in for part in parts if part.residual_in is not None]
        norms = dict.fromkeys(norm for part in parts for norm in part.norms)
        if not starts:  # an attention that adds to no stream: its own operands bound it
            assert site is not None and site.node.inputs[0] is not None
            starts = [site.q.input if site.q else site.node.inputs[0]]
            ends = [site.out.output if site.out else site.node.outputs[0]]
        return Block(index, site, ffn, tuple(norms), min(starts, key=self.order.of), max(ends, key=self.order.of))


def attention_problem(node: ir.Node) -> str | None:
    """Why an Attention node is not in the form that passes rely on, or None."""
    if names := unread(node):
        return f"attention-with-{names[0]}"
    if walk.mask_ends_early(node):
        return "attention-with-short-mask"
    shapes = [walk.shape_of(value) for value in node.inputs[:3]]
    if any(shape is None for shape in shapes):
        return "unknown-shape"
    if any(len(shape or ()) != 3 for shape in shapes):
        return "attention-4d"
    q_heads, kv_heads = (walk.int_attribute(node, f"{x}_num_heads", 0) for x in ("q", "kv"))
    widths = [(shape or ())[-1] for shape in shapes]
    if not q_heads or not kv_heads or any(width is None for width in widths):
        return "unknown-shape"
    return None


def _summands(value: ir.Value) -> list[ir.Value]:
    """A value; when it is a sum of computed values, its summands (a parallel branch may have been added first); when
    it is a stream by a learned scale or a number, the stream (DeepNorm, MetaFormer).
    """
    node = edit.producer(value, "Add", "Mul")
    if node is None:
        return [value]
    computed = [v for v in node.inputs if v is not None and not walk.is_weight(v)]
    return [value, *computed] if len(computed) == (2 if node.op_type == "Add" else 1) else [value]


def _before_merge(stream: ir.Value | None) -> ir.Value | None:
    """The stream before an xopt op that shortens the sequence between attention and FFN."""
    node = stream.producer() if stream is not None else None
    return node.inputs[0] if node is not None and node.domain == "xopt" else stream


def _before_norm(value: ir.Value | None) -> ir.Value | None:
    norm = edit.producer(value, *walk.NORMS)
    return norm.inputs[0] if norm is not None else value


def _first_node(pair: tuple[AttentionSite | None, FeedForward | None]) -> ir.Node:
    site, ffn = pair
    if site is not None:
        return site.node
    assert ffn is not None
    return ffn.activation


def _ungated(hidden: ir.Value) -> tuple[Projection, Projection | None, ir.Node] | None:
    activation = edit.producer(hidden, *POINTWISE)
    up = projection_into(_argument(hidden)) if activation is not None else None
    return None if up is None or activation is None else (up, None, activation)


def _argument(value: ir.Value) -> ir.Value | None:
    """The x of ``value = f(x)`` where f is the same curve for every element; None for what is no such function."""
    found: set[ir.Value] = set()
    seen, pending, curved = {value}, [value], False
    while pending and len(found) < 2:
        last = pending.pop()
        node = edit.producer(last, *POINTWISE)
        operands = [v for v in node.inputs if v is not None and edit.scalar(v) is None] if node is not None else []
        if node is None or any(walk.is_weight(v) for v in operands):
            found.add(last)
            continue
        curved = curved or len(operands) > 1 or node.op_type not in LINEAR
        pending += [v for v in dict.fromkeys(operands) if v not in seen]
        seen.update(operands)
    return found.pop() if curved and len(found) == 1 else None


def _gated(hidden: ir.Value) -> tuple[Projection, Projection | None, ir.Node] | None:
    product = edit.producer(hidden, "Mul")
    for active, other in (product.inputs, product.inputs[::-1]) if product is not None else ():
        found = _ungated(active) if active is not None else None
        up = projection_into(other)
        if found is not None and up is not None:
            gate, _, activation = found
            pair = gate.input is up.input and gate.output is not up.output and gate.width == up.width
            return (up, gate, activation) if pair else None
    return None
