"""Layers of ``com.microsoft`` that carry a state from token to token, and positions of three kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ir.contrib import below, check, normal, positive

B, T, H, G, K, V = 2, 5, 2, 3, 4, 6
STATE = normal(B, H, K, V)


def unit(*shape: int) -> np.ndarray:
    keys = normal(*shape, K)
    return (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(*shape[:-1], shape[-1] * K)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize(("past", "wide"), [(True, True), (False, False)])
def test_linear_attention(rule: str, groups: int, past: bool, wide: bool, tmp_path: Path) -> None:
    """Decays for each head or each element of keys; rates for each head or for all."""
    inputs: list[Any] = [normal(B, T, H * groups * K), unit(B, T, H), normal(B, T, H * V), STATE if past else None]
    inputs.append(-positive(B, T, H * K if wide else H) if "gated" in rule else None)
    inputs.append(1 / (1 + np.exp(-normal(B, T, H if wide else 1))) if "delta" in rule else None)
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"update_rule": rule, "q_num_heads": H * groups, "kv_num_heads": H}
    check(tmp_path, "LinearAttention", inputs, attributes, outputs=["y", "state"], fixed=(3,), tolerance=1e-4)


@pytest.mark.parametrize("b", [None, normal(B, T, H)])
def test_gates_of_linear_attention(b: Any, tmp_path: Path) -> None:
    inputs = [normal(B, T, H), normal(H), -positive(H), *([] if b is None else [b])]
    check(tmp_path, "LinearAttentionGate", inputs, outputs=["decay", *([] if b is None else ["beta"])])


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("past", [True, False])
def test_causal_convolution(activation: str, dilation: int, past: bool, tmp_path: Path) -> None:
    state = normal(B, 6, 3 * dilation) if past else None
    inputs = [normal(B, 6, T), normal(6, 1, 4), normal(6), state][: 4 if past else 3]
    attributes = {"activation": activation, "dilation": dilation}
    check(tmp_path, "CausalConvWithState", inputs, attributes, outputs=["y", "state"], fixed=(1, 2, 3))


@pytest.mark.parametrize(("layout", "sections"), [(0, [2, 3, 3]), (1, [4, 2, 2]), (0, [8, 0, 0])])
@pytest.mark.parametrize("shape", [(B, T, 32), (B, 2, T, 16)])
def test_positions_of_three_kinds(layout: int, sections: list[int], shape: tuple[int, ...], tmp_path: Path) -> None:
    inputs = [normal(*shape), below(9, 3, B, T, dtype=np.int64), normal(9, 8), normal(9, 8)]
    attributes = {"mrope_section": sections, "mrope_layout": layout, "num_heads": 2}
    check(tmp_path, "MRotaryEmbedding", inputs, attributes, constants=(2, 3), fixed=(1,))


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("channels", [False, True])
def test_quantized_lstm(kind: Any, direction: str, channels: bool, tmp_path: Path) -> None:
    """onnxruntime rounds the activations to 8 bits, too."""
    ways, hidden = 2 if direction == "bidirectional" else 1, 8
    grid = (ways, 4 * hidden) if channels else (ways,)
    parts: list[Any] = []
    for _ in "WR":
        middle = np.full(grid, 128 if kind == np.uint8 else 0, kind)
        parts += [np.full(grid, 0.01, np.float32), middle]
    w, r = (below(64, ways, size, 4 * hidden, dtype=np.uint8) for size in (6, hidden))
    w, r = ((one + 96).astype(kind) if kind == np.uint8 else (one.astype(kind) - 32).astype(kind) for one in (w, r))
    inputs = [normal(T, B, 6), w, r, normal(ways, 8 * hidden), None, None, None, None, *parts]
    attributes = {"hidden_size": hidden, "direction": direction}
    check(
        tmp_path, "DynamicQuantizeLSTM", inputs, attributes, outputs=["y", "h", "c"],
        constants=(1, 2, 3, 8, 9, 10, 11), tolerance=0.02,
    )  # fmt: skip
