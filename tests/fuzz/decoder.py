"""A decoder layer with a key-value cache, as plain torch code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, KV_HEADS, DEPTH = 99, 32, 4, 2, 8


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """ids [B,S], cached keys and values [B,2,P,8] -> logits [B,S,99], keys and values [B,2,P+S,8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2, self.norm3 = Rms(), Rms(), Rms()
        self.q, self.out = nn.Linear(WIDTH, HEADS * DEPTH, bias=False), nn.Linear(HEADS * DEPTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * DEPTH, bias=False), nn.Linear(WIDTH, KV_HEADS * DEPTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.down, self.head = nn.Linear(48, WIDTH, bias=False), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def rotate(self, x: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[2]).float()
        angles = places[:, None] * 10000.0 ** (-torch.arange(0, DEPTH, 2, dtype=torch.float32) / DEPTH)
        angles = torch.cat([angles, angles], -1)
        half = torch.cat([-x[..., DEPTH // 2 :], x[..., : DEPTH // 2]], -1)
        return x * angles.cos() + half * angles.sin()

    def forward(self, ids: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(ids)
        batch, length = ids.shape
        past = past_key.shape[2]
        normed = self.norm1(x)
        q = self.q(normed).view(batch, length, HEADS, DEPTH).transpose(1, 2)
        k = self.k(normed).view(batch, length, KV_HEADS, DEPTH).transpose(1, 2)
        v = self.v(normed).view(batch, length, KV_HEADS, DEPTH).transpose(1, 2)
        q, k = self.rotate(q, past), self.rotate(k, past)
        key, value = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        total = past + length
        shape = (batch, KV_HEADS, HEADS // KV_HEADS, total, DEPTH)
        keys, values = (t[:, :, None].expand(shape).reshape(batch, HEADS, total, DEPTH) for t in (key, value))
        scores = q @ keys.transpose(2, 3) / DEPTH**0.5
        allowed = torch.arange(total)[None, :] <= torch.arange(past, total)[:, None]
        scores = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
        y = (torch.softmax(scores, -1) @ values).transpose(1, 2).reshape(batch, length, HEADS * DEPTH)
        x = x + self.out(y)
        normed = self.norm2(x)
        x = x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return self.head(self.norm3(x)), key, value
