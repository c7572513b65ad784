"""Who sees whom: masks of segments, bands and blocks, low-rank keys, latents and slots between local groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Across, Attention, Block, images, of_tokens, seeded

COUNT = SIDE * SIDE


class Shown(Attention):
    """Attention under a fixed mask of pairs [N, N]."""

    def pairs(self) -> Tensor:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shown", self.pairs())

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * self.scale
        return scores.masked_fill(~self.shown, float("-inf")).softmax(-1) @ v


class Segments(Shown):
    """Mask2DiT, Zorro: tokens see their own segment, and the first segment sees all."""

    def pairs(self) -> Tensor:
        segment = torch.arange(COUNT) * 3 // COUNT
        return (segment[:, None] == segment[None]) | (segment[:, None] == 0)


class BandAndGlobal(Shown):
    """ETC, Longformer, BigBird: a band, and few tokens that see and are seen by all."""

    def pairs(self) -> Tensor:
        places = torch.arange(COUNT)
        return ((places[:, None] - places[None]).abs() <= 3) | (places[:, None] < 4) | (places[None] < 4)


class Stripes(Shown):
    """Sparse transformers: every eighth token, and those near."""

    def pairs(self) -> Tensor:
        places = torch.arange(COUNT)
        distance = (places[:, None] - places[None]).abs()
        return (distance < 4) | (distance % 8 == 0)


class MixedSpans(nn.Module):
    """MASFormer: one layer sees all, the other is local."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 2, 2), nn.Sequential(Block(BandAndGlobal()), Block(Attention()))

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).transpose(1, 2))


class LowRankKeys(Attention):
    """Linformer: keys and values of all positions by a matrix of few."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(6, COUNT) / 8) for _ in range(2))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.keys @ k, self.values @ v)


class Landmarks(Attention):
    """Nystromformer: means of segments stand between queries and keys; three softmaxes, an iterated inverse."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * self.scale
        few_q, few_k = (part.unflatten(2, (8, -1)).mean(3) for part in (q, k))
        left, middle = (q @ few_k.transpose(-1, -2)).softmax(-1), (few_q @ few_k.transpose(-1, -2)).softmax(-1)
        right = (few_q @ k.transpose(-1, -2)).softmax(-1)
        inverse = middle.transpose(-1, -2) / middle.sum(-2, keepdim=True).amax(-1, keepdim=True)
        identity = torch.eye(8)
        for _ in range(3):
            product = middle @ inverse
            inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
        return left @ inverse @ (right @ v)


class Coarse(Attention):
    """MRA, Combiner, MAELRE: means of blocks for what is far, exact keys for what is near, under one softmax."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        means = [part.unflatten(2, (8, -1)).mean(3) for part in (k, v)]
        block = torch.arange(COUNT) // 8
        near = block[:, None] == block[None]
        scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~near, float("-inf"))
        far = (q @ means[0].transpose(-1, -2) * self.scale).masked_fill(
            block[:, None] == torch.arange(8), float("-inf")
        )
        weights = torch.cat([scores, far], -1).softmax(-1)
        return weights[..., :COUNT] @ v + weights[..., COUNT:] @ means[1]


class Hashed(Attention):
    """Reformer: one projection for queries and keys, sorted by a hash, attention within chunks, and back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotations", torch.randn(DEPTH, 4, generator=torch.Generator().manual_seed(0)))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = q @ self.rotations
        bucket = torch.cat([turned, -turned], -1).argmax(-1)
        place = bucket * COUNT + torch.arange(COUNT)
        order = place.topk(COUNT, -1, largest=False).indices
        back = order.topk(COUNT, -1, largest=False).indices
        index = order[..., None].expand(-1, -1, -1, DEPTH)
        q, v = (part.gather(2, index).unflatten(2, (8, 8)) for part in (q, v))
        y = (q @ F.normalize(q, dim=-1).transpose(-1, -2) * self.scale).softmax(-1) @ v
        return y.flatten(2, 3).gather(2, back[..., None].expand(-1, -1, -1, DEPTH))


class ProbSparse(Attention):
    """Informer: the queries whose scores vary most attend; the others take the mean of the values."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k[:, :, ::4].transpose(-1, -2)
        best = (scores.amax(-1) - scores.mean(-1)).topk(8, -1).indices[..., None]
        index = best.expand(-1, -1, -1, DEPTH)
        chosen = (q.gather(2, index) @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return v.mean(2, keepdim=True).expand_as(v).scatter(2, index, chosen)


class Groups(nn.Module):
    """FIT: local attention in groups, latents read all groups, mix, and write back."""

    def __init__(self) -> None:
        super().__init__()
        self.local, self.latents, self.middle = Attention(), nn.Parameter(torch.randn(1, 4, WIDTH)), Block(Attention())
        self.read, self.write = Across(), Across()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x.reshape(-1, SIDE, WIDTH)).reshape(x.shape)
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = self.middle(latents + self.read(latents, x))
        return self.write(x, latents)


class GlobalTokens(nn.Module):
    """DualToken-ViT, LightViT: convolutions for what is near, few global tokens for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.tokens = (
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
            nn.Parameter(torch.randn(1, 4, WIDTH)),
        )
        self.gather, self.spread = Across(), Across()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        local = self.near(grid).flatten(2).transpose(1, 2)
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        return local + self.spread(x, tokens + self.gather(tokens, local))


