"""Several modalities in one model, and models that generate in unusual ways: cameras and depth, actions, flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .diffusion import LATENT, Timestep, modulated
from .entry import Entry, Expect, ids, normal
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Across, Attention, Block, seeded

VOCAB = 32
SEQUENCE = {0: "batch", 1: "seq"}


class AtPlaces(nn.Module):
    """DeepInteraction: a token of one sensor attends to the few places of the other's map that it is projected on."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, grid: Tensor, places: Tensor) -> Tensor:
        """x [B, N, C]; grid [B, C, H, W]; places [B, N, K, 2] from -1 to 1."""
        near = F.grid_sample(grid, places, align_corners=False).permute(0, 2, 3, 1)
        q = self.q(x).unflatten(-1, (HEADS, DEPTH))[:, :, :, None]
        k, v = (part(near).unflatten(-1, (HEADS, DEPTH)).transpose(2, 3) for part in (self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(DEPTH)).softmax(-1)
        return self.out((weights @ v).squeeze(3).flatten(2))


class TwoSensors(nn.Module):
    """Camera and lidar stay apart, each asks the other; object queries then ask both in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.camera, self.lidar = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(4, WIDTH, 3, padding=1)
        self.near, self.norm = AtPlaces(), nn.LayerNorm(WIDTH)
        self.queries, self.among = nn.Parameter(torch.randn(1, 5, WIDTH)), Block(Attention())
        self.asks, self.box = nn.ModuleList(Across() for _ in range(2)), nn.Linear(WIDTH, 7)

    def forward(self, image: Tensor, lidar: Tensor, places: Tensor) -> Tensor:
        seen, above = self.camera(image), self.lidar(lidar).flatten(2).transpose(1, 2)
        above = above + self.near(self.norm(above), seen, places)
        x = self.among(self.queries.expand(image.shape[0], -1, -1))
        for ask, memory in zip(self.asks, (above, seen.flatten(2).transpose(1, 2))):
            x = x + ask(x, memory)
        return self.box(x)


class Causal(Attention):
    """Each token sees itself and those before it."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Asymmetric(Attention):
    """TwinBrainVLA: the tokens of the right brain see the left brain's keys and values beside their own."""

    def forward(self, x: Tensor, k_left: Tensor, v_left: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = torch.cat([k_left, k], 2), torch.cat([v_left, v], 2)
        return self.proj(self.weigh(q, k, v).transpose(1, 2).reshape(x.shape))


class TwinBrain(nn.Module):
    """A causal language model that stays as it is, a second that also reads states, an expert that denoises actions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.state, self.action = nn.Embedding(VOCAB, WIDTH), nn.Linear(6, WIDTH), nn.Linear(4, WIDTH)
        self.left, self.right, self.step = Block(Causal()), Block(Asymmetric()), Timestep()
        self.norm, self.expert, self.cross = nn.LayerNorm(WIDTH), Block(Attention()), Across()
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, words: Tensor, state: Tensor, actions: Tensor, step: Tensor) -> Tensor:
        said = self.table(words)
        _, k, v = self.left.mix.split(self.left.norm(said))
        seen = torch.cat([self.left(said), self.right(self.state(state)[:, None], k, v)], 1)
        x = self.expert(self.action(actions) + self.step(step)[:, None])
        return self.out(x + self.cross(self.norm(x), seen))


class ExpertsChoose(nn.Module):
    """Each expert takes the tokens that like it best; a token may go to none."""

    def __init__(self, taken: int) -> None:
        super().__init__()
        self.taken, self.router = taken, nn.Linear(WIDTH, 3, bias=False)
        self.up, self.down = (nn.Parameter(0.2 * torch.randn(3, *shape)) for shape in ((WIDTH, 32), (32, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        weights, places = self.router(x).softmax(-1).transpose(1, 2).topk(self.taken, -1)
        where = places.flatten(1)[..., None].expand(-1, -1, WIDTH)
        chosen = x.gather(1, where).reshape(-1, 3, self.taken, WIDTH)
        y = F.gelu(chosen @ self.up) @ self.down * weights[..., None]
        return x + torch.zeros_like(x).scatter_add(1, where, y.flatten(1, 2))


class MicroBudget(nn.Module):
    """A mixer sees all patches, the diffusion transformer those that a mask keeps; experts choose their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.step, self.mixer = nn.Conv2d(LATENT, WIDTH, 2, 2), Timestep(), Block(Attention())
        self.norm, self.mix, self.change = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, 3 * WIDTH)
        self.experts, self.gap, self.out = ExpertsChoose(6), nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, 16)

    def forward(self, latent: Tensor, step: Tensor, kept: Tensor) -> Tensor:
        x = self.mixer(self.patches(latent).flatten(2).transpose(1, 2))
        where = kept[..., None].expand(-1, -1, WIDTH)
        shift, scale, gate = self.change(F.silu(self.step(step))).chunk(3, -1)
        y = x.gather(1, where)
        y = self.experts(y + gate[:, None] * self.mix(modulated(self.norm(y), shift, scale)))
        return self.out(self.gap.expand(x.shape).scatter(1, where, y))


