"""Parts of the vision models that are of our own: patches, blocks, and what their attentions have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Axes, Entry, Expect, normal

WIDTH, HEADS, DEPTH = 16, 2, 8
SIDE = 8
"""Tokens on the sides of the grid."""
Script = Literal["dynamic", "static", "none"]
BATCH: Axes = {0: "batch"}


class Block(nn.Module):
    """``x + mix(norm(x))``, then a feed-forward: a stream [B, N, C] of tokens."""

    def __init__(self, mix: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), mix
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x), *more)
        return x + self.ffn(x)


class Attention(nn.Module):
    """Attention as timm writes it: one projection seen as [B, N, 3, H, d]."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, N, d] each."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.weigh(*self.split(x)).transpose(1, 2).reshape(x.shape))


class Across(nn.Module):
    """Cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        parts = (self.q(x), self.k(memory), self.v(memory))
        q, k, v = (part.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Patches of 2 x 2 pixels, two blocks on the tokens, a norm."""

    def __init__(self, mix: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.blocks = nn.ModuleList([Block(mix()), Block(mix())])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Convolutional(nn.Module):
    """Blocks on feature maps [B, C, H, W], after a first convolution that keeps the size."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.stem(image))


def images(side: int = 2 * SIDE) -> Callable[[int, int], tuple[Tensor, ...]]:
    return lambda batch, seq: (normal(batch, 3, side, side),)


def any_size(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (normal(batch, 3, seq, seq),)


def seeded(make: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    """Builder of a model whose weights do not depend on what was built before it; norms and biases hide nothing."""

    def build(attention: str) -> nn.Module:
        torch.manual_seed(0)
        module = make()
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        return module.eval()

    return build


def of_tokens(name: str, mix: Callable[[], nn.Module], expect: Expect, torchscript: Script = "dynamic") -> Entry:
    """An entry for :class:`Model`."""
    return Entry(name, seeded(lambda: Model(mix)), ("image",), images(), (BATCH,), expect, torchscript=torchscript)


def of_maps(name: str, blocks: Callable[[], list[nn.Module]], expect: Expect, fixed: int = 0) -> Entry:
    """An entry for :class:`Convolutional`, with images of any size or of a ``fixed`` one."""
    axes = BATCH if fixed else {0: "batch", 2: "seq", 3: "seq"}
    feeds = images(fixed) if fixed else any_size
    return Entry(name, seeded(lambda: Convolutional(*blocks())), ("image",), feeds, (axes,), expect)
