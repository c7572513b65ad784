"""Vision transformers in stages: convolutions before attention, tokens that carry windows, styles, two backbones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Across, Attention, Block, images, seeded

SMALL = 4
"""Tokens on the sides of a window."""


def windows(grid: Tensor, side: int = SMALL) -> Tensor:
    """[B, C, H, W] -> [B * windows, side * side, C]."""
    batch, width, high, wide = grid.shape
    parts = grid.reshape(batch, width, high // side, side, wide // side, side)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, width)


def merged(parts: Tensor, high: int, side: int = SMALL) -> Tensor:
    """The square grid [B, C, high, high] of windows."""
    count = high // side
    grid = parts.reshape(-1, count, count, side, side, parts.shape[-1])
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, parts.shape[-1], high, high)


def tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


class Carriers(nn.Module):
    """FasterViT: each window has a token of its own; those attend to each other, then join their windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.near = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1),
            nn.BatchNorm2d(WIDTH),
        )  # fmt: skip
        self.first, self.between, self.within = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), Block(Attention()), Block(Attention())

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.near(x)
        carriers = self.between(tokens(F.avg_pool2d(self.first(x), SMALL)))
        y = self.within(torch.cat([carriers.reshape(-1, 1, WIDTH), windows(x)], 1))
        back = y[:, :1].reshape(-1, 1, SIDE // SMALL, SIDE // SMALL, WIDTH).squeeze(1).permute(0, 3, 1, 2)
        return merged(y[:, 1:], SIDE) + F.interpolate(back, scale_factor=SMALL, mode="nearest")


class StarRelu(nn.Module):
    """``scale * relu(x)^2 + bias`` of two learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([0.9])), nn.Parameter(torch.tensor([-0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


class SeparableConvolution(nn.Module):
    """An inverted bottleneck over channels that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.act = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), StarRelu()
        self.near = nn.Conv2d(32, 32, 7, padding=3, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.wide(x)).permute(0, 3, 1, 2)
        return self.narrow(self.near(y).permute(0, 2, 3, 1))


class GridAttention(Attention):
    """Attention over a grid whose channels come last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).reshape(x.shape)


class MetaBlock(nn.Module):
    """MetaFormer: a mixer and a feed-forward network on [B, H, W, C]; a learned scale on what is kept."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.norms, self.mix = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2)), mix
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.up, self.act, self.down = nn.Linear(WIDTH, 32, bias=False), StarRelu(), nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scales[0] * x + self.mix(self.norms[0](x))
        return self.scales[1] * x + self.down(self.act(self.up(self.norms[1](x))))


