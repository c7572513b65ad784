"""Vision models whose attention sees windows, grids, fewer keys, or has more between its products than a softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Attention, Block, images, of_tokens, seeded

WINDOW = 4


class Local(Attention):
    """Twins: windows of a grid by one permutation, [B, windows, H, w*w, d]."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        groups = SIDE // WINDOW
        x = x.view(batch, groups, WINDOW, groups, WINDOW, width).transpose(2, 3)
        qkv = self.qkv(x).reshape(batch, groups * groups, -1, 3, self.heads, DEPTH).permute(3, 0, 1, 4, 2, 5)
        y = self.weigh(*qkv.unbind(0))
        y = y.transpose(2, 3).reshape(batch, groups, groups, WINDOW, WINDOW, width)
        return self.proj(y.transpose(2, 3).reshape(batch, -1, width))


class Subsampled(nn.Module):
    """Twins and PVT: keys and values of a grid that a strided convolution made smaller."""

    def __init__(self, ratio: int = 2) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reduce, self.norm = nn.Conv2d(WIDTH, WIDTH, ratio, ratio), nn.LayerNorm(WIDTH)

    def memory(self, x: Tensor) -> Tensor:
        grid = x.permute(0, 2, 1).reshape(x.shape[0], WIDTH, SIDE, SIDE)
        return self.norm(self.reduce(grid).reshape(x.shape[0], WIDTH, -1).permute(0, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q = self.q(x).reshape(batch, count, HEADS, DEPTH).permute(0, 2, 1, 3)
        kv = self.kv(self.memory(x)).reshape(batch, -1, 2, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
        attention = (q @ kv[0].transpose(-2, -1)) * DEPTH**-0.5
        return self.proj((attention.softmax(-1) @ kv[1]).transpose(1, 2).reshape(batch, count, width))


class Pooled(Subsampled):
    """EDAFormer: keys and values of a grid pooled at inference, no projection of the keys' own."""

    def memory(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return F.avg_pool2d(grid, 4).flatten(2).transpose(1, 2)


class EmbeddingFree(nn.Module):
    """EDAFormer's attention without query, key and value projections: the normed stream is all three."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q = x.reshape(batch, count, HEADS, DEPTH).transpose(1, 2)
        y = (q @ q.transpose(-2, -1) * DEPTH**-0.5).softmax(-1) @ q
        return self.proj(y.transpose(1, 2).reshape(batch, count, width))


class OneHead(nn.Module):
    """One head without an axis of heads (SAGAN, non-local networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1) @ self.v(x)


class BareHead(nn.Module):
    """The same without projections."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2) / math.sqrt(WIDTH), -1) @ x


class Partitioned(Attention):
    """MaxViT: tokens of a window, or of a dilated grid, in two axes while heads are split by einsum."""

    def __init__(self, grid: bool) -> None:
        super().__init__()
        self.grid = grid
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW * WINDOW, WINDOW * WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        groups = SIDE // WINDOW
        if self.grid:  # [B, w, g, w, g, C] -> [B, g, g, w, w, C]
            x = x.view(batch, WINDOW, groups, WINDOW, groups, width).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.view(batch, groups, WINDOW, groups, WINDOW, width).permute(0, 1, 3, 2, 4, 5)
        tokens = x.reshape(-1, WINDOW * WINDOW, width)
        q, k, v = (part.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        scores = torch.einsum("bhid,bhjd->bhij", q * self.scale, k) + self.bias
        y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v).transpose(1, 2).flatten(2)
        y = self.proj(y).view(batch, groups, groups, WINDOW, WINDOW, width)
        order = (0, 3, 1, 4, 2, 5) if self.grid else (0, 1, 3, 2, 4, 5)
        return y.permute(order).reshape(batch, -1, width)


class Cosine(Attention):
    """Cosine attention with a learned temperature per head (Swin 2), capped."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.log(10 * torch.rand(HEADS, 1, 1) + 1))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.temperature.clamp(max=math.log(100.0)).exp()).softmax(-1) @ v


class Temperature(Attention):
    """A learned temperature that the heads share (LSA of small-data ViTs), its own token masked out."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.log(torch.tensor(2.0)))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.temperature.exp()
        own = torch.eye(scores.shape[-1], dtype=torch.bool)
        return scores.masked_fill(own, -torch.finfo(scores.dtype).max).softmax(-1) @ v


class Talking(Attention):
    """CaiT: scores and weights mixed over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-2, -1) * self.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.behind(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class BucketBias(Attention):
    """iRPE: a bias that the query's product with a table of buckets gives, gathered by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets = nn.Parameter(0.3 * torch.randn(HEADS, DEPTH, 9))
        places = torch.arange(SIDE * SIDE)
        distance = (places[None, :] % SIDE - places[:, None] % SIDE).clamp(-4, 4) + 4
        self.register_buffer("bucket", distance)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        looked_up = q @ self.buckets
        bias = looked_up.gather(-1, self.bucket.expand(q.shape[0], HEADS, -1, -1))
        return (q @ k.transpose(-2, -1) * self.scale + bias).softmax(-1) @ v


class Decay(Attention):
    """RMT: a decay by the Manhattan distance of the tokens, multiplied onto the weights."""

    def __init__(self) -> None:
        super().__init__()
        y, x = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
        distance = (y[:, None] - y[None]).abs() + (x[:, None] - x[None]).abs()
        self.register_buffer("decay", torch.tensor([0.9, 0.7])[:, None, None] ** distance)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1) * self.scale).softmax(-1) * self.decay) @ v


class PathMask(Attention):
    """PPMA: decays that a token's row and column say, multiplied along both ways round a corner, on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Linear(WIDTH, 2)

    @staticmethod
    def along(log: Tensor) -> Tensor:
        """Sums [B, lines, n, n] between places on lines [B, lines, n]."""
        total = log.cumsum(-1)
        return -(total[..., :, None] - total[..., None, :]).abs()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        across, down = F.softplus(self.decay(x)).reshape(-1, SIDE, SIDE, 2).unbind(-1)
        rows = self.along(across).exp()
        columns = self.along(down.transpose(1, 2)).exp()
        one = torch.einsum("bijl,blik->bijkl", rows, columns)
        two = torch.einsum("bjik,bkjl->bijkl", columns, rows)
        mask = ((one + two) / 2).flatten(3).flatten(1, 2)[:, None]
        y = ((q @ k.transpose(-1, -2) * self.scale).softmax(-1) * mask) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class CausalTokens(nn.Module):
    """iLLaMA: a decoder's block on patches, whose class token comes last so that it sees all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.norms, self.qkv, self.out = (
            nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(3)), nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )  # fmt: skip
        self.gate, self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * 0.1 ** torch.arange(DEPTH // 2)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.last.expand(x.shape[0], -1, -1)], 1)
        q, k, v = (p.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for p in self.qkv(self.norms[0](x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.norms[2](x)[:, -1]


class DecayBias(Decay):
    """RMT as it is published: the logarithm of the decay is added to the scores, then keys go by rows and columns."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * self.scale + self.decay.log()).softmax(-1) @ v


class Axial(Attention):
    """Attention along the rows and then along the columns of the grid (RMT, P2AT, axial DeepLab)."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = self.qkv(x).view(batch, SIDE, SIDE, 3, HEADS, DEPTH).permute(3, 0, 4, 1, 2, 5).unbind(0)
        rows = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        q, k, v = (part.transpose(2, 3) for part in (q, k, rows))
        columns = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.proj(columns.permute(0, 3, 2, 1, 4).reshape(x.shape))


class Gaussian(Attention):
    """RetNet-GMM: Gaussian masks of two learned parameters multiplied onto the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Parameter(torch.rand(HEADS, 1, 1)), nn.Parameter(torch.rand(HEADS, 1, 1) + 1)
        places = torch.arange(SIDE * SIDE, dtype=torch.float32)
        self.register_buffer("distance", (places[:, None] - places[None]).abs() / SIDE)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.exp(-((self.distance - self.mean) ** 2) / (2 * self.deviation**2))
        return (q @ k.transpose(-1, -2) * self.scale * mask).softmax(-1) @ v


class HiLo(nn.Module):
    """LITv2: one head on windows of 2 x 2 (high frequencies), one on keys that a pooling averages (low ones)."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.high_out = nn.Linear(WIDTH, 3 * DEPTH), nn.Linear(DEPTH, DEPTH)
        self.q, self.kv, self.low_out = nn.Linear(WIDTH, DEPTH), nn.Linear(WIDTH, 2 * DEPTH), nn.Linear(DEPTH, DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        grid, half = x.view(batch, SIDE, SIDE, WIDTH), SIDE // 2
        tokens = grid.reshape(batch, half, 2, half, 2, WIDTH).transpose(2, 3)
        qkv = self.high(tokens).reshape(batch, half * half, -1, 3, 1, DEPTH).permute(3, 0, 1, 4, 2, 5)
        y = (qkv[0] @ qkv[1].transpose(-2, -1) * DEPTH**-0.5).softmax(-1) @ qkv[2]
        y = y.transpose(2, 3).reshape(batch, half, half, 2, 2, DEPTH).transpose(2, 3).reshape(batch, count, DEPTH)
        q = self.q(grid).reshape(batch, count, 1, DEPTH).permute(0, 2, 1, 3)
        pooled = F.avg_pool2d(grid.permute(0, 3, 1, 2), 2).reshape(batch, WIDTH, -1).permute(0, 2, 1)
        kv = self.kv(pooled).reshape(batch, -1, 2, 1, DEPTH).permute(2, 0, 3, 1, 4)
        z = ((q @ kv[0].transpose(-2, -1) * DEPTH**-0.5).softmax(-1) @ kv[1]).transpose(1, 2)
        return torch.cat([self.high_out(y), self.low_out(z.reshape(batch, count, DEPTH))], -1)


class Routed(Attention):
    """BiFormer: each region attends to the tokens of the regions with the highest affinity, by top-k and gather."""

    def forward(self, x: Tensor) -> Tensor:
        batch, regions, size, best = x.shape[0], 4, SIDE * SIDE // 4, 2
        half = SIDE // 2
        x = x.view(batch, 2, half, 2, half, WIDTH).transpose(2, 3).reshape(batch, regions, size, WIDTH)
        q, k, v = self.qkv(x).chunk(3, -1)
        chosen = (q.mean(2) * self.scale @ k.mean(2).transpose(-1, -2)).topk(best, -1).indices
        index = chosen.view(batch, regions, best, 1, 1).expand(-1, -1, -1, size, WIDTH)
        k, v = (p[:, None].expand(-1, regions, -1, -1, -1).gather(2, index).flatten(2, 3) for p in (k, v))
        q, k, v = (p.unflatten(-1, (HEADS, DEPTH)).transpose(2, 3) for p in (q, k, v))
        y = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        y = y.transpose(2, 3).reshape(batch, 2, 2, half, half, WIDTH)
        return self.proj(y.transpose(2, 3).reshape(batch, -1, WIDTH))


class Neighbours(Attention):
    """TransNeXt: each token attends to the 3 x 3 tokens around it, by unfolding keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        grids = (p.transpose(1, 2).view(batch, WIDTH, SIDE, SIDE) for p in (k, v))
        k, v = (F.unfold(p, 3, padding=1).view(batch, HEADS, DEPTH, 9, count).permute(0, 1, 4, 2, 3) for p in grids)
        q = q.view(batch, count, HEADS, DEPTH).transpose(1, 2)[..., None, :]
        weights = (q @ k * self.scale).softmax(-1)
        return self.proj((weights @ v.transpose(-1, -2)).squeeze(3).transpose(1, 2).flatten(2))


class Rotary2d(Attention):
    """EVA: rows and columns turn a half of each head; the class token in front does not turn; neighbours in pairs."""

    def __init__(self) -> None:
        super().__init__()
        at = torch.arange(SIDE)[:, None] * 100.0 ** (-torch.arange(0, DEPTH // 2, 2) / (DEPTH // 2))
        rows = at[:, None].expand(-1, SIDE, -1).flatten(0, 1)
        angles = torch.cat([rows, at.repeat(SIDE, 1)], -1).repeat_interleave(2, -1)
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], -1))

    def turn(self, x: Tensor) -> Tensor:
        sin, cos = self.table.tensor_split(2, -1)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * cos + turned * sin

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (torch.cat([p[:, :, :1], self.turn(p[:, :, 1:])], 2).type_as(v) for p in (q, k))
        return F.scaled_dot_product_attention(q, k, v)


class WithClass(nn.Module):
    """A class token in front of the patches, two blocks."""

    def __init__(self, mix: type[Attention]) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(Block(mix()), Block(mix()))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1))
        return self.head(x[:, 0])


class ScaledPair(nn.Module):
    """Two mixers in a row, as Twins and MaxViT alternate them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 2, 2), nn.Sequential(Block(first), Block(second))

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).transpose(1, 2)).mean(1)


def _pair(name: str, first: type[nn.Module], second: type[nn.Module], expect: Expect) -> Entry:
    return Entry(name, seeded(lambda: ScaledPair(first(), second())), ("image",), images(), (BATCH,), expect)


BARE = ("no-projection-q", "no-projection-k", "no-projection-v")

ENTRIES: tuple[Entry, ...] = (
    _pair("twins", Local, Subsampled, Expect(2, 2)),
    Entry(
        "maxvit",
        seeded(lambda: ScaledPair(Partitioned(False), Partitioned(True))),
        ("image",),
        images(),
        (BATCH,),
        Expect(2, 2, mask="bias", fused=True),
    ),
    _pair("edaformer", EmbeddingFree, Pooled, Expect(2, 2, named=BARE)),
    of_tokens("one_head", OneHead, Expect(2, 1, named=("no-projection-out",))),
    of_tokens("bare_head", BareHead, Expect(2, 1, named=(*BARE, "no-projection-out"))),
    of_tokens("cosine", Cosine, Expect(2, 2, scale=1.0, named=BARE[:2])),
    of_tokens("temperature", Temperature, Expect(2, 2, mask="bias", fused=True, scale=(1.761971, 1.929117)), "none"),
    of_tokens("talking_heads", Talking, Expect(0, 2, ffns=2, named=("mixed-heads",))),
    of_tokens("irpe", BucketBias, Expect(2, 2, mask="bias", fused=True)),
    of_tokens("weight_decay_mask", Decay, Expect(0, 2, ffns=2, named=("weights-mul",))),
    of_tokens("ppma", PathMask, Expect(0, 2, ffns=2, named=("weights-mul", "no-softmax"))),
    Entry(
        "illama",
        seeded(CausalTokens),
        ("image",),
        images(),
        (BATCH,),
        Expect(1, 2, causal=True, rotary=True),
        torchscript="none",
    ),
    of_tokens("rmt", DecayBias, Expect(2, 2, mask="bias", fused=True)),
    of_tokens("axial", Axial, Expect(4, 2, ffns=2, named=("no-projection-v", "no-projection-out", "no-residual"))),
    of_tokens("retnet_gmm", Gaussian, Expect(0, 2, ffns=2, named=("scores-mul",))),
    of_tokens("hilo", HiLo, Expect(4, 1, ffns=2, named=("no-residual",))),
    of_tokens("biformer", Routed, Expect(0, 2, ffns=2, named=("batch-sizes",)), "none"),
    of_tokens("transnext", Neighbours, Expect(2, 2, named=BARE[1:])),
    Entry(
        "eva",
        seeded(lambda: WithClass(Rotary2d)),
        ("image",),
        images(),
        (BATCH,),
        Expect(2, 2, rotary=True, scale=1.0, named=BARE[:2]),
    ),
)
"""Attention over windows, grids, regions, rows and columns, pooled keys; with temperatures, decays and biases."""
