"""Vision models that make, cut, join and share tokens in their own ways, and hard assignments of pixels to queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Attention, Block, images, of_tokens, seeded


class Unfolded(nn.Module):
    """T2T: tokens by unfolding overlapping patches, an attention, the grid again, and another unfolding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3 * 9, WIDTH), nn.Linear(9 * WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(Attention()), Block(Attention())])

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(F.unfold(image, 3, stride=2, padding=1).transpose(1, 2))
        x = self.blocks[0](x).transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        x = self.second(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))
        return self.blocks[1](x)


class Nested(nn.Module):
    """TNT: attention among the pixels of a patch, which are then added to the token of the patch."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.join = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(16 * WIDTH, WIDTH)
        self.inner, self.outer = Block(Attention()), Block(Attention())
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, image: Tensor) -> Tensor:
        batch, side = image.shape[0], SIDE // 4
        grid = self.pixels(image).reshape(batch, WIDTH, side, 4, side, 4).permute(0, 2, 4, 3, 5, 1)
        pixels = self.inner(grid.reshape(-1, 16, WIDTH))
        tokens = self.join(pixels.reshape(batch, side * side, -1))
        return self.outer(torch.cat([self.first.expand(batch, -1, -1), tokens], 1))[:, 0]


class ClassQuery(nn.Module):
    """CaiT and CrossViT: the class token alone is the query, of itself and of all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, first: Tensor, patches: Tensor) -> Tensor:
        batch, both = patches.shape[0], torch.cat([first, patches], 1)
        q = self.q(both[:, 0:1]).reshape(batch, 1, HEADS, DEPTH).permute(0, 2, 1, 3)
        k, v = (part(both).reshape(batch, -1, HEADS, DEPTH).permute(0, 2, 1, 3) for part in (self.k, self.v))
        y = (q @ k.transpose(-2, -1) * DEPTH**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, 1, WIDTH))


class CrossViT(nn.Module):
    """Two branches of different patches; the class token of each attends to the patches of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(2, 1, 1, WIDTH))
        self.blocks = nn.ModuleList([Block(Attention()), Block(Attention())])
        self.norm, self.cross = nn.LayerNorm(WIDTH), nn.ModuleList([ClassQuery(), ClassQuery()])
        self.head = nn.Linear(2 * WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        batch, tokens = image.shape[0], []
        for i, patches in enumerate((self.small, self.large)):
            x = patches(image).flatten(2).transpose(1, 2)
            tokens.append(self.blocks[i](torch.cat([self.first[i].expand(batch, -1, -1), x], 1)))
        firsts = []
        for i, own in enumerate(tokens):
            other = tokens[1 - i]
            firsts.append(own[:, :1] + self.cross[i](self.norm(own[:, :1]), self.norm(other[:, 1:])))
        return self.head(torch.cat(firsts, -1)[:, 0])


class ScaledBlock(nn.Module):
    """CaiT: a learned vector scales each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(Attention())
        self.one, self.two = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one * self.block.mix(self.block.norm(x))
        return x + self.two * self.block.ffn(x)


class CaiT(nn.Module):
    """Blocks on the patches alone, then class attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks, self.norm, self.last = (
            nn.Sequential(ScaledBlock(), ScaledBlock()),
            nn.LayerNorm(WIDTH),
            ClassQuery(),
        )
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.patches(image).flatten(2).transpose(1, 2))
        first = self.first.expand(x.shape[0], -1, -1)
        both = self.norm(torch.cat([first, x], 1))
        return (first + self.scale * self.last(both[:, :1], both[:, 1:]))[:, 0]


class HardClusters(nn.Module):
    """kMaX-DeepLab: each pixel is given to one query by an argmax; queries are updated by sums of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.queries = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(6, WIDTH))
        self.value, self.block = nn.Linear(WIDTH, WIDTH), Block(Attention())

    def forward(self, image: Tensor) -> Tensor:
        x = self.pixels(image).flatten(2).transpose(1, 2)
        queries = self.queries[None].expand(x.shape[0], -1, -1)
        chosen = (queries @ x.transpose(1, 2)).argmax(1)
        given = F.one_hot(chosen, 6).to(x.dtype).transpose(1, 2)
        queries = self.block(queries + given @ self.value(x))
        return queries @ x.transpose(1, 2)


