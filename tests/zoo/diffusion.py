"""Diffusion and generative transformers: conditions that modulate, joint streams, skips, codebooks, masked decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Attention, Block, seeded

COUNT = SIDE * SIDE
LATENT = 4
"""Channels of the images that are denoised."""


class Timestep(nn.Module):
    """Sines and cosines of a step [B], then a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.register_buffer("rates", torch.exp(-torch.arange(WIDTH // 2) * 0.5))

    def forward(self, step: Tensor) -> Tensor:
        angles = step[:, None] * self.rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaptiveBlock(nn.Module):
    """DiT: shift, scale and gate of both branches from the condition; norms without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(approximate="tanh"), nn.Linear(32, WIDTH))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attention(modulated(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class Dit(nn.Module):
    """Patches of a noisy latent, a step, a class; back to pixels by a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step, self.label = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep(), nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList([AdaptiveBlock(), AdaptiveBlock()])
        self.out = nn.Linear(WIDTH, 4 * LATENT)

    def forward(self, latent: Tensor, step: Tensor, label: Tensor) -> Tensor:
        x = self.patches(latent).flatten(2).transpose(1, 2)
        c = self.step(step) + self.label(label)
        for block in self.blocks:
            x = block(x, c)
        y = self.out(x).reshape(-1, SIDE, SIDE, 2, 2, LATENT)
        return torch.einsum("nhwpqc->nchpwq", y).reshape(-1, LATENT, 2 * SIDE, 2 * SIDE)


class JointBlock(nn.Module):
    """MMDiT (SD 3, FLUX): text and image have weights of their own and one attention, queries and keys normed."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.q_norm, self.k_norm = (nn.ModuleList(nn.RMSNorm(DEPTH, eps=1e-6) for _ in range(2)) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(approximate="tanh"), nn.Linear(32, WIDTH)) for _ in range(2)
        )
        self.condition = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        streams, length, parts = [text, image], text.shape[1], []
        changes = [condition(F.silu(c)).chunk(4, -1) for condition in self.condition]
        for i, stream in enumerate(streams):
            x = modulated(self.norms[i](stream), *changes[i][:2])
            q, k, v = (p.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for p in self.qkv[i](x).chunk(3, -1))
            parts.append((self.q_norm[i](q), self.k_norm[i](k), v))
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts))
        joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for i, y in enumerate((joined[:, :length], joined[:, length:])):
            x = streams[i] + self.out[i](y)
            streams[i] = x + self.mlp[i](modulated(self.norms[2 + i](x), *changes[i][2:]))
        return streams[0], streams[1]


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep()
        self.blocks = nn.ModuleList([JointBlock(), JointBlock()])

    def forward(self, latent: Tensor, text: Tensor, step: Tensor) -> Tensor:
        image, c = self.patches(latent).flatten(2).transpose(1, 2), self.step(step)
        for block in self.blocks:
            text, image = block(text, image, c)
        return image


class SkipU(nn.Module):
    """U-ViT: the step is a token, early blocks are concatenated to late ones, a convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep()
        self.place = nn.Parameter(torch.randn(1, 1 + COUNT, WIDTH))
        self.down, self.middle, self.up = (Block(Attention()) for _ in range(3))
        self.skip, self.out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 4 * LATENT)
        self.last = nn.Conv2d(LATENT, LATENT, 3, padding=1)

    def forward(self, latent: Tensor, step: Tensor) -> Tensor:
        x = self.patches(latent).flatten(2).transpose(1, 2)
        early = self.down(torch.cat([self.step(step)[:, None], x], 1) + self.place)
        late = self.up(self.skip(torch.cat([self.middle(early), early], -1)))
        y = self.out(late[:, 1:]).reshape(-1, SIDE, SIDE, 2, 2, LATENT).permute(0, 5, 1, 3, 2, 4)
        return self.last(y.reshape(-1, LATENT, 2 * SIDE, 2 * SIDE))


class CrossBlock(AdaptiveBlock):
    """PixArt: one modulation for all blocks plus a table per block; text by cross attention, padded."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)
        self.q, self.kv, self.cross = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        del self.condition

    def forward(self, x: Tensor, text: Tensor, keep: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table[None] + c.reshape(-1, 6, WIDTH)).unbind(1)
        x = x + gate1[:, None] * self.attention(modulated(self.norm1(x), shift1, scale1))
        q = self.q(x).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = (1 - keep[:, None, None, :].to(x.dtype)) * -10000.0
        y = ((q @ k.transpose(-1, -2) * DEPTH**-0.5) + bias).softmax(-1) @ v
        x = x + self.cross(y.transpose(1, 2).flatten(2))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))


class PixArt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep()
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList([CrossBlock(), CrossBlock()])

    def forward(self, latent: Tensor, text: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        x, c = self.patches(latent).flatten(2).transpose(1, 2), self.condition(self.step(step))
        for block in self.blocks:
            x = block(x, text, mask, c)
        return x


class MaskedStep(nn.Module):
    """MaskGIT: one step of decoding; the most confident of the masked tokens become known, by top-k."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.place = nn.Embedding(33, WIDTH), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks, self.head = nn.Sequential(Block(Attention()), Block(Attention())), nn.Linear(WIDTH, 32)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.tokens(ids) + self.place))
        confidence, best = logits.softmax(-1).max(-1)
        unknown = ids == 32
        confidence = torch.where(unknown, confidence, torch.full_like(confidence, -1.0))
        threshold = confidence.topk(5, -1).values[:, -1:]
        return torch.where(unknown & (confidence >= threshold), best, ids)


class Codebook(nn.Module):
    """ViT-VQGAN: the nearest code by squared distances, an ArgMin and a look-up, then a transformer decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder, self.decoder = nn.Conv2d(3, WIDTH, 4, 4), Block(Attention()), Block(Attention())
        self.codes, self.up = nn.Embedding(24, WIDTH), nn.ConvTranspose2d(WIDTH, 3, 4, 4)

    def forward(self, image: Tensor) -> Tensor:
        z = self.encoder(self.patches(image).flatten(2).transpose(1, 2))
        codes = self.codes.weight
        distances = (z**2).sum(-1, keepdim=True) - 2 * z @ codes.t() + (codes**2).sum(-1)
        y = self.decoder(self.codes(distances.argmin(-1)))
        return self.up(y.transpose(1, 2).reshape(-1, WIDTH, 4, 4))


def _latent(batch: int) -> Tensor:
    return normal(batch, LATENT, 2 * SIDE, 2 * SIDE)


def _step(batch: int) -> Tensor:
    return torch.linspace(1.0, 40.0, batch)


def _text(batch: int, seq: int) -> Tensor:
    return normal(batch, seq, WIDTH)


def _keep(batch: int, seq: int) -> Tensor:
    return torch.ones(batch, seq, dtype=torch.int64)


def _masked(batch: int, seq: int) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 32, (batch, 16), generator=torch.Generator().manual_seed(batch))
    ids[:, ::2] = 32
    return (ids,)


SEQUENCE = {0: "batch", 1: "seq"}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "dit",
        seeded(Dit),
        ("latent", "step", "label"),
        lambda batch, seq: (_latent(batch), _step(batch), torch.arange(batch) % 10),
        (BATCH, BATCH, BATCH),
        Expect(2, 2, fused=True, named=("no-residual",)),
    ),
    Entry(
        "mmdit",
        seeded(Joint),
        ("latent", "text", "step"),
        lambda batch, seq: (_latent(batch), _text(batch, seq), _step(batch)),
        (BATCH, SEQUENCE, BATCH),
        Expect(2, 2, ffns=3, named=("attention-4d", "hidden-is-read-elsewhere", "no-residual")),
        torchscript="none",
    ),
    Entry(
        "uvit",
        seeded(SkipU),
        ("latent", "step"),
        lambda batch, seq: (_latent(batch), _step(batch)),
        (BATCH, BATCH),
        Expect(3, 2, fused=True, named=("no-residual",)),
    ),
    Entry(
        "pixart",
        seeded(PixArt),
        ("latent", "text", "mask", "step"),
        lambda batch, seq: (_latent(batch), _text(batch, seq), _keep(batch, seq), _step(batch)),
        (BATCH, SEQUENCE, SEQUENCE, BATCH),
        Expect(
            4,
            2,
            ffns=2,
            mask=("none", "padding", "none", "padding"),
            fused=(True, False, True, False),
            named=("no-residual",),
        ),
    ),
    Entry("maskgit", seeded(MaskedStep), ("ids",), _masked, (BATCH,), Expect(2, 2, fused=True)),
    Entry(
        "vqgan",
        seeded(Codebook),
        ("image",),
        lambda batch, seq: (normal(batch, 3, 16, 16),),
        (BATCH,),
        Expect(2, 2, fused=True),
    ),
)
"""DiT, MMDiT, U-ViT, PixArt, one step of MaskGIT, ViT-VQGAN."""
