"""Attention as torch's own modules write it, in both orders of their axes and by both exporters: found, and right."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from xopt.ir import canonicalize
from xopt.ir.batch import batch_axes
from xopt.runtime.reference import ReferenceSession

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 8, 2


class Itself(nn.Module):
    """Self-attention with the masks that it is given."""

    def __init__(self, batch_first: bool, heads: int = HEADS, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, heads, batch_first=batch_first)
        self.weights = weights

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        masks = {"key_padding_mask": padding, "attn_mask": mask}
        return x + self.attention(x, x, x, need_weights=self.weights, **masks)[0]


class Other(nn.Module):
    """Cross-attention, to a memory of the same width or of another."""

    def __init__(self, batch_first: bool, width: int = WIDTH) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, kdim=width, vdim=width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.attention(x, memory, memory, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layers(x, src_key_padding_mask=padding)


class Whole(nn.Module):
    """Encoder and decoder."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layers = nn.Transformer(WIDTH, HEADS, 1, 1, 16, 0.0, batch_first=batch_first)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.layers(source, target)


def _tokens(batch_first: bool, length: int = QUERIES, width: int = WIDTH) -> Tensor:
    x = torch.randn(length, BATCH, width, generator=torch.Generator().manual_seed(length))
    return x.transpose(0, 1).contiguous() if batch_first else x


PADDING = torch.arange(QUERIES)[None] >= torch.tensor([QUERIES, 2, 4])[:, None]
BIAS = torch.linspace(-1, 1, QUERIES * QUERIES).reshape(QUERIES, QUERIES)
CAUSAL = torch.ones(QUERIES, QUERIES).triu(1).bool()


def _nets(first: bool) -> dict[str, tuple[nn.Module, tuple[Tensor | None, ...], int]]:
    """Module, arguments, and how many attentions it has."""
    x, memory = _tokens(first), _tokens(first, KEYS)
    return {
        "self": (Itself(first), (x,), 1),
        "one-head": (Itself(first, 1), (x,), 1),
        "weights-not-read": (Itself(first, weights=True), (x,), 1),
        "padding": (Itself(first), (x, PADDING), 1),
        "bias": (Itself(first), (x, None, BIAS), 1),
        "causal": (Itself(first), (x, PADDING, CAUSAL), 1),
        "bias-of-heads": (Itself(first), (x, None, BIAS.repeat(BATCH * HEADS, 1, 1)), 1),
        "cross": (Other(first), (x, memory), 1),
        "cross-of-other-width": (Other(first, 6), (x, _tokens(first, KEYS, 6)), 1),
        "encoder": (Encoder(first), (x, PADDING), 2),
        "whole": (Whole(first), (memory, x), 3),
    }


NAMES = list(_nets(True))
CASES = [
    *((name, False, True, False) for name in NAMES), ("encoder", False, False, False), ("padding", False, True, True),
    ("whole", False, True, True), ("encoder", True, False, False), ("cross", True, False, True),
]  # fmt: skip
"""Name, whether by dynamo, with open axes, with the batch first."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def _exported(net: nn.Module, arguments: tuple[Tensor | None, ...], dynamo: bool, open_: bool, path: Path) -> ir.Model:
    given = [tensor for tensor in arguments if tensor is not None]
    names = [f"x{place}" for place in range(len(given))]
    open_axes = [
        {axis: f"d{size}" for axis, size in enumerate(tensor.shape) if size in (BATCH, QUERIES, KEYS)}
        for tensor in given
    ]
    with _quiet():
        if not dynamo:
            axes = dict(zip(names, open_axes)) if open_ else None
            torch.onnx.export(net, arguments, str(path), dynamo=False, input_names=names, dynamic_axes=axes)
            return ir.load(path)
        program = torch.onnx.export(net, arguments, dynamo=True, input_names=names, verbose=False)
        assert program is not None
        return program.model


@pytest.mark.parametrize(("name", "dynamo", "open_", "batch_first"), CASES)
def test_found_and_right(name: str, dynamo: bool, open_: bool, batch_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, arguments, count = _nets(batch_first)[name]
    with torch.no_grad():
        want = net.eval()(*arguments)
    model = _exported(net, arguments, dynamo, open_, tmp_path / "model.onnx")
    report = canonicalize(model)

    assert len(report.attention) == count
    feeds = [tensor.numpy() for tensor in arguments if tensor is not None]
    (got,) = ReferenceSession(model).run(dict(zip((str(x.name) for x in model.graph.inputs), feeds))).values()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    axes = batch_axes(model)
    batch = 0 if batch_first else 1
    assert set(axes.outputs.values()) == {batch}
    assert next(axes.inputs[str(x.name)] for x in model.graph.inputs) == batch
    if any(tensor is PADDING for tensor in arguments):
        assert axes.inputs[str(model.graph.inputs[1].name)] == 0


def test_a_length_left_in_a_target_is_that_of_the_inputs(tmp_path: Path) -> None:
    """TorchScript writes the length of the keys that it saw, whatever name their axis has: no other would run."""
    model = _exported(*_nets(False)["self"][:2], False, True, tmp_path / "model.onnx")
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["d5", "d3", "8"]
    canonicalize(model)
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["5", "d3", "8"]