class CaFormer(nn.Module):
    """Separable convolutions in the first stage, attention in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last = (
            nn.Conv2d(3, WIDTH, 7, 2, 3), MetaBlock(SeparableConvolution()), MetaBlock(GridAttention()),
        )  # fmt: skip
        self.down, self.head = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(self.stem(image).permute(0, 2, 3, 1))
        x = self.last(self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))


class SplitDepthwise(nn.Module):
    """EdgeNeXt: groups of channels go through convolutions, each with what the last gave; channels then attend."""

    def __init__(self) -> None:
        super().__init__()
        part = WIDTH // 2
        self.near, self.norm = nn.Conv2d(part, part, 3, padding=1, groups=part), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature, self.gamma = nn.Parameter(torch.ones(HEADS, 1, 1)), nn.Parameter(torch.rand(WIDTH))
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, grid: Tensor) -> Tensor:
        one, two = grid.chunk(2, 1)
        near = self.near(one)
        x = tokens(torch.cat([self.near(near + two), near], 1))
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        x = x + self.gamma * self.out(y.permute(0, 3, 1, 2).flatten(2))
        return grid + (x + self.ffn(x)).transpose(1, 2).reshape(grid.shape)


class EdgeNext(nn.Module):
    """A convolutional encoder of channels that come last, then split depthwise channel attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.split = SplitDepthwise()

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.ffn(self.near(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.split(x).mean((2, 3))


class ResidualReduction(nn.Module):
    """ViT-ResNAS: between stages a strided convolution, and beside it an average pool of what was there."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * WIDTH
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.first, self.last = Block(Attention()), Block(Attention(wide, 2 * HEADS), wide)
        self.down, self.norm, self.beside = nn.Conv2d(WIDTH, wide, 3, 2, 1), nn.LayerNorm(wide), nn.Linear(WIDTH, wide)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(tokens(self.stem(image)))
        grid = x.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        x = self.norm(tokens(self.down(grid))) + self.beside(tokens(F.avg_pool2d(grid, 2, 2)))
        return self.last(x).mean(1)


class DoubleWindows(nn.Module):
    """StyleSwin: half of the heads see windows, half see shifted ones; a style gives the scales of instance norms."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(1, SMALL**2, SMALL**2)) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def within(self, grid: Tensor, table: Tensor) -> Tensor:
        """Attention of one head in the windows of [B, 3 * d, H, W]."""
        q, k, v = windows(grid).chunk(3, -1)
        return merged((q @ k.transpose(-1, -2) * DEPTH**-0.5 + table).softmax(-1) @ v, SIDE)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.style(style)[:, None].chunk(2, -1)
        centred = x - x.mean(1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5) * (1 + scale) + shift
        grid = self.qkv(y).transpose(1, 2).reshape(-1, 3, HEADS, DEPTH, SIDE, SIDE)
        still, moved = (grid[:, :, i].flatten(1, 2) for i in range(2))
        moved = torch.roll(moved, (-SMALL // 2, -SMALL // 2), (2, 3))
        moved = torch.roll(self.within(moved, self.tables[1]), (SMALL // 2, SMALL // 2), (2, 3))
        x = x + self.out(tokens(torch.cat([self.within(still, self.tables[0]), moved], 1)))
        return x + self.ffn(x)


class StyleSwin(nn.Module):
    """A learned constant, a mapping of noise to styles, two blocks, an upsampling, colours."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, SIDE * SIDE, WIDTH))
        self.mapping = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH))
        self.blocks, self.colours = nn.ModuleList([DoubleWindows(), DoubleWindows()]), nn.Conv2d(WIDTH, 3, 1)

    def forward(self, noise: Tensor) -> Tensor:
        style = self.mapping(noise * torch.rsqrt(noise.square().mean(-1, keepdim=True) + 1e-8))
        x = self.start.expand(noise.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, style)
        grid = x.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        return self.colours(F.interpolate(grid, scale_factor=2.0, mode="bilinear", align_corners=False))


class TwoBackbones(nn.Module):
    """CBNet and ViT-CoMer: what a first backbone gives is added, resized, to the inputs of a second's stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(3, WIDTH, 4, 4)
        self.lead, self.main, self.cross = Block(Attention()), Block(Attention()), Across()
        self.join, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        lead = self.lead(tokens(self.near(image))).transpose(1, 2).reshape(-1, WIDTH, SMALL, SMALL)
        high = F.interpolate(self.join(lead), scale_factor=2.0, mode="bilinear", align_corners=False)
        x = self.main(tokens(self.stem(image) + high))
        return x + self.cross(self.norm(x), tokens(lead))


class Interleaved(nn.Module):
    """DAT-SR: attention of windows with a depthwise convolution of the values beside, each gating the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.near = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.GELU())
        self.space = nn.Sequential(nn.Conv2d(WIDTH, 2, 1), nn.GELU(), nn.Conv2d(2, 1, 1))
        self.channel = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, 2, 1), nn.GELU(), nn.Conv2d(2, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.qkv(x).transpose(1, 2).reshape(-1, 3 * WIDTH, SIDE, SIDE)
        near = self.near(grid[:, 2 * WIDTH :])
        q, k, v = windows(grid).unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = merged(y, SIDE)
        y = y * torch.sigmoid(self.channel(near)) + near * torch.sigmoid(self.space(y))
        return self.out(tokens(y))


class DualAggregation(nn.Module):
    """DAT-SR: such a block, gated feed-forward networks with a convolution on the gate, twice the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norms = nn.Conv2d(3, WIDTH, 3, padding=1), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mix, self.up, self.down = Interleaved(), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.last = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.Conv2d(WIDTH, 12, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.stem(image)
        x = tokens(first)
        x = x + self.mix(self.norms[0](x))
        one, two = F.gelu(self.up(self.norms[1](x))).chunk(2, -1)
        gate = tokens(self.gate(two.transpose(1, 2).reshape(first.shape)))
        x = x + self.down(one * gate)
        return F.pixel_shuffle(self.last(first + x.transpose(1, 2).reshape(first.shape)), 2)


class FlowGuided(nn.Module):
    """FGT: the last frame, moved by a flow of pixels, joins the current one before attention over both frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weigh = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(2 * WIDTH + 2, WIDTH, 1)
        self.space, self.time, self.up = Block(Attention()), Block(Attention()), nn.ConvTranspose2d(WIDTH, 3, 2, 2)

    def forward(self, video: Tensor, flow: Tensor) -> Tensor:
        before, now = self.stem(video[:, 0]), self.stem(video[:, 1])
        at = torch.arange(SIDE, dtype=flow.dtype)
        places = torch.stack([at[None].expand(SIDE, -1), at[:, None].expand(-1, SIDE)])
        moved = (2.0 * (places + flow) / (SIDE - 1) - 1.0).permute(0, 2, 3, 1)
        warped = F.grid_sample(before, moved, mode="bilinear", padding_mode="zeros", align_corners=True)
        now = now + torch.sigmoid(self.weigh(torch.cat([now, warped, flow], 1))) * warped
        grid = merged(self.space(windows(now)), SIDE)
        pair = self.time(torch.stack([tokens(warped), tokens(grid)], 2).reshape(-1, 2, WIDTH))
        return self.up(pair[:, 1].reshape(-1, SIDE * SIDE, WIDTH).transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE))


CHANNELS = ("attention-4d",)
ALONE = ("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out")
"""Heads of one projection that go to windows of their own, or windows that are cut behind the projection."""


def _staged(name: str, make: type[nn.Module], expect: Expect, side: int = 2 * SIDE) -> Entry:
    return Entry(name, seeded(make), ("image",), images(side), (BATCH,), expect)


ENTRIES: tuple[Entry, ...] = (
    _staged("fastervit", Carriers, Expect(2, 2, fused=True)),
    _staged("caformer", CaFormer, Expect(1, 2, ffns=2, fused=True)),
    _staged("edgenext", EdgeNext, Expect(1, 2, ffns=2, named=CHANNELS)),
    _staged("vit_resnas", ResidualReduction, Expect(2, (2, 4), fused=True)),
    Entry(
        "styleswin",
        seeded(StyleSwin),
        ("noise",),
        lambda batch, seq: (normal(batch, WIDTH),),
        (BATCH,),
        Expect(4, 1, ffns=2, mask="bias", fused=True, named=(*ALONE, "no-residual")),
    ),
    _staged("two_backbones", TwoBackbones, Expect(3, 2, ffns=2, fused=(True, True, False))),
    _staged("dat_sr", DualAggregation, Expect(1, 2, ffns=0, fused=True, named=(*ALONE, "no-residual")), SIDE),
    Entry(
        "fgt",
        seeded(FlowGuided),
        ("video", "flow"),
        lambda batch, seq: (normal(batch, 2, 3, 2 * SIDE, 2 * SIDE), normal(batch, 2, SIDE, SIDE)),
        (BATCH, BATCH),
        Expect(2, 2, fused=True),
    ),
)
"""FasterViT, CAFormer, EdgeNeXt, ViT-ResNAS, StyleSwin, CBNet and ViT-CoMer, DAT-SR, FGT."""
