"""Tokens that are chosen, pooled and handed on: policies, queues of objects, contexts made short, bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Across, Attention, Block, images, seeded
from .spans import Shown

COUNT = SIDE * SIDE
OBJECTS = 6
SEGMENT = 4


def taken(x: Tensor, places: Tensor) -> Tensor:
    """[B, N, C] at places [B, K] -> [B, K, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


class Policy(nn.Module):
    """IA-RED2: the patches that a small network over heads scores highest go on; the others are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first, self.last = nn.Conv2d(3, WIDTH, 2, 2), Block(Attention()), Block(Attention())
        self.patch, self.whole, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(self.patches(image).flatten(2).transpose(1, 2))
        patch = self.patch(x).unflatten(-1, (HEADS, DEPTH))
        whole = self.whole(x.mean(1, keepdim=True)).unflatten(-1, (HEADS, DEPTH))
        scores = torch.sigmoid((patch * whole).sum(-1)).mean(-1)
        return self.head(self.last(taken(x, scores.topk(COUNT // 2, -1).indices)).mean(1))


class Foreground(nn.Module):
    """ToC3D and StreamPETR: queries of the last frame, moved by the motion since, say which tokens are foreground;
    those take the full block, the others a light one, and all go back in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.full, self.head = nn.Conv2d(3, WIDTH, 2, 2), Block(Attention()), nn.Linear(WIDTH, 4)
        self.light = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), nn.GELU(), nn.Linear(4, WIDTH))
        self.motion, self.place = nn.Linear(12, 2 * WIDTH), nn.Linear(3, WIDTH)
        self.norm, self.attend, self.queries = nn.LayerNorm(WIDTH), Across(), nn.Parameter(torch.randn(1, 4, WIDTH))
        self.score = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, image: Tensor, history: Tensor, where: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(image).flatten(2).transpose(1, 2)
        moved = where @ pose[:, :3, :3].transpose(1, 2) + pose[:, None, :3, 3]
        scale, shift = self.motion(pose[:, :3].flatten(1))[:, None].chunk(2, -1)
        history = self.norm(history) * (1 + scale) + shift + self.place(moved)
        relevance = (x @ history.transpose(1, 2)).softmax(-1) @ history
        scores = self.score(x * relevance).squeeze(-1)
        places = scores.topk(COUNT // 2, -1).indices
        gate = torch.sigmoid(scores.gather(1, places))[..., None]
        kept = taken(x, places)
        kept = kept + gate * (self.full(kept) - kept)
        x = (x + self.light(x)).scatter(1, places[..., None].expand_as(kept), kept)
        queries = torch.cat([self.queries.expand(x.shape[0], -1, -1), history], 1)
        queries = queries + self.attend(queries, x)
        best = self.head(queries).amax(-1).topk(OBJECTS, -1).indices
        return self.head(queries), taken(queries, best)


class PooledQueries(nn.Module):
    """ARC-Encoder: the queries of the last layer are means of four; what they read enters a decoder beside words."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.words, self.first = nn.Embedding(50, WIDTH), nn.Embedding(50, WIDTH), Block(Attention())
        self.norm, self.across = nn.LayerNorm(WIDTH), Across()
        self.adapt = nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH))
        self.decoder, self.head = nn.ModuleList(Block(Causal()) for _ in range(2)), nn.Linear(WIDTH, 50)

    def forward(self, context: Tensor, text: Tensor) -> Tensor:
        x = self.norm(self.first(self.tokens(context)))
        few = self.adapt(self.across(x.unflatten(1, (-1, SEGMENT)).mean(2), x))
        y = torch.cat([few, self.words(text)], 1)
        for block in self.decoder:
            y = block(y)
        return self.head(y[:, few.shape[1] :])


class Causal(Shown):
    """Attention to earlier tokens, by a stored triangle."""

    def pairs(self) -> Tensor:
        return torch.ones(COUNT, COUNT, dtype=torch.bool).tril()

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        scores = q @ k.transpose(-1, -2) * self.scale
        return scores.masked_fill(~self.shown[:length, :length], float("-inf")).softmax(-1) @ v


class ShiftedWindows(nn.Module):
    """ByteFormer: embeddings of a file's bytes, a strided convolution, shifted windows of one dimension, halving."""

    window = 8

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.shorten = nn.Embedding(257, WIDTH), nn.Conv1d(WIDTH, WIDTH, 4, 2, 1, bias=False)
        self.place = nn.Parameter(torch.randn(1, 32, WIDTH))
        self.still, self.moved, self.short = Block(Attention()), Block(Attention()), Block(Attention())
        self.norm, self.down, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, file: Tensor) -> Tensor:
        x = self.shorten(self.bytes(file).transpose(1, 2)).transpose(1, 2) + self.place
        x = self.still(x.reshape(-1, self.window, WIDTH)).reshape(x.shape)
        x = torch.roll(x, -self.window // 2, 1)
        x = self.moved(x.reshape(-1, self.window, WIDTH)).reshape(x.shape)
        x = torch.roll(x, self.window // 2, 1)
        x = self.down(self.norm(x.unflatten(1, (-1, 2)).flatten(2)))
        return self.head(self.short(x).mean(1))


class Visible(nn.Module):
    """ENAT: known tokens are encoded apart; masked ones attend to them, and only those that changed are encoded anew
    beside the features of the step before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.place = nn.Embedding(32, WIDTH), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.encode, self.cross, self.masked = Block(Attention()), Across(), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.reuse, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)
        self.decode = Block(Attention())

    def forward(self, ids: Tensor, places: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        place = self.place.expand(ids.shape[0], -1, -1)
        encoded = self.encode(self.tokens(ids) + taken(place, places))
        features = self.reuse(features).scatter_add(1, places[..., None].expand_as(encoded), encoded)
        y = self.masked + place
        y = self.decode(y + self.cross(self.norm(y), features))
        return self.head(y), features


class TwoRates(nn.Module):
    """VCC: tokens that a task needs see all; the others are means of segments, given back what changed in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(50, WIDTH), nn.ModuleList(Block(Attention()) for _ in range(2))

    def forward(self, question: Tensor, text: Tensor) -> Tensor:
        few, x = self.tokens(question), self.tokens(text)
        for block in self.blocks:
            parts = x.unflatten(1, (-1, SEGMENT))
            short = torch.cat([few, parts.mean(2)], 1)
            y = block(short)
            few, change = y[:, : few.shape[1]], (y - short)[:, few.shape[1] :]
            x = (parts + change[:, :, None]).flatten(1, 2)
        return few


def _ids(batch: int, seq: int, most: int) -> Tensor:
    return torch.randint(0, most, (batch, seq), generator=torch.Generator().manual_seed(batch + seq))


def _frame(batch: int, seq: int) -> tuple[Tensor, ...]:
    history, where = normal(batch, OBJECTS, WIDTH), normal(batch, OBJECTS, 3)
    return normal(batch, 3, 2 * SIDE, 2 * SIDE), history, where, normal(batch, 4, 4)


def _known(batch: int, seq: int) -> tuple[Tensor, ...]:
    return _ids(batch, 8, 32), torch.arange(8).expand(batch, -1) * 2, normal(batch, 16, WIDTH)


ENTRIES: tuple[Entry, ...] = (
    Entry("ia_red2", seeded(Policy), ("image",), images(), (BATCH,), Expect(2, 2, fused=True)),
    Entry(
        "toc3d",
        seeded(Foreground),
        ("image", "history", "where", "pose"),
        _frame,
        (BATCH,) * 4,
        Expect(
            3,
            (1, 2, 2),
            ffns=2,
            fused=(False, True, False),
            scale=(1.0, None, None),
            named=("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out", "no-residual"),
        ),
    ),
    Entry(
        "arc_encoder",
        seeded(PooledQueries),
        ("context", "text"),
        lambda batch, seq: (_ids(batch, 16, 50), _ids(batch, 6, 50)),
        (BATCH, BATCH),
        Expect(
            4, 2, ffns=3, causal=(False, False, True, True), fused=(True, False, True, True), named=("no-residual",)
        ),
        torchscript="static",
    ),
    Entry(
        "byteformer",
        seeded(ShiftedWindows),
        ("file",),
        lambda batch, seq: (_ids(batch, 64, 257),),
        (BATCH,),
        Expect(3, 2, fused=True),
        torchscript="static",
    ),
    Entry(
        "enat",
        seeded(Visible),
        ("ids", "places", "features"),
        _known,
        (BATCH,) * 3,
        Expect(3, 2, ffns=2, fused=(True, False, True)),
    ),
    Entry(
        "vcc",
        seeded(TwoRates),
        ("question", "text"),
        lambda batch, seq: (_ids(batch, 4, 50), _ids(batch, 16, 50)),
        (BATCH, BATCH),
        Expect(2, 2, fused=True),
        torchscript="static",
    ),
)
"""IA-RED2, ToC3D and StreamPETR, ARC-Encoder, ByteFormer, ENAT, VCC."""
