"""Speech, sound and long sequences: convolutions beside attention, limited context, recurrences, codebooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Axes, Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, WIDTH, Attention, Block, seeded

BANDS = 8
FRAMES: Axes = {0: "batch", 1: "seq"}


class Spectrum(nn.Module):
    """Frames [B, T, bands] -> blocks -> [B, T, C]."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(BANDS, WIDTH), nn.Sequential(*blocks)

    def forward(self, frames: Tensor) -> Tensor:
        return self.blocks(self.first(frames))


class Convolution(nn.Module):
    """The convolution module of a Conformer: a gate, a depthwise convolution, a norm over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.near, self.scale = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.up(self.norm(x).transpose(1, 2)), 1)
        return x + self.down(F.silu(self.scale(self.near(y)))).transpose(1, 2)


class HalfStep(nn.Module):
    """A feed-forward network of which half is added."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.ffn(x)


class RelativeShift(Attention):
    """Transformer-XL and Conformer: biases on the queries, and a term of positions that is shifted into place."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(WIDTH, WIDTH, bias=False)
        self.content, self.place = (nn.Parameter(torch.randn(HEADS, 1, DEPTH)) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.split(self.norm(x))
        angles = torch.arange(length - 1, -length, -1.0)[:, None] * self.rates
        p = self.position(torch.cat([angles.sin(), angles.cos()], -1)).unflatten(-1, (HEADS, DEPTH)).transpose(0, 1)
        scores = (q + self.place) @ p.transpose(-1, -2)
        padded = F.pad(scores, (1, 0)).reshape(batch, HEADS, 2 * length, length)
        shifted = padded[:, :, 1:].reshape(batch, HEADS, length, 2 * length - 1)[..., :length]
        weights = (((q + self.content) @ k.transpose(-1, -2) + shifted) * self.scale).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))


class Banded(Attention):
    """Transformer Transducer, CarelessWhisper: few frames ahead, a limited number behind."""

    behind, ahead = 4, 1

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        distance = places[None, :] - places[:, None]
        shown = (distance <= self.ahead) & (distance >= -self.behind)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown)


class Chunked(Banded):
    """Streaming in chunks: all frames of the own chunk and of those before."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunk = torch.arange(q.shape[2]) // 3
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chunk[None, :] <= chunk[:, None])


