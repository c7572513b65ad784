"""Attention of onnxruntime's operators as the standard ``Attention``, with masks in its form.

Notation: B batch, S queries, T keys (with past ones), P past keys, N query heads, G key heads, H head size.
A mask of onnxruntime's adds ``mask_filter_value`` to the scores of keys that it hides, and the lowest number to those
behind a query: a row with padding only is a mean over all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xopt.ir.canonical.contrib.norms import counted
from xopt.ir.canonical.contrib.site import Attributes, Site


@dataclass(frozen=True)
class Operands:
    """Queries [B,S,N*H], and keys and values [B,L,G*H] or, heads apart, [B,G,L,H].

    Attributes:
        past: keys and values [B,G,P,H] that go before.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    heads: int
    kv_heads: int
    past: tuple[ir.Value, ir.Value] | None = None


def head_count(site: Site, name: str) -> int:
    """A number of heads, of which there is at least one."""
    heads = int(site.attr(name))
    if heads < 1:
        raise site.refused(f"{name} is {heads}")
    return heads


def apart(site: Site, value: ir.Value, heads: int) -> ir.Value:
    """[B,S,N*H] as [B,N,S,H]; what has four axes stays as it is."""
    if site.rank(value) == 4:
        return value
    split = site.op("Reshape", value, site.ints(0, 0, heads, -1))
    return site.op("Transpose", split, perm=[0, 2, 1, 3])


def together(site: Site, value: ir.Value) -> ir.Value:
    """[B,N,S,H] as [B,S,N*H]."""
    return site.op("Reshape", site.op("Transpose", value, perm=[0, 2, 1, 3]), site.ints(0, 0, -1))


def with_past(site: Site, operands: Operands) -> Operands:
    """The operands with the past ones joined to keys and values."""
    if operands.past is None:
        return operands
    k, v = (
        site.op("Concat", old, apart(site, new, operands.kv_heads), axis=2)
        for old, new in zip(operands.past, (operands.k, operands.v))
    )
    return Operands(operands.q, k, v, operands.heads, operands.kv_heads)


def attend(
    site: Site, operands: Operands, mask: ir.Value | None, *, scale: float, causal: bool = False, softcap: float = 0.0
) -> ir.Value:
    """The output [B,S,N*H] of operands without a past; a ``scale`` of 0 is the usual one."""
    attributes: Attributes = {"is_causal": int(causal)}
    if scale:
        attributes["scale"] = float(scale)
    if softcap:
        attributes["softcap"] = float(softcap)
    if site.rank(operands.k) == 3:
        attributes |= {"q_num_heads": operands.heads, "kv_num_heads": operands.kv_heads}
        return site.op("Attention", operands.q, operands.k, operands.v, mask, **attributes)
    q = apart(site, operands.q, operands.heads)
    return together(site, site.op("Attention", q, operands.k, operands.v, mask, **attributes))


@dataclass
class Scores:
    """What is added to the scores of one attention."""

    site: Site
    operands: Operands
    """With the past joined to keys and values."""
    past: ir.Value | None
    """The past keys [B,G,P,H]."""

    def length(self) -> ir.Value:
        """T, int64 [1]."""
        k = self.operands.k
        return self.site.length(k, 1 if self.site.rank(k) == 3 else 2)

    def padding(self, mask: ir.Value, filler: float) -> ir.Value:
        """A padding mask int32 as numbers to add, [B,1,1|S,T].

        It is [B,T] or [B,S,T] with 1 for keys that are shown, or has for each sample the place behind its last key
        [B], and then that of its first key [2*B].
        """
        site, rank = self.site, self.site.rank(mask)
        if rank == 1:
            shown = self._shown_by_ends(mask)
        elif rank in (2, 3):
            shown = site.op("Greater", mask, site.number(0, mask))
        else:
            raise site.refused(f"a mask of rank {rank}")
        q = self.operands.q
        added = site.op("Where", shown, site.number(0.0, q), site.number(filler, q))
        return site.op("Unsqueeze", added, site.ints(1, 2) if rank < 3 else site.ints(1))

    def _shown_by_ends(self, mask: ir.Value) -> ir.Value:
        site, places = self.site, counted(self.site, self.length())
        batch, size = site.dims(self.operands.q)[0], site.dims(mask)[0]
        if size == batch:
            return self._before(places, mask)
        if size != batch * 2:
            raise site.refused("whether its mask_index of rank 1 has one or two numbers for each sample is not known")
        ends, starts = site.several("Split", 2, mask, axis=0, num_outputs=2)
        return site.op("And", self._before(places, ends), site.op("Not", self._before(places, starts)))

    def _before(self, places: ir.Value, ends: ir.Value) -> ir.Value:
        wide = self.site.cast(ends, ir.DataType.INT64)
        return self.site.op("Less", places, self.site.op("Unsqueeze", wide, self.site.ints(1)))

    def earlier(self) -> ir.Value:
        """Bool [S,T]: keys up to the query's own place, which is behind the past ones."""
        site = self.site
        rows = counted(site, site.length(self.operands.q, 1))
        if self.past is not None:
            rows = site.op("Add", rows, site.length(self.past, 2))
        return site.op("LessOrEqual", counted(site, self.length()), site.op("Unsqueeze", rows, site.ints(1)))

    def mask(self, added: ir.Value | None, causal: bool) -> tuple[ir.Value | None, bool]:
        """The mask of the standard operator, and whether it is to hide later keys by itself."""
        if not causal or self.past is None:
            return added, causal
        if added is None:
            return self.earlier(), False
        return self.site.op("Where", self.earlier(), added, self.site.lowest(added)), False
