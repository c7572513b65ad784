"""Further diffusion transformers: encoders shared by steps, experts in streams, places in two axes, videos, parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .diffusion import LATENT, AdaptiveBlock, JointBlock, Timestep, modulated
from .entry import Entry, Expect, normal
from .experts import Dense
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Attention, Block, seeded

COUNT = SIDE * SIDE
FRAMES = 3


class Decoupled(nn.Module):
    """DDT, TiUE: an encoder makes a condition of each token, once; decoder blocks of two steps are modulated by it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step, self.encoder = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep(), AdaptiveBlock()
        self.norm, self.attention = nn.LayerNorm(WIDTH, elementwise_affine=False), Attention()
        self.change, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def decode(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.change(F.silu(condition)).chunk(3, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, latent: Tensor, step: Tensor, later: Tensor) -> Tensor:
        x, c = self.patches(latent).flatten(2).transpose(1, 2), self.step(step)
        encoded = self.encoder(x, c)
        one = self.out(self.decode(x, encoded + c[:, None]))
        return self.out(self.decode(x - 0.1 * one, encoded + self.step(later)[:, None]))


class SingleStream(nn.Module):
    """FLUX, HunyuanVideo: text and image in one stream; attention and a feed-forward side by side, one projection in
    and one out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.change = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH + 32), nn.Linear(WIDTH + 32, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(DEPTH, eps=1e-6), nn.RMSNorm(DEPTH, eps=1e-6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.change(F.silu(c)).chunk(3, -1)
        qkv, hidden = torch.split(self.into(modulated(self.norm(x), shift, scale)), (3 * WIDTH, 32), -1)
        q, k, v = qkv.unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(2)
        return x + gate[:, None] * self.out(torch.cat([y, F.gelu(hidden, approximate="tanh")], 2))


class StreamsOfExperts(nn.Module):
    """HiDream: two streams, then one, with experts after each."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep()
        self.joint, self.single, self.experts = JointBlock(), SingleStream(), nn.ModuleList([Dense(), Dense()])

    def forward(self, latent: Tensor, text: Tensor, step: Tensor) -> Tensor:
        image, c = self.patches(latent).flatten(2).transpose(1, 2), self.step(step)
        text, image = self.joint(text, image, c)
        x = self.single(torch.cat([text, self.experts[0](image)], 1), c)
        return self.experts[1](x)[:, text.shape[1] :]


class RotatedInTwo(Attention):
    """FiT: half of each head turns with a token's row, half with its column, given as inputs; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(DEPTH), nn.LayerNorm(DEPTH)
        self.register_buffer("rates", torch.tensor([1.0, 0.1]))

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        angles = (places[..., None] * self.rates).flatten(2)[:, None]
        angles = torch.stack([angles, angles], -1).flatten(-2)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        return x * angles.cos() + turned * angles.sin()

    def forward(self, x: Tensor, places: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.split(x)
        q, k = self.turned(self.q_norm(q), places), self.turned(self.k_norm(k), places)
        y = F.scaled_dot_product_attention(q, k, v, keep[:, None, None] > 0)
        return self.proj(y.transpose(1, 2).flatten(2))


class FlexibleDit(nn.Module):
    """FiTv2: patches of images of any shape as a padded sequence; adaptive norms of low rank, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.step, self.out = nn.Linear(4 * LATENT, WIDTH), Timestep(), nn.Linear(WIDTH, 4 * LATENT)
        self.common, self.low = nn.Linear(WIDTH, 6 * WIDTH), nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(2))
        self.high = nn.ModuleList(nn.Linear(4, 6 * WIDTH) for _ in range(2))
        self.norm, self.mix = (
            nn.LayerNorm(WIDTH, elementwise_affine=False), nn.ModuleList(RotatedInTwo() for _ in range(2)),
        )  # fmt: skip
        self.gate, self.up, self.down = (
            nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((WIDTH, 32), (WIDTH, 32), (32, WIDTH))
        )

    def forward(self, patches: Tensor, places: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        x, c = self.into(patches), F.silu(self.step(step))
        for i, mix in enumerate(self.mix):
            parts = (self.common(c) + self.high[i](self.low[i](c))).chunk(6, -1)
            x = x + parts[2][:, None] * mix(modulated(self.norm(x), parts[0], parts[1]), places, mask)
            y = modulated(self.norm(x), parts[3], parts[4])
            x = x + parts[5][:, None] * self.down[i](F.silu(self.gate[i](y)) * self.up[i](y))
        return self.out(x) * mask[..., None]


class SpaceThenTime(nn.Module):
    """VDT, Phenaki: patches of a frame attend to each other, then each patch over the frames, causally or not."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step, self.out = (
            nn.Conv3d(LATENT, WIDTH, (1, 4, 4), (1, 4, 4)),
            Timestep(),
            nn.Linear(WIDTH, 4),
        )
        self.frame, self.space, self.time = nn.Embedding(FRAMES, WIDTH), AdaptiveBlock(), Block(Attention())

    def forward(self, video: Tensor, step: Tensor) -> Tensor:
        grid = self.patches(video).flatten(3).permute(0, 2, 3, 1)
        batch, frames, count, _ = grid.shape
        x = grid + self.frame(torch.arange(frames))[:, None]
        x = self.space(x.flatten(0, 1), self.step(step).repeat_interleave(frames, 0)).reshape(grid.shape)
        x = self.time(x.transpose(1, 2).flatten(0, 1)).reshape(batch, count, frames, WIDTH).transpose(1, 2)
        return self.out(x)


class PartsAndWhole(nn.Module):
    """PartCrafter: tokens of each part attend to their own, then to those of all parts; an embedding says which."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.part = nn.Linear(LATENT, WIDTH), nn.Embedding(4, WIDTH)
        self.own, self.all, self.step, self.out = AdaptiveBlock(), AdaptiveBlock(), Timestep(), nn.Linear(WIDTH, LATENT)

    def forward(self, parts: Tensor, step: Tensor) -> Tensor:
        batch, count, length, _ = parts.shape
        x, c = self.into(parts) + self.part(torch.arange(count))[:, None], self.step(step)
        x = self.own(x.flatten(0, 1), c.repeat_interleave(count, 0)).reshape(batch, count * length, WIDTH)
        return self.out(self.all(x, c)).reshape(parts.shape)


class MaskedRegression(nn.Module):
    """MAR: an encoder of the known tokens, a decoder of all, and a small diffusion network for each token's value."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.encoder, self.decoder = nn.Linear(LATENT, WIDTH), Block(Attention()), Block(Attention())
        self.masked, self.place = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.noisy, self.step, self.change = nn.Linear(LATENT, WIDTH), Timestep(), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * LATENT)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, known: Tensor, order: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        back, count = order.argsort(-1), known.shape[1]
        index = order[..., None].expand(-1, -1, WIDTH)
        place = self.place.expand(known.shape[0], -1, -1)
        x = self.encoder(self.into(known) + place.gather(1, index[:, :count]))
        rest = self.masked.expand(known.shape[0], order.shape[1] - count, -1)
        x = torch.cat([x, rest], 1).gather(1, back[..., None].expand(-1, -1, WIDTH))
        z = self.decoder(x + place) + self.step(step)[:, None]
        shift, scale, gate = self.change(F.silu(z)).chunk(3, -1)
        y = self.noisy(noise)
        return self.out(y + gate * self.mlp(self.norm(y) * (1 + scale) + shift))


def _latent(batch: int) -> Tensor:
    return normal(batch, LATENT, 2 * SIDE, 2 * SIDE)


def _step(batch: int) -> Tensor:
    return torch.linspace(1.0, 40.0, batch)


def _padded(batch: int, seq: int) -> tuple[Tensor, ...]:
    places = torch.stack([torch.arange(seq) // 3, torch.arange(seq) % 3], -1).float().expand(batch, -1, -1)
    return normal(batch, seq, 4 * LATENT), places, torch.ones(batch, seq), _step(batch)


def _order(batch: int, seq: int) -> tuple[Tensor, ...]:
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    return normal(batch, 6, LATENT), order, normal(batch, 16, LATENT), _step(batch)


ALONE = ("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out")
SEQUENCE = {0: "batch", 1: "seq"}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "ddt",
        seeded(Decoupled),
        ("latent", "step", "later"),
        lambda batch, seq: (_latent(batch), _step(batch), _step(batch) / 2),
        (BATCH,) * 3,
        Expect(3, 2, fused=True, named=("no-residual",)),
    ),
    Entry(
        "hidream",
        seeded(StreamsOfExperts),
        ("latent", "text", "step"),
        lambda batch, seq: (_latent(batch), normal(batch, 5, WIDTH), _step(batch)),
        (BATCH,) * 3,
        Expect(2, 2, named=(*ALONE, "attention-4d", "hidden-is-read-elsewhere", "no-residual", "stacked-weights")),
        torchscript="none",
    ),
    Entry(
        "fit_v2",
        seeded(FlexibleDit),
        ("patches", "places", "mask", "step"),
        _padded,
        (SEQUENCE, SEQUENCE, SEQUENCE, BATCH),
        Expect(2, 2, mask="padding", named=("hidden-is-read-elsewhere", "no-residual")),
    ),
    Entry(
        "vdt",
        seeded(SpaceThenTime),
        ("video", "step"),
        lambda batch, seq: (normal(batch, LATENT, FRAMES, 16, 16), _step(batch)),
        (BATCH, BATCH),
        Expect(2, 2, fused=True, named=("no-residual",)),
    ),
    Entry(
        "part_crafter",
        seeded(PartsAndWhole),
        ("parts", "step"),
        lambda batch, seq: (normal(batch, 3, 6, LATENT), _step(batch)),
        (BATCH, BATCH),
        Expect(2, 2, fused=True, named=("no-residual",)),
    ),
    Entry(
        "mar",
        seeded(MaskedRegression),
        ("known", "order", "noise", "step"),
        _order,
        (BATCH,) * 4,
        Expect(2, 2, ffns=3, fused=True, named=("no-residual",)),
    ),
)
"""DDT and TiUE, FLUX and HiDream, FiTv2, VDT, PartCrafter, MAR."""
