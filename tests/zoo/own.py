"""Small models of our own: the forms of attention that the transformers models of the zoo do not show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, mask, normal

WIDTH, HEADS, DEPTH = 32, 4, 8
X = {0: "batch", 1: "seq"}


class Block(nn.Module):
    """Pre-norm residual block around an attention: ``x + out(attend(norm(x)))``, then a feed-forward."""

    def __init__(self, kv_heads: int = HEADS, bias: bool = True) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.norm = nn.LayerNorm(WIDTH)
        self.project(bias)
        self.out = nn.Linear(HEADS * DEPTH, WIDTH, bias=bias)
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def project(self, bias: bool) -> None:
        self.q = nn.Linear(WIDTH, HEADS * DEPTH, bias=bias)
        self.k = nn.Linear(WIDTH, self.kv_heads * DEPTH, bias=bias)
        self.v = nn.Linear(WIDTH, self.kv_heads * DEPTH, bias=bias)

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,H,S,d] each."""
        split = [
            part.unflatten(-1, (-1, DEPTH)).transpose(1, 2) for part in (self.q(x), self.k(memory), self.v(memory))
        ]
        return split[0], split[1], split[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) / math.sqrt(DEPTH)).softmax(-1)
        return weights @ v

    def join(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        y = self.attend(*self.qkv(normed, normed if memory is None else memory))
        x = x + self.out(self.join(y))
        return x + self.ffn(x)


class Stack(nn.Module):
    """Two blocks one after the other; further inputs go to each."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class StackWith(Stack):
    """A stack with a second input."""

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            x = block(x, extra)
        return x


class Sdpa(Block):
    """torch's own attention, scale left to it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Causal(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalBuffer(Block):
    """nanoGPT's mask: a square buffer of ones, sliced to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(DEPTH))
        length = q.size(2)
        scores = scores.masked_fill(self.tril[:, :, :length, :length] == 0, float("-inf"))
        return scores.softmax(-1) @ v


class CausalTriu(Block):
    """An additive mask of -inf above the diagonal, as in nn.Transformer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.size(2)
        above = torch.triu(torch.full((length, length), float("-inf")), diagonal=1)
        return (q @ k.transpose(-1, -2) * DEPTH**-0.5 + above).softmax(-1) @ v


class Alibi(Block):
    """Linear biases by distance, causal (BLOOM, MPT)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.size(2)
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
        places = torch.arange(length)
        distance = (places[None, :] - places[:, None]).float()
        bias = slopes[:, None, None] * distance
        scores = q @ k.transpose(-1, -2) / math.sqrt(DEPTH) + bias
        keep = places[None, :] <= places[:, None]
        return scores.masked_fill(~keep, torch.finfo(torch.float32).min).softmax(-1) @ v


class RelativeBias(Block):
    """A learned bias per head and clipped distance."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.size(2))
        distance = (places[None, :] - places[:, None]).clamp(-8, 8) + 8
        bias = self.table(distance).permute(2, 0, 1)
        return (q @ k.transpose(-1, -2) / math.sqrt(DEPTH) + bias).softmax(-1) @ v


class SoftCap(Block):
    """Logits kept within +-5 by a tanh (Gemma 2), causal."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * DEPTH**-0.5
        scores = 5.0 * torch.tanh(scores / 5.0)
        places = torch.arange(q.size(2))
        keep = places[None, :] <= places[:, None]
        return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


class QkNorm(Block):
    """RMS norm over each head's queries and keys (Qwen 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(DEPTH, eps=1e-6), nn.RMSNorm(DEPTH, eps=1e-6)
        for norm in (self.q_norm, self.k_norm):
            nn.init.normal_(norm.weight, 1.0, 0.2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class QkLayerNorm(Block):
    """Layer norm over each head's queries and keys, before the transpose (ViT-22B, Chameleon)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(DEPTH), nn.LayerNorm(DEPTH)
        for norm in (self.q_norm, self.k_norm):
            nn.init.normal_(norm.weight, 1.0, 0.2)

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (HEADS, DEPTH)) for part in (self.q(x), self.k(memory), self.v(memory)))
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)


class Grouped(Block):
    """Two query heads share a key head, by repeat_interleave."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(HEADS // self.kv_heads, dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class GroupedNative(Block):
    """Grouped queries by torch's enable_gqa."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class OneKeyHead(Block):
    """All query heads share one key head, by broadcasting (multi-query)."""

    def __init__(self) -> None:
        super().__init__(kv_heads=1)


class FusedSplit(Block):
    """One projection, chunked."""

    def project(self, bias: bool) -> None:
        self.qkv_proj = nn.Linear(WIDTH, 3 * HEADS * DEPTH, bias=bias)

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for part in self.qkv_proj(x).chunk(3, dim=-1))
        return q, k, v


class FusedReshape(FusedSplit):
    """One projection seen as [B,S,3,H,d], permuted and unbound (timm)."""

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class FusedIndexed(FusedSplit):
    """The same, by indices, the scale on the queries."""

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 1, 4)
        return qkv[0] * DEPTH**-0.5, qkv[1], qkv[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class FusedPerHead(FusedSplit):
    """One projection seen as [B,S,H,3,d]: queries, keys and values of a head side by side (BLOOM, GPT-NeoX)."""

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (HEADS, 3, DEPTH))
        q, k, v = (qkv[..., part, :].transpose(1, 2) for part in range(3))
        return q, k, v


class FusedGrouped(Block):
    """One projection for 4 query, 2 key and 2 value heads, split unevenly (Phi-3)."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def project(self, bias: bool) -> None:
        self.qkv_proj = nn.Linear(WIDTH, (HEADS + 4) * DEPTH, bias=bias)

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv_proj(x).split([HEADS * DEPTH, 2 * DEPTH, 2 * DEPTH], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, DEPTH)).transpose(1, 2) for part in parts)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, length, _ = k.shape
        k, v = (p[:, :, None].expand(batch, 2, 2, length, DEPTH).reshape(batch, HEADS, length, DEPTH) for p in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class Flattened(Block):
    """Heads folded into the batch: bmm over [B*H,S,d] (fairseq, old OPT and Whisper)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, depth = q.shape
        q, k, v = (
            (part * scale).reshape(batch * heads, -1, depth) for part, scale in ((q, depth**-0.5), (k, 1.0), (v, 1.0))
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return y.view(batch, heads, length, depth)


class Folded(Block):
    """No scale: it is in the weights. No bias."""

    def __init__(self) -> None:
        super().__init__(bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class BothScaled(Block):
    """The root of the scale on queries and on keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        root = DEPTH**-0.25
        return ((q * root) @ (k * root).transpose(-1, -2)).softmax(-1) @ v


class Cross(Block):
    """Keys and values from a second sequence."""


class Padded(Block):
    """A key padding mask [B,T] of 0 and 1, filled in."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        self.keep = mask
        return super().forward(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(DEPTH)
        return scores.masked_fill(self.keep[:, None, None, :] == 0, float("-inf")).softmax(-1) @ v


class PaddedAdditive(Padded):
    """BERT's first form: (1 - mask) * -10000, added."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = (1.0 - self.keep[:, None, None, :].float()) * -10000.0
        return (q @ k.transpose(-1, -2) / math.sqrt(DEPTH) + bias).softmax(-1) @ v


class PaddedExpanded(Padded):
    """A boolean mask expanded to [B,1,S,T] before use."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = self.keep.bool()[:, None, None, :].expand(q.size(0), 1, q.size(2), k.size(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class FullMask(Padded):
    """A boolean mask [B,1,S,T] given by the caller."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep)


class Windows(Block):
    """Attention within windows of 4 tokens, a mask shared by the images added over [B, windows, H, 4, 4] (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 4, 4))
        blocked = torch.zeros(2, 4, 4)
        blocked[1, :2, 2:] = blocked[1, 2:, :2] = -100.0
        self.register_buffer("blocked", blocked)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return super().forward(x.reshape(-1, 4, WIDTH)).reshape(x.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * DEPTH**-0.5 + self.bias[None]
        scores = scores.view(-1, 2, HEADS, 4, 4) + self.blocked[None, :, None]
        return scores.view(-1, HEADS, 4, 4).softmax(-1) @ v


class Rotary(Block):
    """Rotary embedding by halves, half of the head's width, causal (GPT-NeoX)."""

    rotated = DEPTH // 2

    def turn(self, x: Tensor) -> Tensor:
        r = self.rotated
        angles = torch.arange(x.size(2)).float()[:, None] * 10000.0 ** (-torch.arange(0, r, 2).float() / r)
        angles = torch.cat([angles, angles], -1)
        first, rest = x[..., :r], x[..., r:]
        turned = torch.cat([-first[..., r // 2 :], first[..., : r // 2]], -1)
        return torch.cat([first * angles.cos() + turned * angles.sin(), rest], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)


class RotaryInterleaved(Block):
    """Rotary embedding of neighbours, on [B,S,H,d] before the transpose (llama2.c)."""

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.size(1)).float()[:, None] * 10000.0 ** (-torch.arange(0, DEPTH, 2).float() / DEPTH)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (-1, DEPTH)) for part in (self.q(x), self.k(memory), self.v(memory)))
        return self.turn(q).transpose(1, 2), self.turn(k).transpose(1, 2), v.transpose(1, 2)


class WeightsRead(Block):
    """The attention weights are read by something else too: they stay beside the attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) / math.sqrt(DEPTH)).softmax(-1)
        return weights @ v + weights.amax(-1, keepdim=True)


BAKED = (Alibi, CausalBuffer, CausalTriu, RelativeBias, SoftCap, Rotary, RotaryInterleaved, FusedGrouped, Flattened)
"""Modules whose sizes TorchScript's tracing fixes."""


def _torchscript(block: type[Block]) -> Literal["dynamic", "static", "none"]:
    if block in (QkNorm, GroupedNative):  # no symbolic for rms_norm, nor for enable_gqa
        return "none"
    return "static" if block in (*BAKED, PaddedExpanded) else "dynamic"


def _entry(
    block: type[Block],
    expect: Expect,
    feeds: Callable[[int, int], tuple[Tensor, ...]] | None = None,
    axes: tuple[dict[int, str], ...] = (X,),
) -> Entry:
    names = ("x", "extra")[: len(axes)]
    stack = Stack if len(axes) == 1 else StackWith

    def build(attention: str) -> nn.Module:
        torch.manual_seed(0)
        return stack(block).eval()

    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in block.__name__).lstrip("_")
    return Entry(name, build, names, feeds or _one, axes, expect, torchscript=_torchscript(block))


