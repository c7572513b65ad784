"""Vision models that mix tokens by something else than a softmax over keys: channels, kernels, Fourier, convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect
from .mixers import DEPTH, HEADS, SIDE, WIDTH, Attention, of_maps, of_tokens


class CrossCovariance(Attention):
    """XCiT: channels attend to channels, of normalized queries and keys, a temperature per head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-2, -1) for part in self.split(x))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(x.shape))


class ChannelGroups(Attention):
    """DaViT: groups of channels attend to each other, over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = (k.transpose(-1, -2) @ (v * self.scale)).softmax(-1)
        y = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Transposed(nn.Module):
    """Restormer: channel attention on feature maps, after depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH)
        self.qkv, self.near = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(3 * WIDTH, 3 * WIDTH, 3, 1, 1, groups=3 * WIDTH)
        self.temperature, self.out = nn.Parameter(torch.rand(HEADS, 1, 1)), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        parts = self.near(self.qkv(self.norm(x))).chunk(3, 1)
        q, k, v = (part.reshape(batch, HEADS, DEPTH, height * width) for part in parts)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return x + self.out(y.reshape(batch, WIDTH, height, width))


class GatedConvolution(nn.Module):
    """Restormer's feed-forward: two branches of 1x1 and depthwise convolutions, one gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.near = nn.Conv2d(WIDTH, 64, 1), nn.Conv2d(64, 64, 3, 1, 1, groups=64)
        self.down = nn.Conv2d(32, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.near(self.up(x)).chunk(2, 1)
        return x + self.down(F.gelu(gate) * value)


class ReluLinear(nn.Module):
    """EfficientViT: ReLU features in place of the softmax, sums over the keys first, a normalizer beside."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False), nn.Conv2d(WIDTH, WIDTH, 1)
        self.near = nn.Conv2d(3 * WIDTH, 3 * WIDTH, 5, 1, 2, groups=3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.near(qkv)], 1).reshape(batch, -1, 3 * DEPTH, height * width).transpose(-1, -2)
        q, k, v = qkv[..., :DEPTH].relu(), qkv[..., DEPTH : 2 * DEPTH].relu(), qkv[..., 2 * DEPTH :]
        v = F.pad(v, (0, 1), value=1.0)
        y = q @ (k.transpose(-1, -2) @ v)
        y = (y[..., :-1] / (y[..., -1:] + 1e-6)).transpose(-1, -2).reshape(batch, 2, WIDTH, height, width).sum(1)
        return x + self.out(y)


class Kernelized(Attention):
    """Performer, EcoFormer, linear transformers: elu(x) + 1 as features."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums = torch.einsum("bhnd,bhne->bhde", k, v)
        norm = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6)
        return torch.einsum("bhnd,bhde,bhn->bhne", q, sums, norm)


class RandomFeatures(Attention):
    """Performer: positive features, exponentials of random projections that stay in range by the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("directions", torch.randn(16, DEPTH))

    def features(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        x = x * DEPTH**-0.25
        seen = x @ self.directions.t()
        half = x.square().sum(-1, keepdim=True) / 2
        return 0.25 * ((seen - half - seen.amax(axes, keepdim=True)).exp() + 1e-4)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.features(q, (-1,)), self.features(k, (-1, -2))
        return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2)[..., None])


class HashedCodes(Attention):
    """EcoFormer: queries and keys as signs by a learned kernel of few anchors, whose products count what agrees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.randn(HEADS, 6, DEPTH))
        self.codes = nn.Parameter(torch.randn(HEADS, 6, 8))

    def code(self, x: Tensor) -> Tensor:
        near = (-torch.cdist(x, self.anchors).square() / DEPTH).exp()
        return torch.sign(near @ self.codes - near.mean(-1, keepdim=True))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.code(q), self.code(k)
        total = 8.0 * k.shape[2] + (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return (q @ (k.transpose(-1, -2) @ v) + 8.0 * v.sum(2, keepdim=True)) / total


class BinaryAddition(Attention):
    """ShiftAddViT and BiViT: signs of queries and keys, weights of powers of two, products of signs with sums."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.sign(q) @ torch.sign(k).transpose(-1, -2) * self.scale).softmax(-1)
        return 2.0 ** torch.round(torch.log2(weights)) @ v