class Pyramid(nn.Module):
    """P2AT: keys and values by pools of several sizes, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cross = nn.LayerNorm(WIDTH), Across()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        pools = [F.avg_pool2d(grid, SIDE // size).flatten(2) for size in (1, 2, 4)]
        return self.cross(x, self.norm(torch.cat(pools, 2).transpose(1, 2)))


class Deformed(nn.Module):
    """LIT's merging and Swin's: a convolution says where tokens are sampled, bilinearly, before four become one."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first, self.last = nn.Conv2d(3, WIDTH, 2, 2), Block(TokenFfn()), Block(Attention())
        self.offsets, self.reduce = nn.Conv2d(WIDTH, 2, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(self.patches(image).flatten(2).transpose(1, 2))
        grid = x.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        at = torch.linspace(-1, 1, SIDE)
        base = torch.stack([at[None].expand(SIDE, -1), at[:, None].expand(-1, SIDE)], -1)
        moved = base + 0.2 * torch.tanh(self.offsets(grid)).permute(0, 2, 3, 1)
        sampled = F.grid_sample(grid, moved, mode="bilinear", padding_mode="border", align_corners=True)
        return self.last(self.reduce(sampled).flatten(2).transpose(1, 2))


class TokenFfn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class SemanticTokens(nn.Module):
    """STViT: few cluster tokens attend to all, run through blocks, and all attend to them again."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, WIDTH, 2, 2), Block(Attention())
        self.gather, self.recover = Across(), Across()

    def forward(self, image: Tensor) -> Tensor:
        grid = self.patches(image)
        x, few = grid.flatten(2).transpose(1, 2), F.adaptive_avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
        few = self.block(few + self.gather(few, x))
        return x + self.recover(x, few)


class Reparameterized(nn.Module):
    """FMViT, ViT-ResNAS: parallel convolutions and norms of training, of which one could be made; then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, WIDTH, 2, 2), Block(Attention())
        self.wide, self.point = (
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(3))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = F.relu(self.norms[0](self.wide(x)) + self.norms[1](self.point(x)) + self.norms[2](x))
        return self.block(x.flatten(2).transpose(1, 2))


class Labeled(nn.Module):
    """LV-ViT: every token has a label of its own beside the class token's; four convolutions make the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, WIDTH, 2, 2),
        )  # fmt: skip
        self.first, self.blocks = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.Sequential(Block(Attention()), Block(Attention())),
        )
        self.head, self.each = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1))
        return self.head(x[:, 0]) + 0.5 * self.each(x[:, 1:]).amax(1)


class Overlapping(Attention):
    """HAT-SR: queries of a window attend to a larger window around it, by unfolding; a channel gate beside."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 16, 36))
        self.near = nn.Sequential(nn.Conv2d(WIDTH, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, WIDTH, 3, padding=1))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, 4, 1), nn.ReLU(), nn.Conv2d(4, WIDTH, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = self.qkv(x).chunk(3, -1)
        grids = (p.transpose(1, 2).reshape(batch, WIDTH, SIDE, SIDE) for p in (k, v))
        k, v = (
            F.unfold(p, 6, stride=4, padding=1).reshape(batch, HEADS, DEPTH, 36, -1).permute(0, 4, 1, 3, 2)
            for p in grids
        )
        q = q.reshape(batch, 2, 4, 2, 4, HEADS, DEPTH).permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, 4, HEADS, 16, DEPTH)
        y = (q @ k.transpose(-1, -2) * self.scale + self.bias).softmax(-1) @ v
        y = y.reshape(batch, 2, 2, HEADS, 4, 4, DEPTH).permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape)
        near = self.near(x.transpose(1, 2).reshape(batch, WIDTH, SIDE, SIDE))
        return self.proj(y) + 0.1 * (near * self.squeeze(near)).flatten(2).transpose(1, 2)


