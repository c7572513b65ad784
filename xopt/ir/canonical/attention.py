"""Attention blocks of every exporter's dialect as ``Attention(Q, K, V, attn_mask?)`` in 3-D form.

    before   Q4, K4, V4 = Transpose(Reshape(Q, [B,S,H,d])) ...
             Y4 = Softmax(Q4 @ K4^T * scale + mask) @ V4;  Y = Reshape(Transpose(Y4), [B,S,H*d])
    after    Y = Attention(Q, K, V, mask)  with q_num_heads, kv_num_heads, scale, is_causal, softcap
Anchored at Softmax, and at Attention nodes that the exporter wrote (opset 23 on, 4-D). Operands are followed by the
layout of their axes, not by op pattern; see operands, scores, masks. An attention that is 4-D by nature stays a 4-D
``Attention``.
Refuses  "weights-read-elsewhere", "no-product", "mask-inside-softcap", "head-layout", ...: left as it was.
         "nan-guard": a guard turns rows of NaN into zeros, and the mask may make such rows by what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.hidden import hidden_rows
from xopt.ir.canonical.layout import Axes, Axis, Digit, after, axis, before, is_read, merged
from xopt.ir.canonical.masks import Mask, Masks, Term
from xopt.ir.canonical.moving import move, move_result
from xopt.ir.canonical.operands import DEPTH, KEY, QUERY, VALUE, Operand, assemble, placed, scaling, trace
from xopt.ir.canonical.placing import in_four_axes
from xopt.ir.canonical.report import CanonicalizeReport, NotAttentionError
from xopt.ir.canonical.roles import roles
from xopt.ir.canonical.scores import attention_scale, read_scores, read_values, softmax_axes
from xopt.ir.canonical.terms import PlacedTerm
from xopt.ir.edit import (
    attribute,
    constant,
    consumers,
    initializer,
    input_at,
    insert,
    is_op,
    kind_of,
    remove_dead,
    replace_uses,
    set_attributes,
)
from xopt.ir.poly import ONE, Poly, product
from xopt.ir.quantized import rounded_alike, rounds_alike
from xopt.ir.schema import unread
from xopt.ir.shape_rules import integer
from xopt.ir.symbolic import Symbols
from xopt.ir.walk import mask_ends_early

SMALL = 4096
"""Elements up to which a constant is looked into."""


@dataclass(frozen=True)
class Site:
    """An attention as found: operands with layouts over common axes [batch..., query, key]."""

    anchor: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    q_axes: Axes
    k_axes: Axes
    v_axes: Axes
    axes: Axes
    scale: float
    softcap: float
    causal: bool
    terms: Sequence[PlacedTerm]
    output: ir.Value
    output_axes: Axes
    guarded: bool = False


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Put every attention into canonical form."""
    symbols = Symbols(model.graph)
    masks = Masks(symbols)
    for node in list(model.graph):
        if not (is_op(node, "Softmax", "Attention") and is_read(node.outputs[0])):
            if node.op_type == "Attention" and not node.domain and is_read(node.outputs[0]):
                report.refuse("attention", node.name, f"attention-with-{unread(node)[0]}")
            continue
        try:
            site = _of_softmax(symbols, node) if node.op_type == "Softmax" else _of_attention(symbols, masks, node)
            if site is not None:
                _canonical(symbols, masks, site, report)
                report.rewrote("attention")
        except NotAttentionError as reason:
            if str(reason) != "no-product":
                report.refuse("attention", node.name, str(reason))
    remove_dead(model)