class Within(Attention):
    """Attention to the tokens of one's own modality."""

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        q, k, v = self.split(x)
        keep = (kind[:, :, None] == kind[:, None])[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class ManyModalities(nn.Module):
    """4M: tokens of any modality go in, tokens of others are asked for; those see the input and their own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kinds, self.places = (nn.Embedding(count, WIDTH) for count in (VOCAB, 3, 64))
        self.encoder, self.decoder, self.cross = Block(Attention()), Block(Within()), Across()
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, kinds: Tensor, asked: Tensor, asked_kinds: Tensor) -> Tensor:
        given = self.encoder(self.table(tokens) + self.kinds(kinds))
        x = self.decoder(self.places(asked) + self.kinds(asked_kinds), asked_kinds)
        x = x + self.cross(self.norms[0](x), self.norms[1](given))
        return self.head(x).argmax(-1)


class Coupling(nn.Module):
    """One half of the channels scales and moves the other, as a transformer on the first says."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.block, self.out = nn.Linear(6, WIDTH), Block(Attention()), nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two = x.chunk(2, -1)
        shift, raw = self.out(self.block(self.into(one))).chunk(2, -1)
        scale = torch.sigmoid(raw + 2.0)
        return torch.cat([(two + shift) * scale, one], -1), torch.log(scale).sum((1, 2))


class Flow(nn.Module):
    """JetFormer: patches become numbers by a flow; a causal model behind words gives each a mixture of Gaussians."""

    MIXTURE = 3

    def __init__(self) -> None:
        super().__init__()
        self.flows, self.table = nn.ModuleList([Coupling(), Coupling()]), nn.Embedding(VOCAB, WIDTH)
        self.into, self.block, self.start = (
            nn.Linear(12, WIDTH),
            Block(Causal()),
            nn.Parameter(torch.randn(1, 1, WIDTH)),
        )
        self.head = nn.Linear(WIDTH, self.MIXTURE * (2 * 12 + 1))

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        x = F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)
        logdet = torch.zeros(x.shape[0])
        for flow in self.flows:
            x, change = flow(x)
            logdet = logdet + change
        start = self.start.expand(x.shape[0], -1, -1)
        y = self.block(torch.cat([self.table(words), start, self.into(x)[:, :-1]], 1))[:, -x.shape[1] :]
        raw, means, scales = self.head(y).split([self.MIXTURE, 12 * self.MIXTURE, 12 * self.MIXTURE], -1)
        means, scales = means.unflatten(-1, (-1, 12)), F.softplus(scales).unflatten(-1, (-1, 12)) + 1e-2
        each = -0.5 * ((x[:, :, None] - means) / scales).square() - scales.log() - 0.5 * math.log(2 * math.pi)
        return (raw.log_softmax(-1) + each.sum(-1)).logsumexp(-1).sum(1) + logdet