class Prototype(nn.Module):
    """PEM: each query attends to the one pixel that is most like it."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.queries = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(6, WIDTH))
        self.q, self.k, self.mix, self.block = *(nn.Linear(WIDTH, WIDTH) for _ in range(3)), Block(Attention())

    def forward(self, image: Tensor) -> Tensor:
        x = self.pixels(image).flatten(2).transpose(1, 2)
        queries = self.queries[None].expand(x.shape[0], -1, -1)
        q, k = F.normalize(self.q(queries), dim=-1), F.normalize(self.k(x), dim=-1)
        best = (q @ k.transpose(1, 2)).argmax(-1)
        chosen = k.gather(1, best[..., None].expand(-1, -1, WIDTH))
        return self.block(queries + self.mix(F.normalize(q * chosen, dim=-1)))


class Slots(nn.Module):
    """GLMix: attention among slots that a soft clustering of the pixels gives, handed back to the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.near = Block(Attention()), nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        slots = F.adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        logits = F.normalize(slots, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
        slots = logits.softmax(-1) @ x
        local = self.near(grid).flatten(2).transpose(1, 2)
        return local + logits.softmax(1).transpose(1, 2) @ self.inner(slots)


class Latents(nn.Module):
    """Perceiver, FIT: learned latents attend to the tokens, then to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.latents = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.block = nn.LayerNorm(WIDTH), Block(Attention())

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.pixels(image).flatten(2).transpose(1, 2))
        latents = self.latents.expand(x.shape[0], -1, -1)
        q, k, v = (p.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for p in (self.q(latents), self.k(x), self.v(x)))
        latents = latents + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.block(latents)


class SoftThreshold(nn.Module):
    """CRATE: one projection for queries, keys and values, and a step of sparse coding in place of the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.code = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)
        y = (w @ w.transpose(-1, -2) * DEPTH**-0.5).softmax(-1) @ w
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return F.relu(x + 0.1 * (x - x @ self.code.t()) @ self.code - 0.01)


def _entry(name: str, make: type[nn.Module], expect: Expect, side: int = 2 * SIDE) -> Entry:
    return Entry(name, seeded(make), ("image",), images(side), (BATCH,), expect)


ENTRIES: tuple[Entry, ...] = (
    _entry("t2t", Unfolded, Expect(2, 2, fused=True)),
    _entry("tnt", Nested, Expect(2, 2, fused=True), SIDE),
    _entry("crossvit", CrossViT, Expect(4, 2, ffns=2, fused=(True, True, False, False))),
    _entry("cait", CaiT, Expect(3, 2, ffns=2, fused=(True, True, False))),
    _entry("kmax", HardClusters, Expect(1, 2, fused=True, named=("no-softmax",))),
    _entry("pem", Prototype, Expect(1, 2, fused=True)),
    of_tokens(
        "glmix",
        Slots,
        Expect(
            6,
            (1, 2, 1, 1, 2, 1),
            fused=(False, True, False, False, True, False),
            scale=(1.0, None, 1.0, 1.0, None, 1.0),
            ffns=4,
            named=(
                "no-projection-q",
                "no-projection-k",
                "no-projection-v",
                "no-projection-out",
                "no-residual",
            ),
        ),
        "none",
    ),
    _entry("perceiver", Latents, Expect(2, 2, ffns=1, fused=(False, True))),
    of_tokens("crate", SoftThreshold, Expect(2, 2)),
)
"""T2T, TNT, CrossViT, CaiT, kMaX-DeepLab, PEM, GLMix, Perceiver, CRATE."""
