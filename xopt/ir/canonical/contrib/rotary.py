"""``RotaryEmbedding``: onnxruntime has whole tables and positions, ONNX's canonical form the rows of each position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.norms import counted
from xopt.ir.canonical.contrib.site import Attributes, Site


def _rotary(site: Site) -> Results:
    x, rank = site.value("input"), site.rank(site.value("input"))
    site.only(is_packed_batching=0, scale=1.0)
    if rank not in (3, 4):
        raise site.refused(f"its input has rank {rank}")
    positions = _positions(site, site.value("position_ids"), site.length(x, 1 if rank == 3 else 2))
    return [rotated(site, x, positions, int(site.attr("num_heads")), bool(site.attr("interleaved")))]


def _positions(site: Site, given: ir.Value, length: ir.Value) -> ir.Value:
    """Positions int64 [B,S] or [1,S], of all tokens or of the first one [1]."""
    rank = site.rank(given)
    if rank == 2:
        return given
    if rank != 1 or site.dims(given)[0].constant != 1:
        raise site.refused("its position_ids are neither [1] nor [batch, sequence]")
    return site.op("Unsqueeze", site.op("Add", counted(site, length), given), site.ints(0))


def _by_three_positions(site: Site) -> Results:
    """Columns of the tables at the place in time, the row or the column of a token, of positions [3,B,S]."""
    site.only(is_packed_batching=0, scale=1.0)
    x, positions = site.value("input"), site.value("position_ids")
    sections, layout = [int(size) for size in site.attr("mrope_section")], int(site.attr("mrope_layout"))
    width = site.size(site.value("cos_cache"), -1)
    if layout not in (0, 1) or len(sections) != 3 or min(sections) < 0 or sum(sections) != width:
        raise site.refused(f"sections {sections} of {width} columns in layout {layout}")
    columns, chosen = np.arange(site.few(width)), np.repeat(np.arange(3), sections)
    if layout:
        chosen = sum(k * ((columns % 3 == k) & (columns < 3 * sections[k])) for k in (1, 2))
    streams = [site.op("Gather", positions, site.index(k), axis=0) for k in range(3)]

    def rows(table: ir.Value) -> ir.Value:
        time, *others = (site.op("Gather", table, stream) for stream in streams)
        for k, other in enumerate(others, 1):
            time = site.op("Where", site.array("columns", chosen == k), other, time)
        return time

    return [_turned(site, x, rows, int(site.attr("num_heads")), bool(site.attr("interleaved")))]


def rotated(site: Site, x: ir.Value, positions: ir.Value, heads: int, interleaved: bool) -> ir.Value:
    """``x`` [B,S,N*H] or [B,N,S,H] turned by the rows of ``cos_cache`` and ``sin_cache`` at ``positions`` [B|1,S]."""
    return _turned(site, x, lambda table: site.op("Gather", table, positions), heads, interleaved)


def _turned(site: Site, x: ir.Value, rows: Callable[[ir.Value], ir.Value], heads: int, interleaved: bool) -> ir.Value:
    """``x`` turned by rows [B|1,S,width] of the tables."""
    tables = site.value("cos_cache"), site.value("sin_cache")
    width = 2 * site.size(tables[0], -1)
    attributes: Attributes = {"interleaved": int(interleaved)}
    dim = int(site.attr("rotary_embedding_dim")) if "rotary_embedding_dim" in site.form.defaults else 0
    if dim not in (0, width):
        raise site.refused(f"rotary_embedding_dim is {dim} for a table of {width // 2} columns")
    if site.rank(x) == 3:
        heads = heads or _heads(site, x, width, dim)
        attributes["num_heads"] = heads
        partial = site.size(x, -1) != heads * width
    else:
        partial = site.size(x, -1) != width
    if partial:
        attributes["rotary_embedding_dim"] = width
    cos, sin = (rows(table) for table in tables)
    return site.op("RotaryEmbedding", x, cos, sin, **attributes)


def _heads(site: Site, x: ir.Value, width: int, dim: int) -> int:
    """The number of heads that are turned as a whole."""
    size = site.size(x, -1)
    if dim or size % width:
        raise site.refused("num_heads is missing")
    return size // width


def _gemma(site: Site) -> Results:
    """Queries and keys [B,N,S,H] of which turned copies are given, by angles [B,S,H]."""
    q = site.value("q")
    cos, sin = (
        site.op("Unsqueeze", site.cast(site.op(name, site.value("emb")), site.dtype(q)), site.ints(1))
        for name in ("Cos", "Sin")
    )
    pairs = ((q, site.value("q_rot")), (site.value("k"), site.value("k_rot")))
    return [site.op("Add", site.op("Mul", x, cos), site.op("Mul", turned, sin)) for x, turned in pairs]


RULES = {"GemmaRotaryEmbedding": _gemma, "MRotaryEmbedding": _by_three_positions, "RotaryEmbedding": _rotary}
