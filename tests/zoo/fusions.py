"""Dense prediction of our own: dense links, levels that meet, deformable sampling, changes, slices of volumes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, SIDE, WIDTH, Across, Attention, Block, images, seeded
from .stages import SMALL, merged, tokens, windows


def grid_of(x: Tensor, side: int = SIDE) -> Tensor:
    """[B, side * side, C] -> [B, C, side, side]."""
    return x.transpose(1, 2).reshape(-1, x.shape[-1], side, side)


def larger(grid: Tensor, factor: float) -> Tensor:
    return F.interpolate(grid, scale_factor=factor, mode="bilinear", align_corners=False)


class ShiftedWindows(Attention):
    """Swin on [B, N, C]: a bias by relative place; windows that a shift has made of distant parts are masked."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__(width)
        self.shift = shift
        at = torch.stack(torch.meshgrid(torch.arange(SMALL), torch.arange(SMALL), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + SMALL - 1
        self.register_buffer("place", apart[0] * (2 * SMALL - 1) + apart[1])
        self.table = nn.Parameter(torch.randn((2 * SMALL - 1) ** 2, HEADS))
        part = torch.arange(SIDE).ge(SIDE - SMALL).long() + torch.arange(SIDE).ge(SIDE - shift).long() * (shift > 0)
        part = windows((3 * part[:, None] + part)[None, None].float())[..., 0]
        self.register_buffer("mask", torch.where(part[:, None] == part[:, :, None], 0.0, -100.0))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.scale + self.table[self.place].permute(2, 0, 1)
        if self.shift:
            count, area = self.mask.shape[:2]
            scores = (scores.reshape(-1, count, HEADS, area, area) + self.mask[:, None]).reshape(-1, HEADS, area, area)
        return scores.softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.roll(grid_of(x), (-self.shift, -self.shift), (2, 3))
        grid = merged(super().forward(windows(grid)), SIDE)
        return tokens(torch.roll(grid, (self.shift, self.shift), (2, 3)))


class DenseLinks(nn.Module):
    """DRCT: each block reads what all before it gave; twice the pixels at the end."""

    def __init__(self) -> None:
        super().__init__()
        grown = [WIDTH, WIDTH + 8, WIDTH + 16]
        self.stem, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 12, 3, padding=1)
        self.blocks = nn.ModuleList(Block(ShiftedWindows(width, 2 * (i % 2)), width) for i, width in enumerate(grown))
        self.adjust = nn.ModuleList(nn.Conv2d(width, out, 1) for width, out in zip(grown, (8, 8, WIDTH)))

    def forward(self, image: Tensor) -> Tensor:
        first = self.stem(image)
        seen = [first]
        for block, adjust in zip(self.blocks, self.adjust):
            y = adjust(grid_of(block(tokens(torch.cat(seen, 1)))))
            seen.append(F.leaky_relu(y, 0.2))
        return F.pixel_shuffle(self.last(first + 0.2 * y), 2)


class TwoLevels(nn.Module):
    """HiFormer: of two levels of a pyramid each one's mean asks the tokens of the other; both are seen in the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.down, self.head = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.large, self.small = Block(ShiftedWindows(WIDTH, 2)), Block(Attention())
        self.across = nn.ModuleList(Across() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        near = self.stem(image)
        many, few = self.large(tokens(near)), self.small(tokens(self.down(near)))
        of_many, of_few = (norm(x.mean(1, keepdim=True)) for norm, x in zip(self.norms, (many, few)))
        many, few = many + self.across[0](of_few, many), few + self.across[1](of_many, few)
        return self.head(larger(grid_of(many) + larger(grid_of(few, SMALL), 2.0), 2.0))


class Sampled(nn.Module):
    """Deformable attention: a token weighs what lies at places, of each level, that it computes itself."""

    POINTS = 3

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels, count = levels, HEADS * levels * self.POINTS
        self.offsets, self.weights = nn.Linear(WIDTH, 2 * count), nn.Linear(WIDTH, count)
        self.value, self.out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, places: Tensor, *maps: Tensor) -> Tensor:
        """x [B, N, C]; places [N, 2] from 0 to 1."""
        batch, count = x.shape[:2]
        shape = (batch, count, HEADS, self.levels, self.POINTS)
        offsets = self.offsets(x).reshape(*shape, 2) / SIDE
        weights = self.weights(x).reshape(*shape[:3], -1).softmax(-1)
        at = (2.0 * (places[:, None, None, None] + offsets) - 1.0).transpose(1, 2).flatten(0, 1)
        found = []
        for level, values in enumerate(maps):
            heads = self.value(values).reshape(-1, DEPTH, *values.shape[2:])
            found.append(F.grid_sample(heads, at[:, :, level], align_corners=False))
        weights = weights.transpose(1, 2).reshape(-1, 1, count, self.levels * self.POINTS)
        y = (torch.cat(found, -1) * weights).sum(-1)
        return self.out(y.reshape(batch, WIDTH, count).transpose(1, 2))


class ConvolutionsBeside(nn.Module):
    """ViT-CoMer: a pyramid of convolutions feeds a transformer and is fed by it, by deformable attention."""

    def __init__(self) -> None:
        super().__init__()
        at = (torch.arange(SIDE) + 0.5) / SIDE
        self.register_buffer("places", torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(-1, 2))
        self.patches, self.fine, self.coarse = (nn.Conv2d(3, WIDTH, size, size) for size in (2, 2, 4))
        self.near = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, size, 1, size // 2, groups=WIDTH) for size in (3, 5))
        self.into, self.back = Sampled(2), Sampled(1)
        self.gamma, self.norms = nn.Parameter(torch.rand(WIDTH)), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.block, self.head = Block(Attention()), nn.Conv2d(WIDTH, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = tokens(self.patches(image))
        fine, coarse = (near(stem(image)) for near, stem in zip(self.near, (self.fine, self.coarse)))
        x = self.block(x + self.gamma * self.into(self.norms[0](x), self.places, fine, coarse))
        y = tokens(fine)
        y = y + self.back(self.norms[1](y), self.places, grid_of(x))
        return self.head(larger(grid_of(y) + larger(coarse, 2.0), 2.0))


class Changes(nn.Module):
    """ChangeViT: a transformer and a small net of details see two images; what differs asks for details."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, WIDTH, 4, 4), Block(Attention())
        self.details = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.norm, self.ask, self.head = nn.LayerNorm(WIDTH), Across(), nn.Conv2d(WIDTH, 2, 3, padding=1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        coarse = [self.block(tokens(self.patches(image))) for image in (before, after)]
        fine = [self.details(image) for image in (before, after)]
        apart, near = torch.abs(coarse[0] - coarse[1]), torch.abs(fine[0] - fine[1])
        apart = apart + self.ask(self.norm(apart), tokens(near))
        return self.head(larger(near + larger(grid_of(apart, SMALL), 2.0), 2.0)).softmax(1)


class Dilated(nn.Module):
    """MACMD: channels meet in convolutions of several dilations; a gate of the decoder weighs the encoder's map."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 1, rate, rate, WIDTH) for rate in (1, 2, 3))
        self.norm, self.mix, self.gate = nn.GroupNorm(4, WIDTH), nn.Conv2d(3 * WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = larger(x, 2.0)
        x = x + skip * torch.sigmoid(self.gate(F.relu(x + skip)))
        y = torch.cat([near(x) for near in self.near], 1)
        batch, _, high, wide = y.shape
        y = y.reshape(batch, 3, WIDTH, high, wide).transpose(1, 2).reshape(batch, 3 * WIDTH, high, wide)
        return x + F.hardswish(self.norm(self.mix(y)))


class DilatedDecoder(nn.Module):
    """A transformer of strided patches at the bottom of two dilated decoder blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1)
        self.bottom, self.block = nn.Conv2d(WIDTH, WIDTH, 2, 2), Block(Attention())
        self.decoders, self.head = nn.ModuleList([Dilated(), Dilated()]), nn.Conv2d(WIDTH, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        full = F.relu(self.stem(image))
        half = F.relu(self.down(full))
        x = grid_of(self.block(tokens(self.bottom(half))), SMALL)
        return self.head(self.decoders[1](self.decoders[0](x, half), full))


class Slices(nn.Module):
    """CT-D2GAN: volumes go down by 3-D convolutions; the slices attend to each other; up again, all directions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, WIDTH, 3, (1, 2, 2), 1), nn.InstanceNorm3d(WIDTH, affine=True))
        self.across, self.within = Block(Attention()), Block(Attention())
        self.up, self.out = nn.ConvTranspose3d(WIDTH, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Conv3d(WIDTH, 1, 3, padding=1)

    def forward(self, volume: Tensor) -> Tensor:
        x = F.leaky_relu(self.down(volume), 0.2)
        batch, width, slices, high, wide = x.shape
        y = self.across(x.permute(0, 3, 4, 2, 1).reshape(-1, slices, width))
        y = y.reshape(batch, high * wide, slices, width).transpose(1, 2)
        y = self.within(y.reshape(-1, high * wide, width)).reshape(batch, slices, high, wide, width)
        y = self.up(y.permute(0, 4, 1, 2, 3))
        return self.out(y + F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="trilinear", align_corners=False))


def _dense(name: str, make: type[nn.Module], expect: Expect, side: int = 2 * SIDE) -> Entry:
    return Entry(name, seeded(make), ("image",), images(side), (BATCH,), expect)


ENTRIES: tuple[Entry, ...] = (
    _dense("drct", DenseLinks, Expect(3, 2, mask="bias", fused=True), SIDE),
    _dense("hiformer_levels", TwoLevels, Expect(4, 2, ffns=2, named=("no-residual",))),
    _dense("vit_comer", ConvolutionsBeside, Expect(1, 2, fused=True)),
    Entry(
        "changevit",
        seeded(Changes),
        ("before", "after"),
        lambda batch, seq: (normal(batch, 3, 2 * SIDE, 2 * SIDE), normal(batch, 3, 2 * SIDE, 2 * SIDE).flip(0)),
        (BATCH, BATCH),
        Expect(3, 2, ffns=2),
    ),
    _dense("macmd", DilatedDecoder, Expect(1, 2, fused=True)),
    Entry(
        "ct_d2gan",
        seeded(Slices),
        ("volume",),
        lambda batch, seq: (normal(batch, 1, 4, SIDE, SIDE),),
        (BATCH,),
        Expect(2, 2, fused=True),
    ),
)
"""DRCT, HiFormer, ViT-CoMer, ChangeViT, MACMD, CT-D2GAN."""