def _of_softmax(symbols: Symbols, node: ir.Node) -> Site:
    axes = softmax_axes(symbols, node)
    assert node.inputs[0] is not None
    scores = read_scores(symbols, node.inputs[0], axes)
    weighted = read_values(symbols, node, axes)
    q = scores.q
    for temperature in scores.temperatures:
        q = insert(weighted.node, "Mul", [q, temperature], shape=q.shape)
        symbols.learn(q)
    site = Site(
        weighted.node, q, scores.k, weighted.v, scores.q_axes, scores.k_axes, weighted.v_axes, axes,
        scores.scale, scores.softcap, False, scores.terms,
        weighted.node.outputs[0], weighted.axes, weighted.guarded,
    )  # fmt: skip
    shown = hidden_rows(site.output, site.terms) if site.k_axes[-1] == site.axes[-1] else None
    if shown is not None:
        site = replace(site, output=shown[0], terms=[shown[1]])
    return _in_roles(symbols, site)


def _in_roles(symbols: Symbols, site: Site) -> Site:
    """The site with heads and sequence as the queries tell them, where they are not in the usual axes."""
    of_keys = [place for place, row in enumerate(site.axes) if any(digit.label == KEY for digit in row)]
    place = max(of_keys or (place for place, row in enumerate(site.axes) if not row))  # one key has no axis of its own
    key, rows = site.axes[place], (*site.axes[:place], *site.axes[place + 1 :])
    found = roles(symbols, site.q, site.q_axes, site.k_axes, rows)
    if found is None:
        return replace(site, axes=(*rows, key))
    return replace(
        site,
        q_axes=found.named(site.q_axes),
        k_axes=found.named(site.k_axes),
        v_axes=found.named(site.v_axes),
        axes=(*found.frame, key),
        terms=[replace(term, axes=found.named(term.axes)) for term in site.terms],
        output_axes=found.named(site.output_axes),
    )


def _of_attention(symbols: Symbols, masks: Masks, node: ir.Node) -> Site | None:
    """A 4-D Attention of the exporter; None for one that is canonical already."""
    q, k, v = node.inputs[:3]
    q_dims, k_dims, v_dims = symbols.dims(q), symbols.dims(k), symbols.dims(v)
    if q_dims is None or k_dims is None or v_dims is None or q is None or k is None or v is None:
        raise NotAttentionError("rank")
    if len(q_dims) == 3:
        _write_attributes(node, q_dims[-1])
        _four_axes(masks, node)
        return None
    if mask_ends_early(node):
        raise NotAttentionError("short-mask")
    batch, heads = axis("batch0", q_dims[0]), axis("batch1", q_dims[1])
    query, key = axis(QUERY, q_dims[2]), axis(KEY, k_dims[2])
    head_dim = q_dims[3].constant
    if head_dim is None:
        raise NotAttentionError("head-dim-unknown")
    axes: Axes = (batch, heads, query, key)
    mask = input_at(node, 3)
    kind = "keep" if mask is not None and mask.dtype == ir.DataType.BOOL else "add"
    terms = [PlacedTerm(kind, mask, 1.0, axes)] if mask is not None else []
    return Site(
        node, q, k, v, (batch, heads, query, axis(DEPTH, q_dims[3])),
        (batch, _shared(heads, q_dims[1], k_dims[1]), key, axis(DEPTH, k_dims[3])),
        (batch, _shared(heads, q_dims[1], v_dims[1]), key, axis(VALUE, v_dims[3])), axes,
        attention_scale(node, head_dim), float(attribute(node, "softcap", 0.0) or 0.0),
        bool(integer(node, "is_causal", 0)), terms, node.outputs[0], (batch, heads, query, axis(VALUE, v_dims[3])),
    )  # fmt: skip


def _shared(heads: Axis, count: Poly, kv_count: Poly) -> Axis:
    """Axis of key heads that groups of query heads share."""
    group = count.exactly(kv_count)
    if group is None:
        raise NotAttentionError("head-groups")
    if group == ONE:
        return heads
    return () if kv_count == ONE else (Digit(heads[0].label, kv_count, group, kv_count),)


def _four_axes(masks: Masks, node: ir.Node) -> None:
    """The mask of an Attention node with all four axes."""
    mask = input_at(node, 3)
    if mask is not None:
        node.replace_input_with(3, masks.four_axes(node, mask))


