"""``Attention``, whose operands are one product, and ``MultiHeadAttention``, which gets them in many layouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.heads import Operands, Scores, apart, attend, head_count, with_past
from xopt.ir.canonical.contrib.site import Site


def _attention(site: Site) -> Results:
    """q, k and v lie side by side in the result of one linear layer; past and present ones are one tensor each."""
    weights = site.value("weights")
    projected = site.plus(site.op("MatMul", site.value("input"), weights), site.given("bias"))
    return of_projection(site, projected, site.size(weights, -1), site.attr("qkv_hidden_sizes"))


def of_projection(site: Site, projected: ir.Value, width: int, sizes: Sequence[int] | None) -> Results:
    """Output and present keys and values of q, k and v side by side [B,S,width]."""
    site.only(do_rotary=0, past_present_share_buffer=0)
    heads = head_count(site, "num_heads")
    sizes = list(sizes) if sizes else [width // 3] * 3
    if len(sizes) != 3 or sum(sizes) != width or any(size < 1 or size % heads for size in sizes):
        raise site.refused(f"{width} columns are not q, k and v of {heads} heads")
    q, k, v = site.parts(projected, sizes)
    operands = Operands(q, k, v, heads, heads, _halves(site, site.given("past")))
    bias = site.given("attention_bias") if "attention_bias" in site.form.inputs else None
    site.pass_over("rotary_embedding_dim", "past_sequence_length")
    output, k, v = _attended(site, operands, site.given("mask_index"), bias, bool(site.attr("unidirectional")))
    if not site.wants("present"):
        return [output]
    both = [site.op("Unsqueeze", apart(site, value, heads), site.ints(0)) for value in (k, v)]
    return [output, site.op("Concat", *both, axis=0)]


def _halves(site: Site, both: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Keys and values that lie one behind the other in the first axis."""
    if both is None:
        return None
    return site.op("Gather", both, site.index(0), axis=0), site.op("Gather", both, site.index(1), axis=0)


def _attended(
    site: Site, operands: Operands, mask: ir.Value | None, bias: ir.Value | None, causal: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The output, and keys and values with the past ones."""
    past = operands.past[0] if operands.past is not None else None
    operands = with_past(site, operands)
    scores, filler = Scores(site, operands, past), float(site.attr("mask_filter_value"))
    if mask is not None:
        added = scores.padding(mask, filler)
        bias = added if bias is None else site.op("Add", bias, added)
    bias, causal = scores.mask(bias, causal)
    output = attend(site, operands, bias, scale=site.attr("scale"), causal=causal)
    return output, operands.k, operands.v


def _multi_head(site: Site) -> Results:
    """Keys and values may be packed with the queries or with each other, or come as they were cached."""
    heads = head_count(site, "num_heads")
    q, k, v = _unpacked(site)
    cached = site.rank(k) == 4
    if (bias := site.given("bias")) is not None:
        q, k, v = _biased(site, bias, q, k, v, cached)
    operands = Operands(q, k, v, heads, heads, _past(site))
    causal = bool(site.attr("unidirectional"))
    output, k, v = _attended(site, operands, site.given("key_padding_mask"), site.given("attention_bias"), causal)
    return [output, *_present(site, k, v, heads)]


def _past(site: Site) -> tuple[ir.Value, ir.Value] | None:
    """Keys and values that go before."""
    keys, values = site.given("past_key"), site.given("past_value")
    if (keys is None) != (values is None):
        raise site.refused("past_key and past_value do not go together")
    return (keys, values) if keys is not None and values is not None else None


def _present(site: Site, k: ir.Value, v: ir.Value, heads: int) -> list[ir.Value | None]:
    """Keys and values with the past ones, where they are wanted."""
    shown = [site.wants(name) for name in ("present_key", "present_value")]
    return [apart(site, value, heads) if wanted else None for value, wanted in zip((k, v), shown)]


def _decoder_masked(site: Site) -> Results:
    """One query for each sample; keys and values of one token, or those of another sequence as they were cached."""
    site.only(output_qk=0)
    heads, bias = head_count(site, "num_heads"), site.given("bias")
    q, k, v = (site.value(name) for name in ("query", "key", "value"))
    cached = site.rank(k) == 4
    if bias is not None:
        q, k, v = _biased(site, bias, q, k, v, cached)
    buffers, filled = _past(site), None
    if site.attr("past_present_share_buffer") and not cached:
        filled = site.op("Reshape", site.cast(site.value("past_sequence_length"), ir.DataType.INT64), site.ints(1))
    past = buffers if filled is None or buffers is None else _used(site, buffers, filled)
    operands = Operands(q, k, v, heads, heads, past)
    output, k, v = _attended(site, operands, site.given("mask_index"), site.given("attention_bias"), False)
    if filled is not None and buffers is not None:
        k, v = (_filled(site, old, new) for old, new in zip(buffers, (k, v)))
    return [output, *_present(site, k, v, heads)]


def _used(site: Site, buffers: tuple[ir.Value, ir.Value], filled: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first places of buffers [B,N,L,H]."""
    keys, values = (site.op("Slice", one, site.ints(0), filled, site.ints(2)) for one in buffers)
    return keys, values


def _filled(site: Site, buffer: ir.Value, used: ir.Value) -> ir.Value:
    """A buffer [B,N,L,H] whose first places are others."""
    rest = site.op("Slice", buffer, site.length(used, 2), site.ints(np.iinfo(np.int64).max), site.ints(2))
    return site.op("Concat", used, rest, axis=2)


def _unpacked(site: Site) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, k and v: three tensors, q [B,S,N,3,H], or q and [B,S,N,2,H]."""
    q, k, v = site.value("query"), site.given("key"), site.given("value")
    if k is not None and v is not None:
        return q, k, v
    packed = q if k is None else k
    if v is not None or site.rank(packed) != 5:
        raise site.refused("its keys or values are missing")
    taken = [
        site.op("Reshape", site.op("Gather", packed, site.index(place), axis=3), site.ints(0, 0, -1))
        for place in range(3 if k is None else 2)
    ]
    first, second, third = taken if k is None else (q, *taken)
    return first, second, third


def _biased(
    site: Site, bias: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value, cached: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The operands with their parts of a bias [Dq + Dk + Dv]; what is cached has had its own."""
    width = site.size(q, -1)
    parts = site.parts(bias, [width, width, site.size(bias, 0) - 2 * width])
    if cached:
        return site.plus(q, parts[0]), k, v
    first, second, third = (site.plus(value, part) for value, part in zip((q, k, v), parts))
    return first, second, third


RULES = {
    "Attention": _attention,
    "DecoderMaskedMultiHeadAttention": _decoder_masked,
    "MultiHeadAttention": _multi_head,
}