class Reused(nn.Module):
    """Zipformer: weights are computed once and used by two attentions and a gated one; a bypass mixes in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qk = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.values, self.outs = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))
        self.gate, self.bypass = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        first, y = x, self.norm(x)
        q, k = (part.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for part in self.qk(y).chunk(2, -1))
        weights = (q @ k.transpose(-1, -2) * DEPTH**-0.5).softmax(-1)
        for i in range(2):
            v = self.values[i](x).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)
            mixed = (weights @ v).transpose(1, 2).flatten(2)
            x = x + self.outs[i](mixed * torch.tanh(self.gate(y)) if i else mixed)
        x = x + self.ffn(x)
        return first + (x - first) * self.bypass


class HalfRate(nn.Module):
    """Zipformer: pairs of frames are joined, a block runs, every frame is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weights = Reused(), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        padded = F.pad(x, (0, 0, 0, 1))[:, : (length + 1) // 2 * 2]
        pairs = padded.reshape(x.shape[0], -1, 2, WIDTH)
        y = self.inner((pairs * self.weights.softmax(0)[:, None]).sum(2))
        return x + y.repeat_interleave(2, 1)[:, :length]


class IntegrateAndFire(nn.Module):
    """Paraformer: weights of frames are summed up; what a token has is the frames at which its number is passed."""

    tokens = 5

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.weight = Block(Attention()), nn.Linear(WIDTH, 1)
        self.first, self.decoder, self.head = nn.Linear(BANDS, WIDTH), Block(Attention()), nn.Linear(WIDTH, 20)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.encoder(self.first(frames))
        alpha = torch.sigmoid(self.weight(x)).squeeze(-1)
        total = (alpha / alpha.sum(1, keepdim=True) * self.tokens).cumsum(1)
        before = F.pad(total, (1, 0))[:, :-1]
        slots = torch.arange(self.tokens, dtype=x.dtype)[:, None]
        share = (total[:, None].minimum(slots + 1) - before[:, None].maximum(slots)).clamp(min=0.0)
        return self.head(self.decoder(share @ x))


class Codec(nn.Module):
    """EnCodec: strided convolutions, an LSTM, residual codebooks, and the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(1, WIDTH, 8, 4, 2), nn.ConvTranspose1d(WIDTH, 1, 8, 4, 2)
        self.memory, self.codes = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Parameter(torch.randn(3, 12, WIDTH))

    def forward(self, wave: Tensor) -> Tensor:
        x = F.elu(self.down(wave)).transpose(1, 2)
        rest = x + self.memory(x)[0]
        total = torch.zeros_like(rest)
        for codes in self.codes.unbind(0):
            distance = (rest**2).sum(-1, keepdim=True) - 2 * rest @ codes.t() + (codes**2).sum(-1)
            found = codes[distance.argmin(-1)]
            rest, total = rest - found, total + found
        return self.up(total.transpose(1, 2))


class Sequencer(nn.Module):
    """Sequencer: an LSTM in both directions in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(WIDTH, 8, batch_first=True, bidirectional=True), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Legendre(nn.Module):
    """LMUFormer: a linear memory of fixed matrices, as the convolution with its response; a gated convolution."""

    def __init__(self, order: int = 4, longest: int = 16) -> None:
        super().__init__()
        n = torch.arange(order)
        a = (2 * n[:, None] + 1.0) * torch.where(n[:, None] < n[None], -1.0, (-1.0) ** (n[:, None] - n[None] + 1))
        step = torch.matrix_exp(a / longest)
        state, found = ((2 * n + 1.0) * (-1.0) ** n / longest)[:, None], []
        for _ in range(longest):
            found.append(state)
            state = step @ state
        self.register_buffer("response", torch.cat(found, 1).flip(1)[:, None])
        self.longest, self.into = longest, nn.Linear(WIDTH, 1)
        self.out = nn.Linear(order + WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.into(x)).transpose(1, 2)
        memory = F.conv1d(F.pad(u, (self.longest - 1, 0)), self.response).transpose(1, 2)
        return F.relu(self.out(torch.cat([memory, x], -1)))


class GatedSingleHead(nn.Module):
    """MossFormer: one head of squared ReLU within chunks, linear attention over all, gates."""

    chunk = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gates, self.small = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, DEPTH)
        self.scales, self.shifts = nn.Parameter(torch.rand(4, DEPTH)), nn.Parameter(torch.rand(4, DEPTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)
        u, v = F.silu(self.gates(y)).chunk(2, -1)
        z = F.silu(self.small(y))[..., None, :] * self.scales + self.shifts
        near_q, near_k, far_q, far_k = z.unbind(2)
        groups = length // self.chunk
        q, k, w = (part.reshape(batch, groups, self.chunk, -1) for part in (near_q, near_k, v))
        near = F.relu(q @ k.transpose(-1, -2) / self.chunk) ** 2 @ w
        far = far_q @ (far_k.transpose(1, 2) @ v) / length
        return x + self.out(u * (near.reshape(batch, length, -1) + far))


class Retention(Attention):
    """RetNet: decay by distance on the scores, no softmax; a norm of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads_norm = nn.GroupNorm(HEADS, WIDTH)
        self.register_buffer("rates", torch.tensor([0.9, 0.7])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        places = torch.arange(x.shape[1])
        distance = places[:, None] - places[None]
        decay = torch.where(distance >= 0, self.rates ** distance.clamp(min=0), 0.0)
        y = (q @ k.transpose(-1, -2) * self.scale * decay) @ v
        return self.proj(self.heads_norm(y.transpose(1, 2).flatten(0, 1).flatten(1)).reshape(x.shape))


class Recurrence(nn.Module):
    """A gated linear recurrence along the sequence by cumulative sums of logarithms (Mamba, RecurrentGemma)."""

    def __init__(self) -> None:
        super().__init__()
        self.keep, self.into, self.gate, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        log = F.logsigmoid(self.keep(x)).cumsum(1)
        added = torch.sigmoid(self.into(x)) * x
        state = (added * (-log).exp()).cumsum(1) * log.exp()
        return self.out(state * F.silu(self.gate(x)))


class DualPath(nn.Module):
    """Dual-path models of separation: within chunks, then across them."""

    chunk = 4

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = Block(inner), Block(outer)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        grid = self.inner(x.reshape(-1, self.chunk, width)).reshape(batch, -1, self.chunk, width).transpose(1, 2)
        grid = self.outer(grid.reshape(batch * self.chunk, -1, width)).reshape(batch, self.chunk, -1, width)
        return grid.transpose(1, 2).reshape(batch, length, width)


class Inverted(nn.Module):
    """iTransformer: each variable of the series is a token, its whole past the features."""

    past, future = 12, 4

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(self.past, WIDTH), nn.Sequential(Block(Attention()), Block(Attention()))
        self.head = nn.Linear(WIDTH, self.future)

    def forward(self, series: Tensor) -> Tensor:
        mean, deviation = series.mean(1, keepdim=True), series.std(1, keepdim=True, unbiased=False) + 1e-5
        x = self.embed(((series - mean) / deviation).transpose(1, 2))
        return self.head(self.blocks(x)).transpose(1, 2) * deviation + mean


class Smoothed(nn.Module):
    """xPatch: an exponential average splits trend and season; patches by unfolding, depthwise convolutions."""

    past, future = 12, 4

    def __init__(self) -> None:
        super().__init__()
        powers = 0.7 ** torch.arange(self.past - 1, -1, -1.0)
        rows = torch.arange(self.past)
        matrix = torch.where(rows[:, None] >= rows[None], 0.3 * 0.7 ** (rows[:, None] - rows[None]).clamp(min=0), 0.0)
        matrix[:, 0] = powers.flip(0)
        self.register_buffer("average", matrix)
        self.trend, self.embed = nn.Linear(self.past, self.future), nn.Linear(4, 16)
        self.near, self.head = nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.Linear(80, self.future)

    def forward(self, series: Tensor) -> Tensor:
        x = series.transpose(1, 2)
        trend = x @ self.average.t()
        patches = F.gelu(self.embed((x - trend).unfold(-1, 4, 2)))
        season = self.near(patches.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(2)
        return (self.trend(trend) + self.head(season)).transpose(1, 2)


def _frames(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (normal(batch, seq, BANDS),)


def _whole(batch: int, seq: int) -> tuple[Tensor, ...]:
    """A length that chunks of four divide."""
    return (normal(batch, 16, BANDS),)


def _spoken(name: str, *blocks: type[nn.Module], expect: Expect, whole: bool = False, **options: str) -> Entry:
    feeds, axes = (_whole, BATCH) if whole else (_frames, FRAMES)
    make = seeded(lambda: Spectrum(*(block() for block in blocks)))
    return Entry(name, make, ("frames",), feeds, (axes,), expect, **options)  # type: ignore[arg-type]


def _mixed(name: str, mix: type[nn.Module], expect: Expect, **options: str) -> Entry:
    make = seeded(lambda: Spectrum(Block(mix()), Block(mix())))
    return Entry(name, make, ("frames",), _frames, (FRAMES,), expect, **options)  # type: ignore[arg-type]


def _series(name: str, make: type[nn.Module], expect: Expect, **options: str) -> Entry:
    feeds = lambda batch, seq: (normal(batch, 12, 3),)  # noqa: E731
    return Entry(name, seeded(make), ("series",), feeds, (BATCH,), expect, **options)  # type: ignore[arg-type]


ENTRIES: tuple[Entry, ...] = (
    _spoken("conformer", HalfStep, RelativeShift, Convolution, HalfStep, expect=Expect(1, 2, ffns=2, mask="bias")),
    _mixed("transducer", Banded, Expect(2, 2, mask="bias", fused=True)),
    _mixed("streaming", Chunked, Expect(2, 2, mask="bias", fused=True)),
    _spoken("zipformer", Reused, HalfRate, expect=Expect(0, 2, ffns=2, named=("weights-read-elsewhere",))),
    Entry("paraformer", seeded(IntegrateAndFire), ("frames",), _frames, (FRAMES,), Expect(2, 2, fused=True)),
    Entry(
        "encodec",
        seeded(Codec),
        ("wave",),
        lambda batch, seq: (normal(batch, 1, 8 * seq),),
        ({0: "batch", 2: "samples"},),
        Expect(0, 2),
    ),
    _mixed("sequencer", Sequencer, Expect(0, 2, ffns=2)),
    _mixed("lmuformer", Legendre, Expect(0, 2, ffns=2)),
    _spoken(
        "mossformer",
        GatedSingleHead,
        GatedSingleHead,
        expect=Expect(
            0,
            2,
            named=(
                "linear-attention",
                "no-softmax",
            ),
        ),
        whole=True,
    ),
    _mixed("retnet", Retention, Expect(0, 2, ffns=2, named=("no-softmax",))),
    _mixed("recurrence", Recurrence, Expect(0, 2, ffns=2)),
    Entry(
        "dual_path",
        seeded(lambda: Spectrum(DualPath(Recurrence(), Attention()))),
        ("frames",),
        _whole,
        (BATCH,),
        Expect(1, 2, ffns=2, fused=True),
    ),
    _series("itransformer", Inverted, Expect(2, 2, fused=True)),
    _series("xpatch", Smoothed, Expect(0, 2), torchscript="none"),
)
"""Conformer, transducers, Zipformer, Paraformer, EnCodec, Sequencer, LMUFormer, MossFormer, RetNet, gated recurrences,
dual-path models, iTransformer, xPatch.
"""
