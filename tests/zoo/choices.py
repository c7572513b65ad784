"""Models that choose at run time how often a block runs, whether it does, and which one: loops and branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Axes, Entry, Expect, ids
from .mixers import WIDTH, seeded

BATCH_SEQ: Axes = {0: "batch", 1: "seq"}


class Step(nn.Module):
    """A block as functions of tensors alone, which both exporters can put into a loop or a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).reshape(x.size(0), x.size(1), 3, 2, 8).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(qkv[0] @ qkv[1].transpose(-2, -1) * 0.35355339, -1)
        x = x + self.proj((weights @ qkv[2]).transpose(1, 2).reshape(x.size(0), x.size(1), 16))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Looped(nn.Module):
    """Looped transformer: one block runs again and again, with the input added each time."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for _ in range(3):
            state = self.step(state + x)
        return state


class LoopedAsAsked(Looped):
    """As often as an input says."""

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        state = x
        for _ in range(int(times)):
            state = self.step(state + x)
        return state


class UntilStill(nn.Module):
    """MuE: layers run until what they give is like what they got, at most as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, x: Tensor) -> Tensor:
        alike, count = torch.zeros(()), 0
        while bool(alike < 0.98) and count < 6:
            y = self.step(x)
            alike = F.cosine_similarity(x, y, dim=-1).mean()
            x, count = y, count + 1
        return x


class EarlyExit(nn.Module):
    """The second block, and its head, run where the first head is not sure enough."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Step(), Step()
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.heads[0](x.mean(1))
        if bool(y.softmax(-1).amax(-1).min() < 0.5):
            y = self.heads[1](self.second(x).mean(1))
        return y


class Gated(nn.Module):
    """I3D: a gate of the input says of each layer whether it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.two = nn.Linear(WIDTH, 2), Step(), Step()

    def forward(self, x: Tensor) -> Tensor:
        runs = self.gate(x.mean((0, 1))) > 0
        if bool(runs[0]):
            x = self.one(x)
        if bool(runs[1]):
            x = self.two(x)
        return x


class OneOfThree(nn.Module):
    """SCOPE, S4D MoAE: a router takes one of three encoders, of different depth and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.one, self.two, self.far = nn.Linear(WIDTH, 3), Step(), Step(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        choice = int(self.router(x.mean((0, 1))).argmax())
        if choice == 0:
            y = self.one(x)
        elif choice == 1:
            y = self.two(self.one(x))
        else:
            y = torch.tanh(self.far(x))
        return y


class OfWords(nn.Module):
    """Embeddings of token ids go into the model; scripted as a whole, it keeps its loops and branches."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(50, WIDTH), inner

    def forward(self, text: Tensor) -> Tensor:
        return self.inner(self.embed(text))


class OfWordsAsAsked(OfWords):
    def forward(self, text: Tensor, times: Tensor) -> Tensor:
        return self.inner(self.embed(text), times)


class Branches(nn.Module):
    """The same choices as torch.export takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second, self.skip = (
            nn.Embedding(50, WIDTH),
            Step(),
            Step(),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, text: Tensor) -> Tensor:
        x = self.first(self.embed(text))
        sure = self.skip(x).mean() > 0
        return torch.cond(sure, lambda y: self.second(y), lambda y: y + self.skip(y), (x,))


class While(nn.Module):
    """A looped transformer whose loop the exporter writes, until what changes is small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step = nn.Embedding(50, WIDTH), Step()

    def forward(self, text: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        x = self.embed(text)

        def goes_on(count: Tensor, state: Tensor) -> Tensor:
            return count < 3

        def body(count: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return count + 1, self.step(state)

        return while_loop(goes_on, body, (torch.zeros((), dtype=torch.int64), x))[1]


class Scanned(nn.Module):
    """A gated recurrence that the exporter writes as Scan."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.keep, self.into, self.out = (
            nn.Embedding(50, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip

    def forward(self, text: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        x = self.embed(text)
        keep, into = torch.sigmoid(self.keep(x)), self.into(x)

        def step(state: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            state = given[0] * state + (1 - given[0]) * given[1]
            return state, state.clone()

        _, seen = scan(step, torch.zeros_like(x[:, 0]), (keep.transpose(0, 1), into.transpose(0, 1)))
        return x + self.out(seen.transpose(0, 1))


def _words(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (ids(batch, seq, 50),)


def _scripted(name: str, inner: Callable[[], nn.Module], expect: Expect) -> Entry:
    return Entry(name, seeded(lambda: torch.jit.script(OfWords(inner()))), ("text",), _words, (BATCH_SEQ,), expect)


def _by_dynamo(name: str, make: type[nn.Module], expect: Expect) -> Entry:
    return Entry(name, seeded(make), ("text",), _words, (BATCH_SEQ,), expect, torchscript="none")


ENTRIES: tuple[Entry, ...] = (
    _scripted("looped", Looped, Expect(3, 2)),
    Entry(
        "looped_as_asked",
        seeded(lambda: torch.jit.script(OfWordsAsAsked(LoopedAsAsked()))),
        ("text", "times"),
        lambda batch, seq: (ids(batch, seq, 50), torch.tensor(batch + 1)),
        (BATCH_SEQ, {}),
        Expect(0, 2, named=("inside-loop",)),
    ),
    _scripted("until_still", UntilStill, Expect(0, 2, named=("inside-loop",))),
    _scripted("early_exit", EarlyExit, Expect(1, 2, named=("inside-if",))),
    _scripted("layer_gates", Gated, Expect(0, 2, named=("inside-if",))),
    _scripted("one_of_three", OneOfThree, Expect(0, 2, named=("inside-if",))),
    _by_dynamo("branches", Branches, Expect(1, 2, named=("inside-if",))),
    _by_dynamo("while_loop", While, Expect(0, 2, named=("inside-loop",))),
    _by_dynamo("scanned", Scanned, Expect(0, 2)),
)
"""Looped transformers, layers that run until nothing changes, early exits, gates of layers, one encoder of three."""
