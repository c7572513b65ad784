"""Fused softmax attention: ``softmax(scale * Q K^T + mask) V`` per head, without ever holding a full score matrix.

    for sequence, head, block of queries:              in parallel; queries lie in the vector lanes
        QT [d, queries] = scale * log2(e) * Q^T         shuffled transpose, stays in the first-level cache
        for block of keys:                              online softmax: memory does not grow with T
            P [keys, queries]  = K . QT                 register tile: rows of K broadcast, read in place
            P, maximum, sum    = 2 ** (P - maximum)     lane by lane, no reduction across lanes
            OT [dv, queries]   = OT * rescale + V^T P   register tile: columns of V broadcast, read in place
        O = (OT / sum)^T

Because K and V are only ever broadcast, any head_dim, key count, row stride and column offset runs at full speed, and a
fused QKV projection is read where it lies.  Causal attention ends the key loop at the last visible key.

At bfloat16 both products are over pairs (see `xopt.kernels.precision`): of columns of Q and K, which are neighbours in
memory, and of keys, for which P is rounded and interleaved in place, and the block of V is interleaved first.  At int8
they are over fours: Q, K, V are uint8, Q around 128, a scale and zero point for each head; P is rounded to 255ths of
the largest weight so far, and divided by the sum of what it was rounded to:

    score = scale_q scale_k (sum_c (q - 128) k - zero_k sum_c (q - 128))
    O = scale_v ((sum P v) / (sum P) - zero_v)
Source    Milakov, Gimelshein (2018), online softmax; Dao et al. (NeurIPS 2022), FlashAttention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from xopt.kernels import precision
from xopt.kernels.emit import (
    PrimFunc,
    prim_func,
)
from xopt.kernels.isa import Isa

VERSION = 1

Grids: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike]
"""Scales and zero points, of a head each."""


@dataclass(frozen=True)
class Operand:
    """Where Q, K or V lies: columns from ``offset`` on of input number ``buffer``, which is ``width`` wide."""

    buffer: int
    width: int
    offset: int = 0


@dataclass(frozen=True)
class Workload:
    """One attention; None marks a dynamic dimension.

    Args:
        batch, queries, keys: B, S, T.
        heads, kv_heads: query heads, and key/value heads that groups of them share.
        head_dim, v_head_dim: d of Q and K, dv of V and the output.
        scale: the factor on Q K^T.
        causal: query i sees keys 0..i.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask; 0 for none.
        mask: "none", "bool" (True attends) or "float" (added); a row that sees no key gives zeros.
        mask_shape: its four dimensions: 1 where it broadcasts, anything else where it is B, heads, S, T.
        q, k, v: where the operands lie.
        packed: sequences of different lengths lie one behind the other: operands are [T, width] for all tokens T of the
            batch, and an input says where each sequence starts; every token sees its own sequence (see
            `xopt.kernels.padding`).
        heads_first: the 4-D form [B, heads, S, d], each operand a tensor of its own.
        operands: "float32", "bfloat16" (for an even d) or "int8" (for a d divisible by 4), the precision of Q, K, V and
            the weights.
        results: formats that O is written in: "float32", "bfloat16", "uint8".
    """

    batch: int | None
    queries: int | None
    keys: int | None
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    q: Operand
    k: Operand
    v: Operand
    causal: bool = False
    softcap: float = 0.0
    mask: str = "none"
    mask_shape: tuple[int | None, int | None, int | None, int | None] = (1, 1, 1, 1)
    packed: bool = False
    heads_first: bool = False
    operands: str = "float32"
    results: tuple[str, ...] = ("float32",)

    @property
    def mask_per_query(self) -> bool:
        """The mask differs from query to query."""
        return self.mask != "none" and self.mask_shape[2] != 1

    @property
    def mask_per_key(self) -> bool:
        """One mask row for all queries."""
        return self.mask != "none" and self.mask_shape[2] == 1


def separate(heads: int, kv_heads: int, head_dim: int, v_head_dim: int) -> dict[str, Operand]:
    """The operands of attention over three tensors Q, K, V: keyword arguments of `Workload`."""
    return {
        "q": Operand(0, heads * head_dim),
        "k": Operand(1, kv_heads * head_dim),
        "v": Operand(2, kv_heads * v_head_dim),
    }


def fused(heads: int, kv_heads: int, head_dim: int, v_head_dim: int) -> dict[str, Operand]:
    """The operands of attention over one QKV projection: keyword arguments of `Workload`."""
    q, k, v = heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim
    return {"q": Operand(0, q + k + v), "k": Operand(0, q + k + v, q), "v": Operand(0, q + k + v, q + k)}


@dataclass(frozen=True)
class Config:
    """``vectors`` of queries by ``block`` keys at a time, in tiles of ``key_rows`` keys or ``value_rows`` columns."""

    vectors: int
    block: int
    key_rows: int
    value_rows: int

    @property
    def key_step(self) -> int:
        """Row counts of the last tile of a block of keys: multiples of this."""
        return 4 if self.key_rows % 4 == 0 else 2 if self.key_rows % 2 == 0 else 1


def space(workload: Workload, isa: Isa) -> Iterator[Config]:
    for vectors in range(1, _most_vectors(workload, isa, 4) + 1):
        most = isa.tile_rows(vectors)
        for key_rows in sorted({rows for rows in (most // 4 * 4, most // 2 * 2) if rows}):
            for keys in (64, 128, 192, 256, 384):
                config = Config(vectors, keys // key_rows * key_rows, key_rows, _value_rows(workload.v_head_dim, most))
                if config.block:
                    yield config


def heuristic(workload: Workload, isa: Isa) -> Config:
    vectors = _most_vectors(workload, isa, 2)
    most = isa.tile_rows(vectors)
    key_rows = min(12, most // 4 * 4 or most // 2 * 2)
    keys = 256 if workload.operands == "float32" else 128  # interleaved values lie in the first-level cache as well
    return Config(vectors, keys // key_rows * key_rows, key_rows, _value_rows(workload.v_head_dim, most))


def _most_vectors(workload: Workload, isa: Isa, limit: int) -> int:
    """No more vectors of queries than there are queries."""
    return limit if workload.queries is None else min(limit, -(-workload.queries // isa.lanes))


def _value_rows(v_head_dim: int, most: int) -> int:
    """Split the columns of V into equal tiles, as few as the registers allow."""
    return -(-v_head_dim // -(-v_head_dim // most))


def name(workload: Workload, config: Config, isa: Isa) -> str:
    w = workload
    shape = "x".join("any" if extent is None else str(extent) for extent in (w.batch, w.queries, w.keys))
    parts = [f"attention_{shape}_{w.heads}x{w.head_dim}_{w.kv_heads}x{w.v_head_dim}"]
    parts += [f"{o.buffer}at{o.offset}of{o.width}" for o in (w.q, w.k, w.v) if not w.heads_first]
    parts += ["packed"] * w.packed + ["bhsd"] * w.heads_first + ["causal"] * w.causal
    parts += [f"scale{_token(w.scale)}"] + [f"softcap{_token(w.softcap)}"] * (w.softcap > 0)
    if w.mask != "none":
        parts.append(w.mask + "".join("1" if extent == 1 else "n" for extent in w.mask_shape))
    parts += precision.suffix(w.operands, w.results)
    parts += [isa.token, f"{config.vectors}x{config.block}x{config.key_rows}x{config.value_rows}"]
    return "_".join(parts)


def grids(q: Grids, k: Grids, v: Grids) -> npt.NDArray[np.float32]:
    """What int8 attention must know of each head: scale of the scores, zero point of K, scale and zero point of V.

    Args:
        q, k, v: scales and zero points by head, of which K and V may have fewer; the zero points of Q are 128.
    """
    q_scale = np.asarray(q[0], np.float32)
    columns = [np.asarray(column, np.float32) for column in (*k, *v)]
    k_scale, k_zero, v_scale, v_zero = (np.repeat(column, len(q_scale) // len(column)) for column in columns)
    return np.stack([q_scale * k_scale, k_zero, v_scale, v_zero - 128], axis=1)


def _token(value: float) -> str:
    return f"{value:.9g}".replace("-", "m").replace("+", "").replace(".", "p")


def build(workload: Workload, config: Config, isa: Isa) -> PrimFunc:
    """The kernel over (inputs by number, [grids], [mask], [starts], [quantization], O...); a bool mask has dtype bool.

    Grids [heads, 4] come with int8, see `grids`. Inputs hold what `Precision.activation` says; O comes once for each
    format.
    """
    from xopt.kernels.attention_template import Template

    return prim_func(name(workload, config, isa), lambda: Template(workload, config, isa).emit())
