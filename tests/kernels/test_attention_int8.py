"""Fused attention on integers against float64 on the numbers that they stand for, and exactly where all is exact."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.isas import PAIRS, parameters
from tests.kernels.test_attention import SMALL, make_mask, reference, workload
from xopt.kernels import attention
from xopt.kernels.attention import Config, Workload, fused
from xopt.kernels.isa import AVX2, AVX2_VNNI, AVX512, AVX512_VNNI, NEON, Isa

ISAS = parameters(AVX512, AVX512_VNNI, AVX2, AVX2_VNNI, NEON)


def stored(rng: np.random.Generator, b: int, s: int, heads: int, d: int, symmetric: bool):
    """Integers [b, s, heads * d], their scales and zero points by head, and the numbers that they stand for."""
    q = rng.integers(0, 256, (b, s, heads, d), np.uint8)
    scale = rng.uniform(0.005, 0.02, heads).astype(np.float32)
    zero = np.full(heads, 128) if symmetric else rng.integers(0, 256, heads)
    numbers = (q.astype(np.float64) - zero[:, None]) * scale.astype(np.float64)[:, None]
    return q.reshape(b, s, -1), (scale, zero), numbers.reshape(b, s, -1)


def check(compiled, w: Workload, isa: Isa, b: int, s: int, t: int, seed: int = 0, config: Config | None = SMALL):
    rng = np.random.default_rng(seed)
    parts = [
        stored(rng, b, s, w.heads, w.head_dim, symmetric=True),
        stored(rng, b, t, w.kv_heads, w.head_dim, symmetric=False),
        stored(rng, b, t, w.kv_heads, w.v_head_dim, symmetric=False),
    ]
    (q, k, v), mask = (numbers for _, _, numbers in parts), make_mask(w, b, s, t, rng)
    tensors = [integers for integers, _, _ in parts]
    inputs = [np.concatenate(tensors, -1)] if w.q.buffer == w.v.buffer else tensors
    inputs += [attention.grids(*(grid for _, grid, _ in parts))] + ([] if mask is None else [mask])
    expected = reference(w, q, k, v, mask)
    [found] = compiled(attention, w, isa, config)(*inputs, out=[expected.shape])
    # Each weight is off by at most half of a 255th of the largest, of which the sum of all weights is at least one,
    # and moves the mean by its distance from the values; the largest may change while keys are read, once per block.
    spread = np.ptp(v.reshape(b, t, -1), axis=1).max()
    bound = spread * t * (0.5 / 255) / np.maximum(weight_of_all(w, q, k, mask), 1.0) + 1e-4
    assert (np.abs(found - expected) <= bound).all()


def weight_of_all(w: Workload, q: np.ndarray, k: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The sum of weights in units of the largest [b, s, heads * dv]: one over the mean of that key's indicator."""
    b, t = k.shape[:2]
    ones = np.eye(t)[None, :, None, :].repeat(w.kv_heads, 2).repeat(b, 0).reshape(b, t, -1)
    weights = reference(w, q, k, ones, mask).reshape(b, q.shape[1], w.heads, t)
    largest = weights.max(-1)
    return np.where(largest > 0, 1 / np.maximum(largest, 1e-30), 1.0).repeat(w.v_head_dim, axis=-1)


def test_the_heuristic_over_several_blocks_of_keys(compiled):
    w = workload(2, 2, 16, 16, causal=True, layout=fused, operands="int8")
    for length in (1, 16, 33, 253):
        check(compiled, w, PAIRS, 1, length, length, config=None)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact(compiled, isa: Isa):
    """Equal scores give every key the same weight, which 8 bits hold: O is the mean of V, and 4 keys divide exactly."""
    w = workload(1, 1, 4, 16, operands="int8")
    rng = np.random.default_rng(0)
    q, k = np.full((1, 3, 4), 128, np.uint8), rng.integers(0, 256, (1, 4, 4), np.uint8)
    v = rng.integers(0, 256, (1, 4, 16), np.uint8)
    grids = attention.grids(([1.0], [128]), ([1.0], [3]), ([1.0], [7]))
    [o] = compiled(attention, w, isa, SMALL)(q, k, v, grids, out=[(1, 3, 16)])
    np.testing.assert_array_equal(o, np.broadcast_to(v.astype(np.float32).mean(1) - 7, o.shape))


@pytest.mark.parametrize("isa", ISAS)
def test_scores_are_exact(compiled, isa: Isa):
    """Scores far apart give all of the weight to the key that matches best, even if by one only."""
    w = workload(1, 1, 8, 16, operands="int8", scale=1.0)
    rng = np.random.default_rng(1)
    q, k, v = (rng.integers(0, 256, (1, length, d), np.uint8) for length, d in ((20, 8), (11, 8), (11, 16)))
    zero = 77
    scores = (q[0].astype(int) - 128) @ (k[0].astype(int) - zero).T
    assert (np.diff(np.sort(scores, axis=1)[:, -2:]) > 0).all()  # no ties
    grids = attention.grids(([1.0], [128]), ([100.0], [zero]), ([1.0], [0]))
    [o] = compiled(attention, w, isa, SMALL)(q, k, v, grids, out=[(1, 20, 16)])
    np.testing.assert_allclose(o[0], v[0][scores.argmax(1)], rtol=0, atol=255 * 2.0**-22)  # 1 / 255 is rounded
