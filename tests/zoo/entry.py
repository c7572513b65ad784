"""What a zoo model is: how to build it, what to feed it, and the attention blocks it must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Axes = dict[int, str]
"""Names of an input's dynamic axes."""


MaskKind = Literal["none", "padding", "bias"]


@dataclass(frozen=True)
class Expect:
    """Attention blocks and feed-forward networks of the canonical model.

    What is a tuple has an item per attention, in order. ``mask`` is ``"padding"`` for a mask over keys alone
    ([B,1,1,T]), ``"bias"`` for any other mask; a ``scale`` of None is the usual one; ``ffns`` counts
    feed-forward networks, as many as attentions where it is not said; ``named`` has the reasons that ``xopt inspect``
    gives for what is in no block.
    """

    count: int
    heads: int | tuple[int, ...]
    kv_heads: int | None = None
    causal: bool | tuple[bool, ...] = False
    mask: MaskKind | tuple[MaskKind, ...] = "none"
    fused: bool | tuple[bool, ...] = False
    softcap: float = 0.0
    scale: float | tuple[float | None, ...] | None = None
    rotary: bool = False
    ffns: int | None = None
    named: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Entry:
    """One zoo model.

    Args:
        build: attention implementation ("sdpa", "eager", or "" for models of our own) -> module in eval mode.
        inputs: names of the forward arguments, in order.
        feeds: (batch, sequence) -> random arguments in that order.
        axes: dynamic axes of each argument, in order.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: tuple[str, ...]
    feeds: Callable[[int, int], tuple[Tensor, ...]]
    axes: tuple[Axes, ...]
    expect: Expect
    attentions: tuple[str, ...] = ("",)
    torchscript: Literal["dynamic", "static", "none"] = "dynamic"
    """How TorchScript can export it: tracing bakes some sizes in, and lacks some operators."""


def ids(batch: int, seq: int, vocab: int) -> Tensor:
    """int64 [batch, seq] token ids that use the whole vocabulary."""
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(batch * 1000 + seq))


def mask(batch: int, seq: int) -> Tensor:
    """int64 [batch, seq] of 1 (token) and 0 (padding on the right; each sample keeps at least one token)."""
    lengths = torch.tensor([max(1, seq - 2 * sample) for sample in range(batch)])
    return (torch.arange(seq)[None, :] < lengths[:, None]).long()


def normal(*shape: int) -> Tensor:
    """float32 standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