class EfficientAttention(Attention):
    """Softmax on queries and on keys apart (efficient attention, Lambda networks)."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


class SigmoidAttention(Attention):
    """A sigmoid in place of the softmax."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.transpose(-1, -2) * self.scale - 3.0) @ v


class ReluAttention(Attention):
    """A squared ReLU, divided by the number of keys (Primer-like, ViT with ReLU)."""

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.relu(q @ k.transpose(-1, -2) * self.scale) ** 2 / k.shape[-2]) @ v


class Fourier(nn.Module):
    """FNet: the real part of a 2-D Fourier transform."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class FrequencyFilter(nn.Module):
    """AFNO and GFNet: a filter in the frequencies of the grid, small ones cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(2, SIDE, SIDE // 2 + 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.fft.rfft2(x.view(-1, SIDE, SIDE, WIDTH), dim=(1, 2), norm="ortho")
        real = F.softshrink(grid.real * self.weight[0] - grid.imag * self.weight[1], 0.01)
        imag = F.softshrink(grid.real * self.weight[1] + grid.imag * self.weight[0], 0.01)
        y = torch.fft.irfft2(torch.complex(real, imag), s=(SIDE, SIDE), dim=(1, 2), norm="ortho")
        return y.reshape(x.shape)


class AutoCorrelation(Attention):
    """Autoformer: values are turned by the delays at which queries and keys agree most, found by their spectra; the
    moving average is taken off.
    """

    best = 3

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.fft.rfft(q, dim=2), torch.fft.rfft(k, dim=2)
        both = torch.complex(q.real * k.real + q.imag * k.imag, q.imag * k.real - q.real * k.imag)
        agrees = torch.fft.irfft(both, n=v.shape[2], dim=2).mean((1, 3))
        weights, delays = agrees.topk(self.best, -1)
        places = (delays[..., None] + torch.arange(v.shape[2]))[:, None, :, :, None]
        twice = torch.cat([v, v], 2)[:, :, None].expand(-1, -1, self.best, -1, -1)
        turned = twice.gather(3, places.expand(-1, HEADS, -1, -1, DEPTH))
        return (turned * weights.softmax(-1)[:, None, :, None, None]).sum(2)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        ends = torch.cat([y[:, :1].expand(-1, 2, -1), y, y[:, -1:].expand(-1, 2, -1)], 1)
        return y - F.avg_pool1d(ends.transpose(1, 2), 5, 1).transpose(1, 2)


class TokenMlp(nn.Module):
    """MLP-Mixer: a feed-forward over the tokens of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SIDE * SIDE, 32), nn.GELU(), nn.Linear(32, SIDE * SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class LargeKernel(nn.Module):
    """LKA: a depthwise, a dilated depthwise and a pointwise convolution give weights that multiply the map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)
        self.near = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.far, self.mix = nn.Conv2d(WIDTH, WIDTH, 7, padding=9, groups=WIDTH, dilation=3), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.first(self.norm(x)))
        return x + y * self.mix(self.far(self.near(y)))


class GatedRecursive(nn.Module):
    """HorNet: products of gates of growing width, each after a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, 2 * WIDTH, 1)
        self.near = nn.Conv2d(24, 24, 7, padding=3, groups=24)
        self.grow, self.out = nn.Conv2d(8, 16, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, rest = torch.split(self.first(self.norm(x)), (8, 24), 1)
        one, two = torch.split(self.near(rest), (8, 16), 1)
        return x + self.out(self.grow(gate * one) * two)


class Wavelet(nn.Module):
    """RobustFormer: a Haar wavelet transform by strided slices; only its low band goes on, by a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Conv2d(4 * WIDTH, 4 * WIDTH, 3, padding=1, groups=4), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :, 0::2, 0::2] / 2, x[:, :, 0::2, 1::2] / 2
        c, d = x[:, :, 1::2, 0::2] / 2, x[:, :, 1::2, 1::2] / 2
        bands = torch.cat([a + b + c + d, -a - b + c + d, -a + b - c + d, a - b - c + d], 1)
        return x + self.out(self.mix(bands))


