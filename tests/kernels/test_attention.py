"""Fused attention against float64 numpy: masks, causal, groups, odd sizes, layouts, special values."""

from __future__ import annotations

import ast
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xopt.kernels import attention
from xopt.kernels.attention import Config, Workload, fused, separate
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa

ISAS = [pytest.param(isa, id=isa.name) for isa in (AVX512, AVX2, NEON)]
# A small block of keys and small tiles: short sequences then cross every boundary, and compile fast.
SMALL = Config(1, 8, 4, 5)


def workload(
    heads: int, kv_heads: int, d: int, dv: int, *, layout=separate, dims=(None, None, None), **options
) -> Workload:
    options = {"scale": 1 / math.sqrt(d), **layout(heads, kv_heads, d, dv), **options}
    return Workload(*dims, heads, kv_heads, d, dv, **options)


def reference(w: Workload, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Q [B,S,H*d], K [B,T,Hkv*d], V [B,T,Hkv*dv] in float64; rows that see nothing give zeros."""

    def split(x: np.ndarray, heads: int) -> np.ndarray:
        x = x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        return x.repeat(w.heads // heads, axis=1)

    q, k, v = split(q, w.heads), split(k, w.kv_heads), split(v, w.kv_heads)
    score = q @ k.swapaxes(-1, -2) * w.scale
    if w.softcap:
        score = w.softcap * np.tanh(score / w.softcap)
    if mask is not None:
        score = np.where(mask, score, -np.inf) if w.mask == "bool" else score + mask
    if w.causal:
        score = np.where(np.tri(*score.shape[-2:], dtype=bool), score, -np.inf)
    top = score.max(-1, keepdims=True)
    p = np.exp(score - np.where(np.isneginf(top), 0, top))
    total = p.sum(-1, keepdims=True)
    y = p @ v / np.where(total == 0, 1, total)
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


def make_mask(w: Workload, b: int, s: int, t: int, rng: np.random.Generator) -> np.ndarray | None:
    shape = tuple(1 if extent == 1 else full for extent, full in zip(w.mask_shape, (b, w.heads, s, t)))
    if w.mask == "bool":
        return rng.random(shape) < 0.5
    if w.mask == "float":
        hidden = -1e4 if w.mask_shape[3] != 1 else 0.0  # added to every key it would only round the scores
        return np.where(rng.random(shape) < 0.2, hidden, rng.standard_normal(shape)).astype(np.float32)
    return None


def check(
    compiled, w: Workload, isa: Isa, b: int, s: int, t: int, seed: int = 0, config: Config | None = SMALL
) -> None:
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((b, s, w.heads * w.head_dim)).astype(np.float32)
    k = 2 * rng.standard_normal((b, t, w.kv_heads * w.head_dim)).astype(np.float32)
    v = rng.standard_normal((b, t, w.kv_heads * w.v_head_dim)).astype(np.float32)
    mask = make_mask(w, b, s, t, rng)
    inputs = [np.concatenate([q, k, v], -1)] if w.q.buffer == w.v.buffer else [q, k, v]
    inputs += [] if mask is None else [mask]
    expected = reference(w, q, k, v, mask)
    [o] = compiled(attention, w, isa, config)(*inputs, out=[expected.shape])
    # Scores of magnitude up to ~20 are rounded at 2**-24 each over d products; the weights inherit that error.
    np.testing.assert_allclose(o, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 3), s=st.integers(1, 70), t=st.integers(1, 40), seed=st.integers(0, 999))
def test_any_length(compiled, isa: Isa, b: int, s: int, t: int, seed: int):
    check(compiled, workload(2, 1, 19, 7), isa, b, s, t, seed, Config(2, 8, 4, 5))


HEADS = [
    (AVX512, 2, 2, 64, 64),
    (AVX512, 4, 2, 32, 48),
    (AVX512, 1, 1, 1, 1),
    (AVX2, 3, 1, 13, 21),
    (NEON, 3, 1, 13, 21),
]


@pytest.mark.parametrize(("isa", "heads", "kv_heads", "d", "dv"), HEADS)
def test_head_sizes_in_a_fused_projection(compiled, isa: Isa, heads: int, kv_heads: int, d: int, dv: int):
    w = workload(heads, kv_heads, d, dv, layout=fused)
    for length in (1, 5, 17, 40):
        check(compiled, w, isa, 2, length, length, length)


MASKS = [
    ("bool", (None, 1, 1, None), False),
    ("bool", (None, 1, 1, None), True),
    ("float", (None, 1, 1, None), False),
    ("bool", (None, 1, None, None), False),
    ("float", (1, None, None, None), True),
    ("float", (1, 1, None, 1), False),
]


@pytest.mark.parametrize(("mask", "mask_shape", "causal"), MASKS)
def test_masks(compiled, mask: str, mask_shape: tuple, causal: bool):
    w = workload(2, 2, 8, 8, mask=mask, mask_shape=mask_shape, causal=causal)
    for b, s, t in ((1, 1, 1), (2, 9, 9), (3, 20, 37), (1, 40, 11)):
        check(compiled, w, AVX512, b, s, t, s)


@pytest.mark.parametrize("shape", [(None, 1, 1, None), (None, 1, None, None)])
def test_a_row_hidden_by_the_lowest_number_is_the_mean(compiled, shape: tuple):
    """As in ONNX: so low an addend takes the place of every score. Keys hidden by an infinity stay out of it."""
    w = workload(2, 2, 8, 8, mask="float", mask_shape=shape)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 20, 16)).astype(np.float32) for _ in range(3))
    mask = np.full((2, 1, 1 if shape[2] == 1 else 20, 20), np.finfo(np.float32).min)
    mask[1, ..., 3:] = -np.inf
    [o] = compiled(attention, w, AVX512, SMALL)(q, k, v, mask, out=[q.shape])
    for row, keys in ((0, 20), (1, 3)):
        expected = np.broadcast_to(v[row, :keys].astype(np.float64).mean(0), (20, 16))
        np.testing.assert_allclose(o[row], expected, rtol=0, atol=1e-6)  # sums of 20 numbers of size 1


@pytest.mark.parametrize("isa", ISAS[1:])
def test_masks_at_other_widths(compiled, isa: Isa):
    w = workload(2, 1, 8, 8, mask="bool", mask_shape=(None, None, None, None), causal=True, softcap=3.0)
    for b, s, t in ((2, 9, 9), (1, 33, 20)):
        check(compiled, w, isa, b, s, t, s)


def test_soft_cap(compiled):
    check(compiled, workload(2, 2, 16, 16, softcap=2.0, scale=1.0), AVX512, 2, 13, 29)


def test_the_heuristic_over_several_blocks_of_keys(compiled):
    w = workload(2, 2, 16, 16, causal=True, layout=fused)
    for length in (1, 16, 33, 253, 600):
        check(compiled, w, AVX512, 1, length, length, config=None)


def test_static_dimensions(compiled):
    check(compiled, workload(2, 2, 16, 16, dims=(1, 7, 30)), AVX512, 1, 7, 30, config=None)


def test_rows_without_any_key_give_zeros_for_a_bool_mask(compiled):
    w = workload(1, 1, 4, 4, mask="bool", mask_shape=(1, 1, None, None))
    x = np.ones((1, 20, 4), np.float32)
    mask = np.ones((1, 1, 20, 20), bool)
    mask[0, 0, 3], mask[0, 0, 5, :15] = False, False
    [o] = compiled(attention, w, AVX512, SMALL)(x, x, x, mask, out=[(1, 20, 4)])
    assert (o[0, 3] == 0).all() and np.allclose(np.delete(o[0], 3, axis=0), 1)


def test_padding_keys_may_hold_nan_scores(compiled):
    w = workload(1, 1, 4, 4, mask="bool", mask_shape=(None, 1, 1, None))
    x, k = np.ones((1, 6, 4), np.float32), np.ones((1, 6, 4), np.float32)
    k[0, 4:] = np.nan
    mask = np.array([1, 1, 1, 1, 0, 0], bool).reshape(1, 1, 1, 6)
    [o] = compiled(attention, w, AVX512, SMALL)(x, k, x, mask, out=[(1, 6, 4)])
    assert np.allclose(o, 1)


def test_nan_stays_in_its_query(compiled):
    w = workload(1, 1, 4, 4)
    q, x = np.ones((1, 20, 4), np.float32), np.ones((1, 20, 4), np.float32)
    q[0, 7, 2] = np.nan
    [o] = compiled(attention, w, AVX512, SMALL)(q, x, x, out=[(1, 20, 4)])
    assert np.isnan(o[0, 7]).all() and np.isfinite(np.delete(o[0], 7, axis=0)).all()


def test_large_scores_do_not_overflow(compiled):
    w = workload(1, 1, 4, 4, scale=1.0)
    rng = np.random.default_rng(0)
    q, k = (100 * rng.standard_normal((2, 1, 30, 4))).astype(np.float32)
    v = rng.standard_normal((1, 30, 4)).astype(np.float32)
    [o] = compiled(attention, w, AVX512, SMALL)(q, k, v, out=[(1, 30, 4)])
    # scores reach 1e5, where one rounding is 4e-3
    np.testing.assert_allclose(o, reference(w, q, k, v, None), atol=0.05)


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_four_dimensional_form(compiled, mask: str):
    w = workload(4, 2, 10, 6, heads_first=True, causal=True, mask=mask, mask_shape=(None, 1, 1, None))
    rng = np.random.default_rng(0)
    b, s, t = 2, 21, 25
    q = rng.standard_normal((b, 4, s, 10)).astype(np.float32)
    k = rng.standard_normal((b, 2, t, 10)).astype(np.float32)
    v = rng.standard_normal((b, 2, t, 6)).astype(np.float32)
    keys = make_mask(w, b, s, t, rng)
    inputs = [q, k, v] + ([keys] if keys is not None else [])
    [o] = compiled(attention, w, AVX512, SMALL)(*inputs, out=[(b, 4, s, 6)])
    flat = (x.transpose(0, 2, 1, 3).reshape(b, x.shape[2], -1) for x in (q, k, v))
    expected = reference(w, *flat, keys).reshape(b, s, 4, 6).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(o, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("isa", ISAS)
@given(d=st.integers(1, 300), dv=st.integers(1, 300), s=st.none() | st.integers(1, 300))
def test_configurations_fit_the_registers(isa: Isa, d: int, dv: int, s: int | None):
    w = workload(2, 2, d, dv, dims=(1, s, s))
    configs = list(attention.space(w, isa))
    for c in [*configs, attention.heuristic(w, isa)]:
        assert max(c.key_rows, c.value_rows) * c.vectors + c.vectors + 1 <= isa.registers
        assert c.block % c.key_rows == 0 and c.block > 0


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": "float", "mask_shape": (None, 1, None, None)}])
def test_memory_does_not_grow_with_tokens(options: dict[str, object], operands: str) -> None:
    """For any number of queries and keys, all that a thread allocates has a fixed size, far below a stack's."""
    w = workload(4, 4, 64, 64, operands=operands, **options)
    script = attention.build(w, attention.heuristic(w, AVX512), AVX512).script()
    allocations = re.findall(r"alloc_\w+\((\([^)]*\)|\w+)", script)
    assert len(allocations) == len(re.findall("alloc_", script)) > 10
    elements = [math.prod(ast.literal_eval(shape)) for shape in allocations]
    assert 4 * sum(elements) < 1 << 20
