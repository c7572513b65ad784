"""Models that choose at run time, or when they are deployed: experts by top-k, nested networks, adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect
from .mixers import BATCH, WIDTH, Attention, Block, images, seeded

EXPERTS, BEST = 4, 2


class Experts(nn.Module):
    """A router weighs the best two of four feed-forward networks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, 32))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, 32, WIDTH))

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = self.router(x).softmax(-1).topk(BEST, -1)
        return weights / weights.sum(-1, keepdim=True), experts


class Dense(Experts):
    """Every expert computes every token; those not chosen weigh nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights, experts = self.chosen(y)
        gate = torch.zeros(*y.shape[:-1], EXPERTS).scatter(-1, experts, weights)
        hidden = F.gelu(torch.einsum("bnc,ech->bneh", y, self.up))
        return x + torch.einsum("bneh,ehc,bne->bnc", hidden, self.down, gate)


class Gathered(Experts):
    """The weights of the chosen experts are gathered for each token."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights, experts = self.chosen(y)
        hidden = F.gelu(torch.einsum("bnc,bnkch->bnkh", y, self.up[experts]))
        return x + torch.einsum("bnkh,bnkhc,bnk->bnc", hidden, self.down[experts], weights)


class Scattered(Experts):
    """Tokens are sorted into the queues of their experts, computed there, and added back where they came from."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).flatten(0, 1)
        weights, experts = self.chosen(y)
        queue = experts.flatten() * (BEST * y.shape[0]) + torch.arange(BEST * y.shape[0])
        order = queue.topk(queue.shape[0], largest=False).indices
        tokens, expert = order // BEST, experts.flatten()[order]
        hidden = F.gelu(torch.bmm(y[tokens][:, None], self.up[expert]))
        result = torch.bmm(hidden, self.down[expert])[:, 0] * weights.flatten()[order][:, None]
        total = torch.zeros_like(y).scatter_add(0, tokens[:, None].expand(-1, WIDTH), result)
        return x + total.view_as(x)


class Routed(nn.Module):
    """Attention, then experts."""

    def __init__(self, experts: type[Experts]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.norms, self.mix = (
            nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)),
            nn.ModuleList(Attention() for _ in range(2)),
        )
        self.experts = nn.ModuleList([experts(), experts()])

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for i in range(2):
            x = self.experts[i](x + self.mix[i](self.norms[i](x)))
        return x


class Nested(nn.Module):
    """MatFormer: a feed-forward network of which a submodel takes the first half of the neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.mix, self.first = Attention(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.first(x))
        hidden = F.gelu(F.linear(self.norm(x), self.up.weight[:32], self.up.bias[:32]))
        return x + F.linear(hidden, self.down.weight[:, :32], self.down.bias)


class Submodel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 4, 4), nn.Sequential(Nested(), Nested())

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).transpose(1, 2))


class Adapted(Block):
    """AdaptFormer and LoRA: a narrow branch beside the feed-forward network, low-rank updates on the projections."""

    def __init__(self) -> None:
        super().__init__(LowRank())
        self.narrow = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, WIDTH))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.ffn(x) + 0.1 * self.narrow(x)


class LowRank(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 3 * WIDTH, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, count, _ = x.shape
        qkv = self.qkv(x) + 0.5 * self.up(self.down(x))
        q, k, v = qkv.reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class WithAdapters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 4, 4), nn.Sequential(Adapted(), Adapted())

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).transpose(1, 2))


def _routed(name: str, experts: type[Experts]) -> Entry:
    expect = Expect(2, 2, fused=True, ffns=0, named=("stacked-weights",))
    return Entry(name, seeded(lambda: Routed(experts)), ("image",), images(), (BATCH,), expect)


ENTRIES: tuple[Entry, ...] = (
    _routed("experts_dense", Dense),
    _routed("experts_gathered", Gathered),
    _routed("experts_scattered", Scattered),
    Entry("matformer", seeded(Submodel), ("image",), images(), (BATCH,), Expect(2, 2, fused=True)),
    Entry(
        "adapters",
        seeded(WithAdapters),
        ("image",),
        images(),
        (BATCH,),
        Expect(2, 2, ffns=4, named=("no-projection-q", "no-projection-k", "no-projection-v")),
    ),
)
"""Experts by top-k in three forms; MatFormer's submodels; adapters."""
