"""Calibration samples for the FX view: batches of similar length, and which of their tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from xopt.data.dataset import Dataset
from xopt.ir import walk
from xopt.ir.batch import BatchAxes, follow
from xopt.ir.batch_rules import Place
from xopt.ir.fx import as_tensors, run_with_values
from xopt.ir.poly import Poly
from xopt.ir.structure import token_layout

MAX_TOKENS = 16_384
"""Tokens that calibration reads at most: an FFN of width 1536 has some ten rows for each unknown then."""
BATCH = 32
MASKED_BELOW = -100.0
"""A float mask below this hides a key: its weight is under e-40 beside an equal key."""


@dataclass(frozen=True)
class Batch:
    """Some samples, in one run of the model.

    Attributes:
        feeds: by input name.
        valid: bool [B, T], False at padding; None where there is none.
        size: samples in the run.
        count: those of them that count; the others fill up a fixed batch, and come last.
        places: where the samples lie in values, by name.
    """

    feeds: Mapping[str, Tensor]
    valid: Tensor | None
    size: int
    count: int
    places: Mapping[str, Place] = field(default_factory=dict)

    def rows(self, name: str, value: Tensor) -> Tensor:
        """The tokens of the value [B, T, K] called ``name`` that are not padding, as [tokens, K] float32."""
        samples, width = self.by_sample(name, value), value.shape[-1]
        if self.valid is not None and tuple(samples.shape[:2]) == tuple(self.valid.shape):
            return samples[self.valid].float()
        return samples.reshape(-1, width).float()

    def by_sample(self, name: str, value: Tensor) -> Tensor:
        """The value with the samples that count on its first axis; as [1, ...] where no axis has them."""
        place = self.places.get(name, _FIRST)
        value = value.detach()
        outer = place.outer.constant or 1
        whole = outer * self.size
        if not value.ndim or place.axis == value.ndim - 1 or value.shape[place.axis] % whole:
            return value[None]
        moved = value.movedim(place.axis, 0)
        if len(moved) == self.size:
            return moved[: self.count]
        parts = moved.reshape(outer, self.size, -1, *moved.shape[1:])
        return parts.movedim(1, 0)[: self.count].flatten(1, 2)


_FIRST = Place(0)


def batches(model: ir.Model, gm: fx.GraphModule, data: Dataset) -> list[Batch]:
    """Samples of similar length together, without columns that are padding in all of them.

    As many samples as ``MAX_TOKENS`` allows are taken from the front. Where the model fixes its batch, the last run is
    filled up.
    """
    data = data.fitted(model)
    assert data.axes is not None
    places = {str(v.name): place for v, place in _places(model, data.axes).items()}
    valid = _valid_tokens(model, gm, data)
    tokens = torch.full((len(data),), _tokens_per_sample(model, data)) if valid is None else valid.sum(1)
    count = max(int((tokens.cumsum(0) <= MAX_TOKENS).sum()), 1)
    if valid is None:
        runs = data.runs(np.arange(count), BATCH)
        return [_batch(index, feeds, None, places) for index, feeds in runs]
    lengths = (valid * torch.arange(1, valid.shape[1] + 1)).amax(1)[:count]
    trimmed = _trimmable(model, data, valid.shape[1])
    found = []
    for index, feeds in data.runs(torch.argsort(lengths, stable=True).numpy(), BATCH):
        longest = max(int(lengths[index].max()), 1) if trimmed else valid.shape[1]
        some = {n: v[:, :longest] if n in trimmed else v for n, v in feeds.items()}
        found.append(_batch(index, some, valid[index, :longest], places))
    return found


def _batch(
    index: np.ndarray, feeds: Mapping[str, np.ndarray], valid: Tensor | None, places: Mapping[str, Place]
) -> Batch:
    tensors = as_tensors({name: np.asarray(array, order="C") for name, array in feeds.items()})
    sizes = [feeds[n].shape[places[n].axis] for n in feeds if n in places]
    return Batch(tensors, valid, max([len(index), *sizes]), len(index), places)


def _places(model: ir.Model, axes: BatchAxes) -> Mapping[ir.Value, Place]:
    """Where the samples lie in each value of the canonical model."""
    for value in model.graph.inputs:
        axis = axes.inputs.get(str(value.name))
        if axis is not None and value.shape is not None:
            dim = value.shape[axis]
            size = Poly.of(dim) if isinstance(dim, int) else Poly.axis(str(dim.value))
            return follow(model.graph, axes.inputs, size).places
    return {}


def _valid_tokens(model: ir.Model, gm: fx.GraphModule, data: Dataset) -> Tensor | None:
    """Whether a token is one, [N, T], from the mask [N, 1, 1 or T, T] that attention reads, or None without one.

    Nor is there one where the mask is not of all samples of a run, each its own.
    """
    mask = token_layout(model).padding_mask
    if mask is None:
        return None
    parts = []
    for index, feeds in data.runs(np.arange(len(data)), BATCH):
        with torch.no_grad():
            shown = _attended(run_with_values(gm, feeds, [str(mask.name)])[str(mask.name)])
        if len(shown) < len(index):
            return None
        parts.append(shown[: len(index)])
    return torch.cat(parts)


def _attended(mask: Tensor) -> Tensor:
    """Which keys are read, bool [N, T]; under a causal mask, those that read themselves."""
    shown = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
    return shown[:, 0, 0] if shown.shape[2] == 1 else shown[:, 0].diagonal(dim1=-2, dim2=-1)


def _tokens_per_sample(model: ir.Model, data: Dataset) -> int:
    """Tokens of a sample by the static shape of the attention, or the longest integer input."""
    from xopt.ir.structure import transformer_blocks

    shapes = [walk.shape_of(block.input) for block in transformer_blocks(model)]
    static = [shape[-2] for shape in shapes if shape is not None and len(shape) >= 2 and shape[-2] is not None]
    fed = [a.shape[1 - axis] for n, a in data.inputs.items() if a.ndim == 2 and (axis := data.axis(n)) in (0, 1)]
    return int(max([1, *static, *fed]))


def _trimmable(model: ir.Model, data: Dataset, length: int) -> list[str]:
    """Inputs whose second axis is the token axis: symbolic, one symbol for all that have this length; else none."""
    symbols = {}
    for value in model.graph.inputs:
        name = str(value.name)
        array = data.inputs.get(name)
        if array is not None and name not in data.varying and array.ndim > 1 and array.shape[1] == length:
            dim = value.shape[1] if value.shape is not None else None
            symbols[name] = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return list(symbols) if len(set(symbols.values())) == 1 and None not in symbols.values() else []
