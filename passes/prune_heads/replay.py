"""Calibration samples, and the graph run over them node by node so that values can be read and replaced on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from xopt.data.dataset import Dataset
from xopt.ir import walk
from xopt.ir.fx import run_with_values
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
    feeds = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.inputs.items()}
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
    """Whether a token is one, [N, T], from the mask of keys [N, 1, 1, T] that attention reads, or None without one."""
    mask = token_layout(model).padding_mask
    if mask is None:
        return None
    with torch.no_grad():
        parts = [
            run_with_values(gm, {n: v[i : i + BATCH] for n, v in feeds.items()}, [str(mask.name)])[str(mask.name)]
            for i in range(0, len(next(iter(feeds.values()))), BATCH)
        ]
    value = torch.cat(parts)
    attended = value if value.dtype == torch.bool else value > MASKED_BELOW
    return attended.reshape(len(value), -1) if attended.ndim == 4 else None


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


class Replay:
    """The graph in execution over all batches at once, one node after the other.

    A value lives until its last reader has run.
    """

    def __init__(self, gm: fx.GraphModule, feeds: Sequence[Mapping[str, Tensor]]) -> None:
        self._gm = gm
        self._interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        self._nodes: Iterator[fx.Node] = iter(gm.graph.nodes)
        self._pending: fx.Node | None = next(self._nodes)
        self._named = {node.name: node for node in gm.graph.nodes}
        self._given: dict[fx.Node, list[Tensor]] = {}
        self._readers = {node: len(node.users) for node in gm.graph.nodes}
        self._inputs = {target: name for name, target in gm.meta["inputs"].items()}
        self._feeds = feeds
        self._values: list[dict[fx.Node, Tensor]] = [{} for _ in feeds]

    def node(self, value: ir.Value) -> fx.Node:
        """The fx node that makes a value of the main graph."""
        return self._named[self._gm.meta["values"][value.name]]

    def advance(self, to: ir.Value) -> None:
        """Run everything that comes before the node that makes ``to``."""
        stop = self.node(to)
        while self._pending is not None and self._pending is not stop and self._pending.op != "output":
            self._run(self._pending)
            self._pending = next(self._nodes, None)

    def complete(self, value: ir.Value) -> None:
        """Run everything up to the node that makes ``value``, that node too."""
        self.advance(value)
        if self._pending is self.node(value):
            self._run(self._pending)
            self._pending = next(self._nodes, None)

    def values(self, of: ir.Value) -> list[Tensor] | None:
        """A value in each batch; None where it is not computed yet."""
        node = self.node(of)
        found = [values[node] for values in self._values if node in values]
        return found if len(found) == len(self._values) else None

    def give(self, to: ir.Value, values: list[Tensor]) -> None:
        """Let ``to`` be these values, instead of what its node would compute."""
        self._given[self.node(to)] = values

    def _run(self, node: fx.Node) -> None:
        for index, values in enumerate(self._values):
            if node in self._given:
                values[node] = self._given[node][index]
            elif node.op == "placeholder":
                values[node] = self._feeds[index][self._inputs[str(node.target)]]
            else:
                self._interpreter.env = values
                values[node] = self._interpreter.run_node(node)
        self._given.pop(node, None)
        for source in node.all_input_nodes:
            self._readers[source] -= 1
            if not self._readers[source]:
                for values in self._values:
                    values.pop(source, None)