class Cloze(Attention):
    """Each place sees all but itself; its query is the place alone."""

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        count = x.shape[1]
        q, (_, k, v) = self.split(x)[0], self.split(words)
        scores = q @ k.transpose(-2, -1) * self.scale
        scores = scores.masked_fill(torch.eye(count) > 0, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class ReadAgain(nn.Module):
    """ABINet: places of letters ask the image; a language model fills each from its neighbours; gated, twice."""

    LENGTH = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sees = nn.Conv2d(3, WIDTH, 2, 2), Block(Attention())
        self.places, self.ask = nn.Parameter(torch.randn(1, self.LENGTH, WIDTH)), Across()
        self.embed, self.language = nn.Linear(VOCAB, WIDTH, bias=False), Block(Cloze())
        self.gate, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, image: Tensor) -> Tensor:
        x = self.sees(self.stem(image).flatten(2).transpose(1, 2))
        places = self.places.expand(image.shape[0], -1, -1)
        seen = self.ask(places, x)
        logits = self.head(seen)
        for _ in range(2):
            read = self.language(places, self.embed(logits.softmax(-1)))
            gate = torch.sigmoid(self.gate(torch.cat([read, seen], -1)))
            logits = self.head(gate * seen + (1 - gate) * read)
        return logits


def _kinds(batch: int, seq: int, shift: int) -> Tensor:
    return (torch.arange(seq)[None] + torch.arange(batch)[:, None] + shift) % 3


def _kept(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.stack([torch.randperm(SIDE * SIDE, generator=generator)[:16] for _ in range(batch)])


PICTURES: tuple[Entry, ...] = (
    Entry(
        "deep_interaction",
        seeded(TwoSensors),
        ("image", "lidar", "places"),
        lambda batch, seq: (
            normal(batch, 3, 2 * SIDE, 2 * SIDE), normal(batch, 4, SIDE, SIDE), normal(batch, SIDE * SIDE, 3, 2).tanh(),
        ),
        (BATCH, BATCH, BATCH),
        Expect(4, 2, ffns=1),
    ),
    Entry(
        "micro_budget",
        seeded(MicroBudget),
        ("latent", "step", "kept"),
        lambda batch, seq: (
            normal(batch, LATENT, 2 * SIDE, 2 * SIDE), torch.linspace(1.0, 40.0, batch), _kept(batch),
        ),
        (BATCH, BATCH, BATCH),
        Expect(2, 2, ffns=1, fused=True, named=("no-residual", "stacked-weights")),
    ),
    Entry(
        "abinet",
        seeded(ReadAgain),
        ("image",),
        lambda batch, seq: (normal(batch, 3, SIDE, 4 * SIDE),),
        (BATCH,),
        Expect(4, 2, ffns=3, named=("no-projection-q", "no-residual")),
        torchscript="static",
    ),
)  # fmt: skip
SEQUENCES: tuple[Entry, ...] = (
    Entry(
        "twin_brain",
        seeded(TwinBrain),
        ("words", "state", "actions", "step"),
        lambda batch, seq: (
            ids(batch, seq, VOCAB), normal(batch, 6), normal(batch, 5, 4), torch.linspace(0.0, 1.0, batch),
        ),
        (SEQUENCE, BATCH, BATCH, BATCH),
        Expect(4, 2, ffns=3, named=("no-projection-k", "no-projection-v", "no-residual")),
    ),
    Entry(
        "four_m",
        seeded(ManyModalities),
        ("tokens", "kinds", "asked", "asked_kinds"),
        lambda batch, seq: (
            ids(batch, seq, VOCAB), _kinds(batch, seq, 0), ids(batch, seq + 2, 64), _kinds(batch, seq + 2, 1),
        ),
        (SEQUENCE, SEQUENCE, {0: "batch", 1: "asked"}, {0: "batch", 1: "asked"}),
        Expect(3, 2, ffns=2),
    ),
    Entry(
        "jetformer",
        seeded(Flow),
        ("words", "image"),
        lambda batch, seq: (ids(batch, seq, VOCAB), normal(batch, 3, SIDE, SIDE)),
        (SEQUENCE, BATCH),
        Expect(3, 2),
    ),
)  # fmt: skip
"""DeepInteraction, micro-budget diffusion, ABINet; TwinBrainVLA, 4M, JetFormer."""
