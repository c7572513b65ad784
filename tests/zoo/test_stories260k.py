"""A real decoder: stories260K keeps its published loss through export and canonicalization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from xopt.ir.canonical import canonicalize
from xopt.runtime.reference import ReferenceSession

from .entry import Entry, Expect, ids
from .exporting import Way, exported, load
from .stories260k import Tokenizer, stories
from .stories260k import load as load_stories

LONGEST = 512
"""Tokens of context that the model was trained on."""


@pytest.fixture(scope="module")
def canonical(shared_data: Path) -> ir.Model:
    entry = Entry(
        "stories260k",
        lambda attention: load_stories(shared_data / "stories260k"),
        ("ids",),
        lambda batch, seq: (ids(batch, seq, 512),),
        ({0: "batch", 1: "seq"},),
        Expect(5, 8, 4, causal=True, rotary=True),
    )
    model = load(exported(entry, Way("dynamo", 20, "", True, longest=LONGEST)))
    canonicalize(model)
    return model


def test_structure(canonical: ir.Model) -> None:
    nodes = [node for node in canonical.graph if node.op_type == "Attention"]
    assert len(nodes) == 5
    for node in nodes:
        assert [node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads", "is_causal")] == [8, 4, 1]
        assert len(node.inputs) == 3
    assert sum(node.op_type == "RotaryEmbedding" for node in canonical.graph) == 10
    assert sum(node.op_type == "RMSNormalization" for node in canonical.graph) == 11
    assert sum(node.op_type == "Swish" for node in canonical.graph) == 5


def test_loss_on_an_excerpt(canonical: ir.Model, shared_data: Path) -> None:
    """Equal to torch's in float64 to float32 rounding, story by story."""
    session = ReferenceSession(canonical)
    exact = load_stories(shared_data / "stories260k").double()
    for tokens in _tokens(shared_data, 200, 205):
        with torch.no_grad():
            want = _negative_log_likelihood(exact(torch.tensor([tokens])).numpy()[0], tokens)
        got = _negative_log_likelihood(session.run({"ids": np.asarray([tokens])})[session.outputs[0]][0], tokens)
        np.testing.assert_allclose(got, want, atol=2e-4)  # 5 blocks, logits up to 30: float32 keeps 1e-6 of them


@pytest.mark.slow
def test_published_loss(canonical: ir.Model, shared_data: Path) -> None:
    """1.547 nat a token on stories 200 to 399, as a plain torch forward pass gives."""
    session = ReferenceSession(canonical)
    losses = [
        _negative_log_likelihood(session.run({"ids": np.asarray([tokens])})[session.outputs[0]][0], tokens)
        for tokens in _tokens(shared_data, 200, 400)
    ]
    assert np.concatenate(losses).mean() == pytest.approx(1.547, abs=5e-4)


def _tokens(shared_data: Path, first: int, last: int) -> list[list[int]]:
    tokenizer = Tokenizer(shared_data / "stories260k")
    return [tokenizer.encode(text)[:LONGEST] for text in stories(shared_data / "tinystories", first, last)]


def _negative_log_likelihood(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Nat per token [seq - 1] of each next token."""
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    normalized = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -normalized[np.arange(len(tokens) - 1), tokens[1:]]