def _write_attributes(node: ir.Node, width: Poly) -> None:
    """All attributes of a 3-D Attention, spelled out."""
    head_dim = (width // integer(node, "q_num_heads", 1)).constant
    attributes = {
        "scale": attention_scale(node, head_dim or 1),
        "is_causal": integer(node, "is_causal", 0),
        "softcap": float(attribute(node, "softcap", 0.0) or 0.0),
    }
    set_attributes(node, **attributes)


def _canonical(symbols: Symbols, masks: Masks, site: Site, report: CanonicalizeReport) -> None:
    """Replace the site by its canonical form."""
    operands = _operands(symbols, site)
    if operands is None or not _agree(*operands):
        _keep_four(symbols, masks, site, report)
        return
    q, k, v = operands
    lead = q.lead or k.lead or v.lead
    mask = _mask(symbols, masks, site, lead, q.head)
    attributes = _attributes(site, mask, site.scale * q.scale * k.scale)
    attributes |= {"q_num_heads": q.heads, "kv_num_heads": k.heads}
    query, key = site.axes[-2:]
    y = _attention(site, assemble(symbols, site.anchor, operands, (query, key, key)), mask, attributes)
    symbols.learn(y)
    if v.scale != 1.0:
        y = _scaled(site.anchor, y, v.scale)
        symbols.learn(y)
    _connect(symbols, site, y, lead, q.head)


def _attributes(site: Site, mask: Mask, scale: float) -> dict[str, int | float]:
    return {"scale": float(scale), "is_causal": int(mask.causal or site.causal), "softcap": float(site.softcap)}


def _operands(symbols: Symbols, site: Site) -> tuple[Operand, Operand, Operand] | None:
    """Queries, keys and values in 3-D form; None when nothing tells that heads lie side by side in any of them."""
    query, key = site.axes[-2:]
    given = (
        (site.q, site.q_axes, query, DEPTH), (site.k, site.k_axes, key, DEPTH), (site.v, site.v_axes, key, VALUE),
    )  # fmt: skip
    traced = [trace(symbols, *one) for one in given]
    four = {digit.label for digit in site.axes[1]} if len(site.axes) == 4 else set()
    told = [one for one in traced if one and (one.head or not four & {digit.label for digit in one.lead})]
    if not told:
        return None
    model = max(told, key=lambda one: (bool(one.head), len(one.lead)))
    head, lead = model.head, model.lead
    found = [
        one if one in told and one.lead in ((), lead) else placed(symbols, value, axes, lead, head, depth)
        for one, (value, axes, _, depth) in zip(traced, given)
    ]
    q, k, v = found
    return None if q is None or k is None or v is None else (q, k, v)


def _agree(q: Operand, k: Operand, v: Operand) -> bool:
    """Whether the operands have the same batch, or none, and consecutive query heads share a key head."""
    leads = {operand.lead for operand in (q, k, v) if operand.lead}
    if len(leads) > 1 or k.heads != v.heads or q.heads % k.heads or q.head_dim != k.head_dim:
        return False
    if not k.head or not q.head:
        return not k.head and not v.head
    top = q.head[0].stride * q.head[0].count
    same = all(x.head and x.head[0].label == q.head[0].label for x in (k, v))
    return same and all(x.head[0].stride * x.head[0].count == top for x in (k, v)) and q.head[0].stride == ONE


def _mask(symbols: Symbols, masks: Masks, site: Site, lead: Axis, head: Axis) -> Mask:
    """Canonical mask; terms met where the scores had other axes are brought to [B,H,S,T] first.

    Raises:
        NotAttentionError: weights that are NaN count as 0, which ``Attention`` says of boolean masks alone; or the mask
            is the same for all keys, which ``Attention`` takes for one that ends behind the first.
    """
    frame: Axes = (lead, head, site.axes[-2], site.axes[-1])
    terms = [
        Term(
            t.kind,
            in_four_axes(symbols, site.anchor, _floored(symbols, site.anchor, t), t.axes, frame),
            t.factor,
            t.finite,
        )
        for t in site.terms
    ]
    mask = masks.build(site.anchor, terms, [product(digit.count for digit in row) for row in frame])
    if site.guarded and (mask.hides_rows or not (_finite(site.q) and _finite(site.k))):
        raise NotAttentionError("nan-guard")
    dims = symbols.dims(mask.value)
    if dims and dims[-1] == ONE and site.axes[-1]:
        raise NotAttentionError("mask-of-queries")
    return mask


def _floored(symbols: Symbols, site: ir.Node, term: PlacedTerm) -> ir.Value:
    """The value of a term, nothing below its floor."""
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    if term.floor is None:
        return term.value
    dtype = (term.value.dtype or ir.DataType.FLOAT).numpy()
    return symbols.learn(insert(site, "Max", [term.value, initializer(graph, "floor", np.asarray(term.floor, dtype))]))


def _finite(value: ir.Value) -> bool:
    """Whether no small constant that ``value`` is computed from is infinite or NaN (weights are never)."""
    seen, pending = set[ir.Value](), [value]
    while pending:
        one = pending.pop()
        node = one.producer()
        if one in seen:
            continue
        seen.add(one)
        array = constant(one) if one.const_value is not None and one.const_value.size <= SMALL else None
        if array is not None and kind_of(array) == "f" and not np.isfinite(array).all():
            return False
        if node is not None:
            read = node.inputs[:3] if is_op(node, "Attention") else node.inputs  # masks hide with infinities
            pending += [given for given in read if given is not None]
    return True


def _keep_four(symbols: Symbols, masks: Masks, site: Site, report: CanonicalizeReport) -> None:
    """A 4-D Attention, when the operands are 4-D tensors and nothing more is known about them."""
    if len(site.axes) != 4 or any(len(merged(row)) > 1 for row in site.axes) or not _straight(site):
        raise NotAttentionError("head-layout")
    report.refuse("attention-3d", site.anchor.name, "head-layout")
    if is_op(site.anchor, "Attention"):
        set_attributes(site.anchor, **_attributes(site, Mask(None, False), site.scale))
        _four_axes(masks, site.anchor)
        return
    if any(row == () and full != () for row, full in zip(site.k_axes[:2], site.axes[:2])):
        raise NotAttentionError("head-layout")
    mask = _mask(symbols, masks, site, site.axes[0], site.axes[1])
    *batch, depth, key = site.k_axes
    q, q_scale = _source(symbols, site.q, site.q_axes, site.q_axes)
    k, k_scale = _source(symbols, site.k, site.k_axes, (*batch, key, depth))
    if k is None:
        k = insert(site.anchor, "Transpose", [site.k], {"perm": [0, 1, 3, 2]})
    y = _attention(site, [q or site.q, k, site.v], mask, _attributes(site, mask, site.scale * q_scale * k_scale))
    symbols.learn(y)
    replace_uses(site.output, y)


def _straight(site: Site) -> bool:
    """Whether the softmax's axes are in their places in all operands: the products were not turned in between."""
    if is_op(site.anchor, "Attention"):
        return True
    batch, heads, query, key = site.axes
    if (site.q_axes[-2], site.k_axes[-1], site.v_axes[-2]) != (query, key, key):
        return False
    operands = [axes[:2] for axes in (site.q_axes, site.k_axes, site.v_axes)]
    in_place = all(row in ((), wanted) for rows in operands for row, wanted in zip(rows, (batch, heads)))
    return in_place and site.output_axes[:3] == (batch, heads, query)


def _source(symbols: Symbols, value: ir.Value, axes: Axes, wanted: Axes) -> tuple[ir.Value | None, float]:
    """The value farthest back with the axes ``wanted`` (None: there is none), and what it was multiplied by since."""
    found, scale, factor = value if axes == wanted else None, 1.0, 1.0
    while (node := value.producer()) is not None:
        moved, scaled = before(symbols, value, axes), scaling(node)
        if moved is not None:
            value, axes = moved
        elif scaled is not None:
            value, factor = scaled[0], factor * scaled[1]
        else:
            break
        if axes == wanted:
            found, scale = value, factor
    return found, scale


def _attention(site: Site, operands: Sequence[ir.Value], mask: Mask, attributes: dict[str, int | float]) -> ir.Value:
    inputs = [*operands, *([mask.value] if mask.value is not None else [])]
    name = f"{site.anchor.name}/attention"
    return insert(site.anchor, "Attention", inputs, attributes, name=name, dtype=site.output.dtype)


def _scaled(site: ir.Node, value: ir.Value, factor: float) -> ir.Value:
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    return insert(site, "Mul", [value, initializer(graph, "scale", np.asarray(factor, np.float32))])


def _connect(symbols: Symbols, site: Site, y: ir.Value, lead: Axis, head: Axis) -> None:
    """Let the readers of the old output read ``y`` [B,S,H*d]."""
    value, axes = site.output, tuple(merged(row) for row in site.output_axes)
    inner = next((row for row in axes if any(digit.label == VALUE for digit in row)), ())
    wanted = (lead, site.axes[-2], (*head, *inner))
    joined: tuple[ir.Value, Axes] | None = None
    rounding: list[ir.Node] = []
    while axes != wanted:
        if not rounding and axes[-1] == wanted[-1] and all(digit.whole for row in axes for digit in row):
            joined = value, axes
        readers = consumers(value)
        alone = len(readers) == 1 and not value.is_graph_output()
        if alone and rounds_alike(readers[0]):
            rounding.append(readers[0])
            value = readers[0].outputs[0]
            continue
        moved = after(symbols, readers[0], axes) if alone else None
        if moved is None:
            break
        value, axes = readers[0].outputs[0], tuple(merged(row) for row in moved)
    if axes == wanted:
        for node in rounding:
            y = rounded_alike(site.anchor, node, y)
            symbols.learn(y)
        replace_uses(value, y)
    elif joined is not None:
        replace_uses(*move_result(symbols, site.anchor, y, wanted, *joined))
    elif _is_plain(site) and lead + head == tuple(digit for row in site.axes[:-2] for digit in row):
        replace_uses(site.output, _four_again(symbols, site, y))
    else:
        replace_uses(site.output, move(symbols, site.anchor, y, wanted, site.output_axes))


def _is_plain(site: Site) -> bool:
    """Whether the result is [..., S, d] with the axes of the scores, at most four."""
    return len(site.axes) <= 4 and site.output_axes[:-1] == site.axes[:-1]


def _four_again(symbols: Symbols, site: Site, y: ir.Value) -> ir.Value:
    """``y`` [B,S,H*d] in the layout that unusual readers expect; head counts stay out of the shapes."""
    graph, size = site.anchor.graph, product(digit.count for digit in site.output_axes[-1]).constant
    assert isinstance(graph, ir.Graph) and size is not None
    apart = insert(site.anchor, "Reshape", [y, initializer(graph, "apart", np.asarray([0, 0, -1, size], np.int64))])
    symbols.learn(apart)
    turned = insert(site.anchor, "Transpose", [apart], {"perm": [0, 2, 1, 3]})
    symbols.learn(turned)
    if len(site.axes) == 4:
        return turned
    flat = initializer(graph, "flat", np.asarray([-1, *_tail(symbols, site)], np.int64))
    return insert(site.anchor, "Reshape", [turned, flat])


def _tail(symbols: Symbols, site: Site) -> list[int]:
    dims = symbols.dims(site.output)
    tail = [dim.constant for dim in (dims or ())[1:]]
    if len(tail) != len(site.axes) - 1 or None in tail:
        raise NotAttentionError("output-layout")
    return tail  # type: ignore[return-value]
