"""Fused attention at low precision against float64, on the rounded operands; at bfloat16 also its result formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import test_attention_int8
from tests.kernels.isas import PAIRS
from tests.kernels.test_attention import SMALL, make_mask, reference, workload
from tests.kernels.test_gemm_precision import ISAS
from xopt.kernels import attention, precision
from xopt.kernels.attention import Config, Workload, fused
from xopt.kernels.isa import AVX512, Isa


def check(compiled, w: Workload, isa: Isa, b: int, s: int, t: int, seed: int = 0, config: Config | None = SMALL):
    rng = np.random.default_rng(seed)
    shapes = (
        (b, s, w.heads * w.head_dim),
        (b, t, w.kv_heads * w.head_dim),
        (b, t, w.kv_heads * w.v_head_dim),
    )
    stored = [precision.to_bfloat16(2 * rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    q, k, v = (precision.from_bfloat16(x) for x in stored)
    mask = make_mask(w, b, s, t, rng)
    inputs = [np.concatenate(stored, -1)] if w.q.buffer == w.v.buffer else stored
    inputs += [] if mask is None else [mask]
    expected = reference(w, q, k, v, mask)
    dtypes = [precision.STORAGE[form] for form in w.results]
    results = compiled(attention, w, isa, config)(*inputs, out=[expected.shape] * len(dtypes), dtypes=dtypes)
    # Each weight is rounded by 2**-8 of itself: the mean of the values moves by that share of the mean of their sizes.
    bound = 2.0**-8 * reference(w, q, k, np.abs(v), mask) + 3e-5
    found = dict(zip(w.results, results))
    if "float32" in found:
        assert (np.abs(found["float32"] - expected) <= bound).all()
    return found, expected


KINDS = [pytest.param("bfloat16", *isa.values, id=f"bfloat16-{isa.id}", marks=isa.marks) for isa in ISAS]
KINDS += [pytest.param("int8", *isa.values, id=f"int8-{isa.id}", marks=isa.marks) for isa in test_attention_int8.ISAS]
CHECKS = {"bfloat16": check, "int8": test_attention_int8.check}
"""Each against float64 on the numbers that its operands stand for, by its own bound."""


@pytest.mark.parametrize(("operands", "isa"), KINDS)
@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 3), s=st.integers(1, 70), t=st.integers(1, 40), seed=st.integers(0, 999))
def test_any_length(compiled, operands: str, isa: Isa, b: int, s: int, t: int, seed: int):
    w = workload(2, 1, {"bfloat16": 18, "int8": 20}[operands], 7, operands=operands)
    CHECKS[operands](compiled, w, isa, b, s, t, seed, Config(2, 8, 4, 5))


@pytest.mark.parametrize(("operands", "isa"), KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "d", "dv"), [(2, 2, 64, 64), (4, 2, 32, 48), (1, 1, None, 1)])
def test_head_sizes_in_a_fused_projection(
    compiled, operands: str, isa: Isa, heads: int, kv_heads: int, d: int | None, dv: int
):
    lane = precision.BY_NAME[operands].pack
    w = workload(heads, kv_heads, d or lane, dv, layout=fused, operands=operands)
    for length in (1, 5, 17, 40):
        CHECKS[operands](compiled, w, isa, 2, length, length, length)


@pytest.mark.parametrize("operands", CHECKS)
@pytest.mark.parametrize(
    ("mask", "mask_shape", "causal"),
    [("none", (1, 1, 1, 1), True), ("bool", (None, 1, 1, None), True), ("float", (1, None, None, None), False)],
)
def test_masks(compiled, operands: str, mask: str, mask_shape: tuple, causal: bool):
    w = workload(2, 2, 8, 8, mask=mask, mask_shape=mask_shape, causal=causal, operands=operands)
    for b, s, t in ((1, 1, 1), (2, 9, 9), (1, 40, 11)):
        CHECKS[operands](compiled, w, PAIRS, b, s, t, s)


def test_the_heuristic_over_several_blocks_of_keys(compiled):
    w = workload(2, 2, 16, 16, causal=True, layout=fused, operands="bfloat16", results=("float32", "bfloat16"))
    for length in (1, 16, 33, 253):
        found, _ = check(compiled, w, AVX512, 1, length, length, config=None)
        np.testing.assert_array_equal(found["bfloat16"], precision.to_bfloat16(found["float32"]))


def test_four_dimensional_form_writes_odd_columns_in_bfloat16(compiled):
    w = workload(2, 2, 8, 5, heads_first=True, operands="bfloat16", results=("bfloat16",), scale=1 / math.sqrt(8))
    rng = np.random.default_rng(0)
    stored = [precision.to_bfloat16(rng.standard_normal((1, 2, 21, d)).astype(np.float32)) for d in (8, 8, 5)]
    [o] = compiled(attention, w, AVX512, SMALL)(*stored, out=[(1, 2, 21, 5)], dtypes=["uint16"])
    merged = [precision.from_bfloat16(x).transpose(0, 2, 1, 3).reshape(1, 21, -1) for x in stored]
    expected = reference(w, *merged, None).reshape(1, 21, 2, 5).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(precision.from_bfloat16(o), expected, atol=2.0**-8 * 3)


def test_an_infinite_value_in_the_last_of_an_odd_number_of_keys(compiled):
    w = workload(1, 1, 4, 16, operands="bfloat16")
    x = precision.to_bfloat16(np.ones((1, 3, 4), np.float32))
    v = np.ones((1, 3, 16), np.float32)
    v[0, 2, 1] = np.inf
    [o] = compiled(attention, w, AVX512, SMALL)(x, x, precision.to_bfloat16(v), out=[(1, 3, 16)])
    assert np.isposinf(o[0, :, 1]).all() and np.allclose(np.delete(o[0], 1, axis=1), 1)
