"""``GroupQueryAttention``: causal attention over a cache whose rows are filled to different lengths.

Sample b has ``seqlens_k[b] + 1`` keys; all of them are new in the first call, where there are as many queries as
``total_sequence_length``, else the last S. New keys stand behind the past ones of their sample, and what is behind them
up to the length of the cache is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.heads import Operands, apart, attend, head_count
from xopt.ir.canonical.contrib.norms import counted
from xopt.ir.canonical.contrib.rotary import rotated
from xopt.ir.canonical.contrib.site import Site


def _group_query(site: Site) -> Results:
    site.only(causal=1, qk_output=0, sliding_window_cache=0, k_quant_type="NONE", v_quant_type="NONE")
    site.pass_over("qk_norm_epsilon")
    heads, kv_heads = head_count(site, "num_heads"), head_count(site, "kv_num_heads")
    if heads % kv_heads:
        raise site.refused(f"{heads} query heads do not share {kv_heads} key heads")
    q, k, v = _separate(site, heads, kv_heads)
    cache = _Cache.of(site, q)
    if site.attr("do_rotary"):
        interleaved = bool(site.attr("rotary_interleaved"))
        positions = cache.positions(site.given("position_ids"))
        q, k = (rotated(site, x, positions, count, interleaved) for x, count in ((q, heads), (k, kv_heads)))
    else:
        site.pass_over("cos_cache", "sin_cache", "position_ids", "rotary_interleaved")
    keys, values = (
        cache.filled(apart(site, new, kv_heads), site.given(f"past_{name}"), site.size(q, -1) // heads)
        for name, new in (("key", k), ("value", v))
    )
    keep = _visible(site, cache)
    scale, cap = float(site.attr("scale")), float(site.attr("softcap"))
    operands, mask = _with_sink(site, Operands(q, keys, values, heads, kv_heads), _biased(site, keep, q), cap)
    return [attend(site, operands, mask, scale=scale, softcap=cap), keys, values]


def _separate(site: Site, heads: int, kv_heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, k and v, which may lie side by side in ``query``."""
    q, k, v = site.value("query"), site.given("key"), site.given("value")
    if k is not None and v is not None:
        return q, k, v
    size, rest = divmod(site.size(q, -1), heads + 2 * kv_heads)
    if k is not None or v is not None or rest:
        raise site.refused("its keys or values are missing")
    first, second, third = site.parts(q, [heads * size, kv_heads * size, kv_heads * size])
    return first, second, third


@dataclass
class _Cache:
    """Where keys lie.

    Attributes:
        first: bool [1], whether this is the first call.
        start: int64 [B,1], the place of each sample's first new key.
        rows: int64 [B,S], the places of the new keys.
        places: int64 [T], all places.
    """

    site: Site
    first: ir.Value
    start: ir.Value
    rows: ir.Value
    places: ir.Value

    @classmethod
    def of(cls, site: Site, q: ir.Value) -> _Cache:
        count, past = site.length(q, 1), site.given("past_key")
        ends = site.op("Reshape", site.cast(site.value("seqlens_k"), ir.DataType.INT64), site.ints(-1, 1))
        total = site.op("Reshape", site.cast(site.value("total_sequence_length"), ir.DataType.INT64), site.ints(1))
        behind = site.op("Sub", site.op("Add", ends, site.index(1)), count)
        first = site.op("Equal", count, total)
        start = site.op("Where", first, site.index(0), behind)
        length = total if past is None else site.op("Max", total, site.length(past, 2))
        rows = site.op("Add", start, counted(site, count))
        return cls(site, first, start, rows, counted(site, length))

    def positions(self, given: ir.Value | None) -> ir.Value:
        """Positions int64 [B,S]: as given, but in the first call only the very first; else the places."""
        if given is None:
            return self.rows
        site = self.site
        corner = site.op("Slice", given, site.ints(0, 0), site.ints(1, 1), site.ints(0, 1))
        return site.op("Where", self.first, site.op("Add", self.rows, corner), given)

    def filled(self, new: ir.Value, past: ir.Value | None, size: int) -> ir.Value:
        """The new keys or values [B,G,S,H] behind the past ones of their sample [B,G,P,H], as [B,G,T,H]."""
        site, joined = self.site, new if past is None else self.site.op("Concat", past, new, axis=2)
        count, held = site.length(new, 2), site.length(joined, 2)
        behind = site.op("Sub", self.places, self.start)
        source = site.op("Add", behind, site.op("Sub", held, count))
        source = site.op("Where", site.op("Less", behind, site.index(0)), self.places, source)
        last = site.op("Sub", held, site.index(1))
        source = site.op("Unsqueeze", site.op("Min", source, last), site.ints(1, 3))
        heads = site.size(new, 1)
        gathered = site.op("GatherElements", joined, site.op("Expand", source, site.ints(1, heads, 1, size)), axis=2)
        shown = site.op("Unsqueeze", site.op("Less", behind, count), site.ints(1, 3))
        return site.op("Where", shown, gathered, site.number(0.0, new))


def _visible(site: Site, cache: _Cache) -> ir.Value:
    """Bool [B,1,S,T]: keys up to the query's own, of these the last ``local_window_size``."""
    rows, window = site.op("Unsqueeze", cache.rows, site.ints(1, 3)), int(site.attr("local_window_size"))
    keep = site.op("LessOrEqual", cache.places, rows)
    if window <= 0:
        return keep
    return site.op("And", keep, site.op("Greater", cache.places, site.op("Sub", rows, site.index(window))))


def _biased(site: Site, keep: ir.Value, q: ir.Value) -> ir.Value:
    """The mask with what is added to the scores."""
    bias = site.given("attention_bias")
    return keep if bias is None else site.op("Where", keep, bias, site.lowest(q))


def _with_sink(site: Site, operands: Operands, mask: ir.Value, cap: float) -> tuple[Operands, ir.Value]:
    """A key of zeros whose score is ``head_sink`` [N], or 0 of a smooth softmax: it takes weight and gives nothing."""
    sink, smooth = site.given("head_sink"), int(site.attr("smooth_softmax")) == 1
    if sink is None and not smooth:
        return operands, mask
    if cap:
        raise site.refused("a softcap goes with a sink")
    k, v = (site.op("Pad", value, site.ints(0, 0, 0, 0, 0, 0, 1, 0)) for value in (operands.k, operands.v))
    if mask.dtype == ir.DataType.BOOL:
        mask = site.op("Where", mask, site.number(0.0, operands.q), site.lowest(operands.q))
    column = site.number(0.0, operands.q) if sink is None else site.op("Reshape", sink, site.ints(1, -1, 1, 1))
    shape = site.op("Concat", site.length(mask, 0), site.ints(operands.heads), site.length(mask, 2), axis=0)
    parts = [
        site.op("Expand", value, site.op("Concat", shape, length, axis=0))
        for value, length in ((mask, site.length(mask, 3)), (column, site.ints(1)))
    ]
    joined = site.op("Concat", *parts, axis=3)
    return Operands(operands.q, k, v, operands.heads, operands.kv_heads), joined


RULES = {"GroupQueryAttention": _group_query}