class Points(nn.Module):
    """Point-BERT: the nearest points of some centres by distances and top-k, gathered, pooled to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.block = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, WIDTH)), Block(Attention())
        self.place = nn.Linear(3, WIDTH)

    def forward(self, points: Tensor) -> Tensor:
        centres = points[:, ::4]
        distance = ((centres[:, :, None] - points[:, None]) ** 2).sum(-1)
        nearest = distance.topk(4, -1, largest=False).indices
        near = points[:, None].expand(-1, centres.shape[1], -1, -1).gather(2, nearest[..., None].expand(-1, -1, -1, 3))
        tokens = self.each(near - centres[:, :, None]).amax(2) + self.place(centres)
        return self.block(tokens)


class Bytes(nn.Module):
    """HAT: bytes by a local encoder, four pooled to a word, a backbone over words, and bytes again."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.encoder, self.backbone, self.decoder = (
            nn.Embedding(256, WIDTH), Block(Attention()), Block(Attention()), Block(Attention()),
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text)
        local = self.encoder(x.reshape(-1, 4, WIDTH)).reshape(x.shape)
        words = self.backbone(local.unflatten(1, (-1, 4)).mean(2))
        return self.head(self.decoder((local.unflatten(1, (-1, 4)) + words[:, :, None]).flatten(0, 1)).reshape(x.shape))


class Toeplitz(Attention):
    """URPE: a matrix of distances, learned, multiplied onto the weights."""

    def __init__(self) -> None:
        super().__init__()
        places = torch.arange(COUNT)
        self.register_buffer("distance", (places[:, None] - places[None]).clamp(-8, 8) + 8)
        self.table = nn.Parameter(torch.rand(HEADS, 17) + 0.5)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2) * self.scale).softmax(-1) * self.table[:, self.distance]) @ v


def _whole(name: str, make: type[nn.Module], expect: Expect) -> Entry:
    return Entry(name, seeded(make), ("image",), images(), (BATCH,), expect)


ALONE = ("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out")
MASKED = Expect(2, 2, mask="bias", fused=True)

ENTRIES: tuple[Entry, ...] = (
    of_tokens("segments", Segments, MASKED),
    of_tokens("etc", BandAndGlobal, MASKED),
    of_tokens("sparse", Stripes, MASKED),
    _whole("masformer", MixedSpans, Expect(2, 2, mask=("bias", "none"), fused=True)),
    of_tokens("linformer", LowRankKeys, Expect(2, 2, scale=DEPTH**-0.5, named=("no-projection-k", "no-projection-v"))),
    of_tokens(
        "nystrom",
        Landmarks,
        Expect(
            4,
            2,
            ffns=2,
            scale=(None, 1.0, None, 1.0),
            named=(*ALONE, "no-residual", "weights-read-elsewhere", "linear-attention", "no-softmax"),
        ),
    ),
    of_tokens("mra", Coarse, Expect(0, 2, ffns=2, named=("scores-concat",))),
    of_tokens(
        "lsh",
        Hashed,
        Expect(
            2, 1, named=("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out", "no-residual")
        ),
    ),
    of_tokens("prob_sparse", ProbSparse, Expect(2, 2, named=("no-projection-q", "no-projection-out", "no-residual"))),
    of_tokens("fit", Groups, Expect(8, 2, ffns=4, fused=(True, False) * 4)),
    of_tokens("dual_token", GlobalTokens, Expect(4, 2, ffns=2)),
    of_tokens("p2at", Pyramid, Expect(2, 2)),
    _whole("lit", Deformed, Expect(1, 2, ffns=3, fused=True)),
    _whole("stvit", SemanticTokens, Expect(3, 2, ffns=1, fused=(False, True, False))),
    _whole("fmvit", Reparameterized, Expect(1, 2, fused=True)),
    _whole("lvvit", Labeled, Expect(2, 2, fused=True)),
    of_tokens("hat", Overlapping, Expect(2, 2, mask="bias", named=("no-projection-k", "no-projection-v"))),
    Entry(
        "point_bert",
        seeded(Points),
        ("points",),
        lambda batch, seq: (normal(batch, 32, 3),),
        (BATCH,),
        Expect(1, 2, fused=True, named=("no-residual",)),
    ),
    Entry(
        "hat_bytes",
        seeded(Bytes),
        ("text",),
        lambda batch, seq: (torch.randint(0, 256, (batch, 16), generator=torch.Generator().manual_seed(batch)),),
        (BATCH,),
        Expect(3, 2, fused=True),
        torchscript="none",
    ),
    of_tokens("urpe", Toeplitz, Expect(0, 2, ffns=2, named=("weights-mul",))),
)
"""Segments, bands and stripes, mixed spans, Linformer, Nystromformer, MRA, LSH, ProbSparse, FIT, DualToken-ViT, P2AT,
LIT, STViT, FMViT, LV-ViT, HAT (super-resolution), Point-BERT, HAT (bytes and words), URPE.
"""