class PositionByConvolution(Attention):
    """CPVT: positions by a depthwise convolution of the grid, before the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).view(-1, WIDTH, SIDE, SIDE)
        return super().forward(self.position(grid).flatten(2).transpose(1, 2) + x)


class Scan(nn.Module):
    """Vision Mamba: a selective state space, forwards and backwards over the tokens, as a loop over positions."""

    def __init__(self, states: int = 4) -> None:
        super().__init__()
        self.states = states
        self.first, self.steps = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * states + WIDTH)
        self.rates, self.skip = nn.Parameter(torch.rand(WIDTH, states)), nn.Parameter(torch.ones(WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def scan(self, x: Tensor) -> Tensor:
        step, into, out = torch.split(self.steps(x), (WIDTH, self.states, self.states), -1)
        step = F.softplus(step)
        kept = torch.exp(step[..., None] * -self.rates)
        added = (step * x)[..., None] * into[:, :, None]
        state, ys = torch.zeros_like(added[:, 0]), []
        for position in range(0, x.shape[1], 8):  # every eighth token: the form is what counts
            state = kept[:, position] * state + added[:, position]
            ys.append((state * out[:, position, None]).sum(-1))
        return torch.stack(ys, 1).repeat_interleave(8, 1) + x * self.skip

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.first(x).chunk(2, -1)
        y = F.silu(y)
        y = self.scan(y) + self.scan(y.flip(1)).flip(1)
        return self.out(y * F.silu(gate))


CHANNELS = ("attention-4d",)
"""Channels attend to channels: there is no axis of positions beside heads."""

ENTRIES: tuple[Entry, ...] = (
    of_tokens("xcit", CrossCovariance, Expect(2, 2, named=CHANNELS)),
    of_tokens("davit_channels", ChannelGroups, Expect(2, 2, named=CHANNELS)),
    of_maps(
        "restormer",
        lambda: [Transposed(), GatedConvolution(), nn.PixelUnshuffle(2), nn.PixelShuffle(2)],
        Expect(1, 2, ffns=0, named=CHANNELS),
        fixed=8,
    ),
    of_maps("efficientvit", lambda: [ReluLinear(), ReluLinear()], Expect(0, 2, ffns=0, named=("linear-attention",))),
    of_tokens("kernelized", Kernelized, Expect(0, 2, ffns=2, named=("linear-attention",))),
    of_tokens("performer", RandomFeatures, Expect(0, 2, ffns=2, named=("linear-attention",))),
    of_tokens("ecoformer", HashedCodes, Expect(0, 2, ffns=2, named=("linear-attention",))),
    of_tokens("shift_add", BinaryAddition, Expect(0, 2, named=("weights-log",), ffns=2)),
    of_tokens(
        "efficient_attention", EfficientAttention, Expect(0, 2, ffns=2, named=("softmax-axis", "linear-attention"))
    ),
    of_tokens("sigmoid_attention", SigmoidAttention, Expect(0, 2, ffns=2, named=("no-softmax",))),
    of_tokens("relu_attention", ReluAttention, Expect(0, 2, ffns=2, named=("no-softmax",))),
    of_tokens("fnet", Fourier, Expect(0, 2, ffns=2, named=("fourier",)), "none"),
    of_tokens("afno", FrequencyFilter, Expect(0, 2, ffns=2, named=("fourier",)), "none"),
    of_tokens("autoformer", AutoCorrelation, Expect(0, 2, ffns=2, named=("fourier",)), "none"),
    of_tokens("mlp_mixer", TokenMlp, Expect(0, 2, ffns=4)),
    of_maps("lka", lambda: [LargeKernel(), LargeKernel()], Expect(0, 2, ffns=0)),
    of_maps("hornet", lambda: [GatedRecursive(), GatedRecursive()], Expect(0, 2, ffns=0)),
    of_maps("wavelet", lambda: [Wavelet()], Expect(0, 2, ffns=0), fixed=8),
    of_tokens("cpvt", PositionByConvolution, Expect(2, 2, fused=True)),
    of_tokens("vision_mamba", Scan, Expect(0, 2, ffns=2, named=("hidden-is-read-elsewhere",))),
)
"""Channel, linear and softmax-free attention, Fourier and wavelet mixers, gated and large-kernel convolution, scans."""