def _pair(block: type[Block], expect: Expect, extra: Callable[[int, int], Tensor], axes: dict[int, str]) -> Entry:
    return _entry(block, expect, lambda batch, seq: (*_one(batch, seq), extra(batch, seq)), (X, axes))


def _one(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (normal(batch, seq, WIDTH),)


def _triangle(batch: int, seq: int) -> Tensor:
    return torch.ones(batch, 1, seq, seq, dtype=torch.bool).tril(1)


ENTRIES: tuple[Entry, ...] = (
    _entry(Block, Expect(2, 4)),
    _entry(Sdpa, Expect(2, 4)),
    _entry(Causal, Expect(2, 4, causal=True)),
    _entry(CausalBuffer, Expect(2, 4, causal=True)),
    _entry(CausalTriu, Expect(2, 4, causal=True)),
    _entry(Alibi, Expect(2, 4, causal=True, mask="bias")),
    _entry(RelativeBias, Expect(2, 4, mask="bias")),
    _entry(SoftCap, Expect(2, 4, causal=True, softcap=5.0)),
    _entry(QkNorm, Expect(2, 4)),
    _entry(QkLayerNorm, Expect(2, 4)),
    _entry(Grouped, Expect(2, 4, 2)),
    _entry(GroupedNative, Expect(2, 4, 2)),
    _entry(OneKeyHead, Expect(2, 4, 1)),
    _entry(FusedSplit, Expect(2, 4, fused=True)),
    _entry(FusedReshape, Expect(2, 4, fused=True)),
    _entry(FusedIndexed, Expect(2, 4, fused=True)),
    _entry(FusedPerHead, Expect(2, 4, fused=True)),
    _entry(FusedGrouped, Expect(2, 4, 2, fused=True)),
    _entry(Flattened, Expect(2, 4)),
    _entry(Folded, Expect(2, 4, scale=1.0)),
    _entry(BothScaled, Expect(2, 4)),
    _pair(Cross, Expect(2, 4), lambda batch, seq: normal(batch, seq + 3, WIDTH), {0: "batch", 1: "memory"}),
    _pair(Padded, Expect(2, 4, mask="padding"), mask, X),
    _pair(PaddedAdditive, Expect(2, 4, mask="padding"), mask, X),
    _pair(PaddedExpanded, Expect(2, 4, mask="padding"), mask, X),
    _pair(FullMask, Expect(2, 4, mask="bias"), _triangle, {0: "batch", 2: "seq", 3: "seq"}),
    _entry(Windows, Expect(2, 4, mask="bias"), lambda batch, seq: (normal(batch, 8, WIDTH),), ({0: "batch"},)),
    _entry(Rotary, Expect(2, 4, causal=True, rotary=True)),
    _entry(RotaryInterleaved, Expect(2, 4, rotary=True)),
    _entry(WeightsRead, Expect(2, 4, named=("no-projection-out", "no-residual"))),
)
"""One entry per form."""
