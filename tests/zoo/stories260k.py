"""stories260K: a trained Llama of 260 K parameters (grouped queries, interleaved rotary, SwiGLU), read from llama2.c's
format.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, ids

EPSILON = 1e-5


class Attention(nn.Module):
    """Causal self-attention; ``kv_heads`` key heads are shared by groups of query heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.depth = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.depth, bias=False)
        self.v = nn.Linear(width, kv_heads * self.depth, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = rotate(self.q(x).view(batch, length, self.heads, self.depth), cos, sin).transpose(1, 2)
        k = rotate(self.k(x).view(batch, length, self.kv_heads, self.depth), cos, sin).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv_heads, self.depth).transpose(1, 2)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs; x is [B,S,H,d], cos and sin are [S,d/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Block(nn.Module):
    """Attention, then a gated feed-forward, each on a normed residual stream."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, kv_heads)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(width, eps=EPSILON) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        normed = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Stories(nn.Module):
    """int64 [batch, seq] token ids -> logits [batch, seq, vocabulary]; the head is tied to the embedding."""

    def __init__(self, width: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width, hidden, heads, kv_heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        depth = width // heads
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, depth, 2).float() / depth))

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1])[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x) @ self.embedding.weight.t()


def load(folder: Path) -> Stories:
    """The trained model of ``folder``/stories260K.bin."""
    data = (folder / "stories260K.bin").read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, _ = struct.unpack("<7i", data[:28])
    model = Stories(width, hidden, layers, heads, kv_heads, vocabulary).eval()
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    order = [
        [model.embedding],
        [b.attention_norm for b in blocks], [b.attention.q for b in blocks], [b.attention.k for b in blocks],
        [b.attention.v for b in blocks], [b.attention.o for b in blocks], [b.ffn_norm for b in blocks],
        [b.gate for b in blocks], [b.down for b in blocks], [b.up for b in blocks], [model.norm],
    ]  # fmt: skip
    numbers, place = np.frombuffer(data, "<f4", offset=28), 0
    for module in (module for group in order for module in group):
        size = module.weight.numel()
        module.weight.data = torch.from_numpy(numbers[place : place + size].copy()).view(module.weight.shape)
        place += size
    return model


class Tokenizer:
    """llama2.c's byte-pair encoding with ``folder``/tok512.bin: the best-scored merge first; bytes are a fallback."""

    def __init__(self, folder: Path) -> None:
        data, place = (folder / "tok512.bin").read_bytes(), 4
        self.pieces: dict[bytes, tuple[int, float]] = {}
        while place < len(data):
            score, length = struct.unpack_from("<fi", data, place)
            piece = data[place + 8 : place + 8 + length]
            self.pieces.setdefault(piece, (len(self.pieces), score))
            place += 8 + length

    def encode(self, text: str) -> list[int]:
        """Ids with the beginning-of-sequence mark 1 in front."""
        parts = [letter.encode() for letter in " " + text]
        while True:
            pairs = [
                (self.pieces[a + b][1], -i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in self.pieces
            ]
            if not pairs:
                break
            place = -max(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        known = ([self.pieces[p][0]] if p in self.pieces else [byte + 3 for byte in p] for p in parts)
        return [1, *(number for group in known for number in group)]


def stories(folder: Path, first: int, last: int) -> list[str]:
    """Stories ``first`` to ``last`` (exclusive) of tinystories_sample.txt."""
    texts = (folder / "tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    return [text.strip() for text in texts[first:last]]


def _tiny(attention: str) -> nn.Module:
    torch.manual_seed(0)
    return Stories(32, 48, 2, 4, 2, 99).eval()


TINY = Entry(
    "stories",
    _tiny,
    ("ids",),
    lambda batch, seq: (ids(batch, seq, 99),),
    ({0: "batch", 1: "seq"},),
    Expect(2, 4, 2, causal=True, rotary=True),
    torchscript="none",
)
"""The same architecture with random weights."""
