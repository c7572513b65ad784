"""State spaces, matrix memories, memories trained while they run, and spikes: beside attention or in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, WIDTH, Attention, Block, images, of_tokens, seeded

STATES = 4


def selective(kept: Tensor, added: Tensor) -> Tensor:
    """States [B, T, ...] of ``state = kept * state + added``, a step for each position."""
    state, states = torch.zeros_like(added[:, 0]), []
    for position in range(added.shape[1]):
        state = kept[:, position] * state + added[:, position]
        states.append(state)
    return torch.stack(states, 1)


class Selective(nn.Module):
    """What a selective scan takes of its input: how much is kept, what is added, and how it is read."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.width, self.steps = width, nn.Linear(width, width + 2 * STATES)
        self.rates, self.skip = nn.Parameter(torch.rand(width, STATES)), nn.Parameter(torch.ones(width))

    def states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T, C, S] and what reads them [B, T, 1, S]."""
        step, into, out = torch.split(self.steps(x), (self.width, STATES, STATES), -1)
        step = F.softplus(step)
        kept = torch.exp(step[..., None] * -self.rates)
        return selective(kept, (step * x)[..., None] * into[:, :, None]), out[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        states, out = self.states(x)
        return (states * out).sum(-1) + x * self.skip


class Every(nn.Module):
    """A mixer of few tokens: means of neighbours go in, results are repeated."""

    def __init__(self, inner: nn.Module, count: int = 8) -> None:
        super().__init__()
        self.inner, self.count = inner, count

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.unflatten(1, (self.count, -1)).mean(2))
        return y.repeat_interleave(x.shape[1] // self.count, 1)


class Aggregated(Attention):
    """A2Mamba: attention maps mix the states of the scan before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.scan = Selective()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        states, out = self.scan.states(v.transpose(1, 2).flatten(2))
        by_head = states.unflatten(2, (HEADS, DEPTH)).permute(0, 2, 1, 3, 4).flatten(3)
        mixed = (weights @ by_head).unflatten(3, (DEPTH, STATES)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        return self.proj((mixed * out).sum(-1))


class Dual(nn.Module):
    """Mamba-2: one decay for each head, so that a chunk is a masked product; states go from chunk to chunk."""

    chunk = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.near = (
            nn.Linear(WIDTH, 2 * WIDTH + 2 * STATES + HEADS),
            nn.Conv1d(WIDTH + 2 * STATES, WIDTH + 2 * STATES, 4, padding=3, groups=WIDTH + 2 * STATES),
        )
        self.rates, self.bias = nn.Parameter(torch.rand(HEADS)), nn.Parameter(torch.rand(HEADS))
        self.norm, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        gate, mixed, step = torch.split(self.first(x), (WIDTH, WIDTH + 2 * STATES, HEADS), -1)
        mixed = F.silu(self.near(mixed.transpose(1, 2))[..., :length].transpose(1, 2))
        step = F.softplus(step + self.bias)
        v, k, q = torch.split(mixed, (WIDTH, STATES, STATES), -1)
        v = v.unflatten(-1, (HEADS, DEPTH)) * step[..., None]
        v, k, q, log = (part.unflatten(1, (-1, self.chunk)) for part in (v, k, q, -step * self.rates.exp()))
        total = log.permute(0, 3, 1, 2).cumsum(-1)
        apart = total[..., :, None] - total[..., None, :]
        shown = torch.ones(self.chunk, self.chunk, dtype=torch.bool).tril()
        decay = apart.masked_fill(~shown, float("-inf")).exp()
        y = torch.einsum("bcls,bcms,bhclm,bcmhd->bclhd", q, k, decay, v)
        rest = (total[..., -1:] - total).exp()
        states = torch.einsum("bcms,bhcm,bcmhd->bchds", k, rest, v)
        state, before = torch.zeros_like(states[:, 0]), []
        for chunk in range(length // self.chunk):
            before.append(state)
            state = state * total[:, :, chunk, -1, None, None].exp() + states[:, chunk]
        y = y + torch.einsum("bcls,bchds,bhcl->bclhd", q, torch.stack(before, 1), total.exp())
        return self.out(self.norm(y.reshape(batch, length, WIDTH) * F.silu(gate)))


class Vamba(nn.Module):
    """Vamba: frames go through Mamba-2, few words attend to them and to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.words = nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4)), nn.Embedding(50, WIDTH)
        self.scan, self.own = Block(Dual()), Block(Attention())
        self.norm, self.q, self.kv, self.out = (
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        frames = self.scan(self.frames(video).flatten(2).transpose(1, 2))
        words = self.own(self.words(text))
        q = self.q(self.norm(words)).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)
        k, v = self.kv(self.norm(frames)).unflatten(-1, (2, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return words + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HalfScanned(nn.Module):
    """MambaVision: half of the channels are scanned, half are only convolved, both are joined."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.first, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.one, self.two = (nn.Conv1d(half, half, 3, padding="same", groups=half) for _ in range(2))
        self.scan = Every(Selective(half))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.first(x).transpose(1, 2).chunk(2, 1)
        one, two = F.silu(self.one(one)).transpose(1, 2), F.silu(self.two(two)).transpose(1, 2)
        return self.out(torch.cat([self.scan(one), two], -1))


class MambaVision(nn.Module):
    """Convolutions at the high resolution, then scans and, in the last blocks, attention in windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.near = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        )
        self.gamma, self.blocks = (
            nn.Parameter(torch.rand(WIDTH, 1, 1)),
            nn.Sequential(Block(HalfScanned()), Block(Attention())),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.gamma * self.near(x)
        windows = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, WIDTH)
        y = self.blocks(windows).unflatten(1, (4, 4)).unflatten(0, (-1, 2, 2)).permute(0, 5, 1, 3, 2, 4)
        return y.flatten(4).flatten(2, 3).mean((2, 3))


class MatrixMemory(Attention):
    """xLSTM's mLSTM in its parallel form: exponential input gates, forget gates as sums of logarithms, kept in range
    by the largest of each row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.norm = nn.Linear(WIDTH, 2 * HEADS), nn.GroupNorm(HEADS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        into, kept = self.gates(x).transpose(1, 2).chunk(2, 1)
        total = F.logsigmoid(kept).cumsum(-1)
        log = total[..., :, None] - total[..., None, :] + into[..., None, :]
        shown = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        log = log.masked_fill(~shown, float("-inf"))
        largest = log.max(-1, keepdim=True).values
        weights = q @ k.transpose(-1, -2) * self.scale * (log - largest).exp()
        norm = torch.maximum(weights.sum(-1, keepdim=True).abs(), (-largest).exp())
        y = (weights / (norm + 1e-6) @ v).transpose(1, 2).flatten(2)
        return self.proj(self.norm(y.flatten(0, 1)).view_as(x))


class ScalarMemory(nn.Module):
    """xLSTM's sLSTM: exponential gates with a state that keeps them in range; gates also read the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        given = self.into(x)
        h = c = n = m = torch.zeros_like(x[:, 0])
        seen = []
        for position in range(x.shape[1]):
            z, i, f, o = (given[:, position] + self.again(h)).chunk(4, -1)
            log = F.logsigmoid(f) + m
            largest = torch.maximum(log, i)
            into, kept, m = (i - largest).exp(), (log - largest).exp(), largest
            c, n = kept * c + into * torch.tanh(z), kept * n + into
            h = torch.sigmoid(o) * c / n
            seen.append(h)
        return torch.stack(seen, 1)


class Xlstm(nn.Module):
    """A block of each memory over token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mixed, self.head = nn.Embedding(50, WIDTH), Block(MatrixMemory()), nn.Linear(WIDTH, 50)
        self.scalar = Block(ScalarMemory())

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.scalar(self.mixed(self.embed(text))))


class XlstmUNet(nn.Module):
    """xLSTM-UNet in three dimensions: strides, a matrix memory over the voxels, and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, WIDTH, 2, 2)
        self.norm, self.memory = nn.InstanceNorm3d(WIDTH, affine=True), Block(MatrixMemory())
        self.up, self.last = nn.ConvTranspose3d(WIDTH, 8, 2, 2), nn.Conv3d(16, 3, 1)

    def forward(self, volume: Tensor) -> Tensor:
        before = F.leaky_relu(self.first(volume))
        x = F.leaky_relu(self.norm(self.down(before)))
        y = self.memory(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return self.last(torch.cat([self.up(y), before], 1))


class Atlas(Attention):
    """ATLAS, Titans: a matrix learns while it runs to give the values for the keys of a chunk; momentum, and steps of
    Newton and Schulz that make the gradient orthogonal (Muon).
    """

    chunk, polynomial = 8, (3.4445, -4.775, 2.0315)

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Linear(WIDTH, 3)

    def orthogonal(self, gradient: Tensor) -> Tensor:
        a, b, c = self.polynomial
        x = gradient / (torch.linalg.matrix_norm(gradient, keepdim=True) + 1e-7)
        for _ in range(2):
            square = x @ x.transpose(-1, -2)
            x = a * x + (b * square + c * square @ square) @ x
        return x

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, q = F.normalize(k, dim=-1), F.normalize(q, dim=-1)
        k = torch.cat([k, k * k], -1)
        q = torch.cat([q, q * q], -1)
        memory = momentum = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None])
        seen = []
        for start in range(0, q.shape[2], self.chunk):
            keys, values = k[:, :, start : start + self.chunk], v[:, :, start : start + self.chunk]
            gradient = keys.transpose(-1, -2) @ (keys @ memory - values)
            momentum = 0.9 * momentum - 0.1 * gradient
            memory = 0.95 * memory + self.orthogonal(momentum)
            seen.append(q[:, :, start : start + self.chunk] @ memory)
        return torch.cat(seen, 2)


class FourierConvolution(nn.Module):
    """S4D, S4WM: the response of a diagonal state space, as long as the sequence, is multiplied in frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imag = nn.Parameter(torch.rand(WIDTH, STATES)), nn.Parameter(3 * torch.rand(WIDTH, STATES))
        self.read, self.step = nn.Parameter(torch.randn(WIDTH, STATES, 2)), nn.Parameter(torch.rand(WIDTH, 1))
        self.skip = nn.Parameter(torch.rand(WIDTH))
        self.out = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        length, u = x.shape[1], x.transpose(1, 2)
        times = torch.arange(length) * self.step[..., None]
        size, angle = torch.exp(-self.real.exp()[..., None] * times), self.imag[..., None] * times
        response = (size * (self.read[..., :1] * angle.cos() - self.read[..., 1:] * angle.sin())).sum(1)
        both = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(response, n=2 * length)
        y = torch.fft.irfft(both, n=2 * length)[..., :length] + u * self.skip[:, None]
        return F.glu(self.out(F.gelu(y.transpose(1, 2))), -1)


class Spikes(nn.Module):
    """A leaky membrane: it adds up what comes in at each time step, and starts again where it has fired."""

    def forward(self, x: Tensor) -> Tensor:
        """[times, ...] -> 0 or 1."""
        potential, fired = torch.zeros_like(x[0]), []
        for given in x.unbind(0):
            potential = potential + (given - potential) / 2.0
            spikes = (potential >= 0.5).to(x.dtype)
            potential = potential * (1.0 - spikes)
            fired.append(spikes)
        return torch.stack(fired)


class Spikformer(nn.Module):
    """Spikformer, spiking LMUFormer: attention of spikes without a softmax, at each of some time steps."""

    times = 4

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.fire = nn.Conv2d(3, WIDTH, 4, 4), Spikes()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = x[None] * torch.linspace(0.5, 2.0, self.times)[:, None, None, None]
        spikes = self.fire(x)
        q, k, v = (self.fire(part(spikes)).unflatten(-1, (HEADS, DEPTH)).transpose(2, 3) for part in self.parts[:3])
        y = self.fire((q @ k.transpose(-1, -2) @ v * 0.25).transpose(2, 3).flatten(3))
        x = x + self.parts[3](y)
        x = x + self.down(self.fire(self.up(self.fire(x))))
        return self.head(x.mean((0, 2)))


def _text(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (batch, 12), generator=torch.Generator().manual_seed(batch)),)


ENTRIES: tuple[Entry, ...] = (
    of_tokens(
        "a2mamba",
        lambda: Every(Aggregated()),
        Expect(2, 2, named=("no-projection-out", "no-projection-v", "no-residual")),
        "static",
    ),
    of_tokens("mamba2_chunks", Dual, Expect(0, 2, ffns=2), "none"),
    Entry(
        "vamba",
        seeded(Vamba),
        ("video", "text"),
        lambda batch, seq: (normal(batch, 3, 4, 16, 16), *_text(batch, seq)),
        (BATCH, BATCH),
        Expect(2, 2, fused=(True, False)),
        torchscript="none",
    ),
    Entry(
        "mambavision",
        seeded(MambaVision),
        ("image",),
        images(),
        (BATCH,),
        Expect(1, 2, ffns=2, fused=True),
        torchscript="static",
    ),
    Entry("xlstm", seeded(Xlstm), ("text",), _text, (BATCH,), Expect(0, 2, ffns=2, named=("no-softmax",))),
    Entry(
        "xlstm_unet",
        seeded(XlstmUNet),
        ("volume",),
        lambda batch, seq: (normal(batch, 1, 8, 4, 4),),
        (BATCH,),
        Expect(0, 2, ffns=1, named=("no-softmax",)),
    ),
    of_tokens("atlas", Atlas, Expect(0, 2, ffns=2, named=("linear-attention", "no-softmax"))),
    of_tokens("s4d", FourierConvolution, Expect(0, 2, ffns=2, named=("cos-axes", "fourier")), "none"),
    Entry(
        "spikformer",
        seeded(Spikformer),
        ("image",),
        images(),
        (BATCH,),
        Expect(0, 2, named=("linear-attention",)),
        torchscript="static",
    ),
)
"""A2Mamba, Mamba-2, Vamba, MambaVision, xLSTM and its U-Net, ATLAS, S4D, Spikformer."""
