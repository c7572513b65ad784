"""Calibration samples for the FX view: batches of similar length, and which of their tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from xopt.data.dataset import Dataset
from xopt.ir import walk
from xopt.ir.fx import as_tensors, run_with_values
from xopt.ir.structure import token_layout

MAX_TOKENS = 16_384
"""Tokens that calibration reads at most: an FFN of width 1536 has some ten rows for each unknown then."""
BATCH = 32
MASKED_BELOW = -100.0
"""A float mask below this hides a key: its weight is under e-40 beside an equal key."""


@dataclass(frozen=True)
class Batch:
    """Some samples: ``feeds`` by input name; ``valid`` bool [B, T] is False at padding, None where there is none."""

    feeds: Mapping[str, Tensor]
    valid: Tensor | None
    size: int

    def rows(self, value: Tensor) -> Tensor:
        """The tokens of a value [B, T, K] that are not padding, as [tokens, K] float32."""
        flat = value.detach().float()
        if self.valid is not None and tuple(flat.shape[:2]) == tuple(self.valid.shape):
            return flat[self.valid]
        return flat.reshape(-1, flat.shape[-1])


def batches(model: ir.Model, gm: fx.GraphModule, data: Dataset) -> list[Batch]:
    """Samples of similar length together, without columns that are padding in all of them.

    As many samples as ``MAX_TOKENS`` allows are taken from the front.
    """
    feeds = as_tensors({name: np.ascontiguousarray(array) for name, array in data.inputs.items()})
    valid = _valid_tokens(model, gm, feeds)
    tokens = torch.full((len(data),), _tokens_per_sample(model, feeds)) if valid is None else valid.sum(1)
    count = max(int((tokens.cumsum(0) <= MAX_TOKENS).sum()), 1)
    if valid is None:
        return [Batch({n: v[i] for n, v in feeds.items()}, None, len(i)) for i in torch.arange(count).split(BATCH)]
    lengths = (valid * torch.arange(1, valid.shape[1] + 1)).amax(1)[:count]
    trimmed = _trimmable(model, feeds, valid.shape[1])
    found = []
    for index in torch.argsort(lengths, stable=True).split(BATCH):
        longest = max(int(lengths[index].max()), 1) if trimmed else valid.shape[1]
        some = {n: v[index][:, :longest] if n in trimmed else v[index] for n, v in feeds.items()}
        found.append(Batch(some, valid[index, :longest], len(index)))
    return found


def _valid_tokens(model: ir.Model, gm: fx.GraphModule, feeds: Mapping[str, Tensor]) -> Tensor | None:
    """Whether a token is one, [N, T], from the mask [N, 1, 1 or T, T] that attention reads, or None without one."""
    mask = token_layout(model).padding_mask
    if mask is None:
        return None
    name = str(mask.name)
    with torch.no_grad():
        parts = [
            _attended(run_with_values(gm, {n: v[i : i + BATCH] for n, v in feeds.items()}, [name])[name])
            for i in range(0, len(next(iter(feeds.values()))), BATCH)
        ]
    return torch.cat(parts)


def _attended(mask: Tensor) -> Tensor:
    """Which keys are read, bool [N, T]; under a causal mask, those that read themselves."""
    shown = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
    return shown[:, 0, 0] if shown.shape[2] == 1 else shown[:, 0].diagonal(dim1=-2, dim2=-1)


def _tokens_per_sample(model: ir.Model, feeds: Mapping[str, Tensor]) -> int:
    """Tokens of a sample by the static shape of the attention, or the longest integer input."""
    from xopt.ir.structure import transformer_blocks

    shapes = [walk.shape_of(block.input) for block in transformer_blocks(model)]
    static = [shape[-2] for shape in shapes if shape is not None and len(shape) >= 2 and shape[-2] is not None]
    fed = [value.shape[1] for value in feeds.values() if value.ndim == 2]
    return int(max([1, *static, *fed]))


def _trimmable(model: ir.Model, feeds: Mapping[str, Tensor], length: int) -> list[str]:
    """Inputs whose second axis is the token axis: symbolic, one symbol for all that have this length; else none."""
    symbols = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name in feeds and feeds[name].ndim > 1 and feeds[name].shape[1] == length:
            dim = value.shape[1] if value.shape is not None else None
            symbols[name] = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return list(symbols) if len(set(symbols.values())) == 1 and None not in symbols.values() else []
