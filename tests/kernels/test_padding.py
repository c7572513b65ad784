"""Packing and unpacking of tokens, and attention over packed sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_attention import SMALL, reference, workload
from xopt.kernels import attention, padding, precision
from xopt.kernels.attention import Config, fused
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa

ISAS = [pytest.param(isa, id=isa.name) for isa in (AVX512, AVX2, NEON)]


def layout(compiled, mask: np.ndarray, isa: Isa) -> tuple[np.ndarray, np.ndarray, int]:
    b, s = mask.shape
    run = compiled(padding, padding.Workload("layout"), isa)
    starts, place, total = run(mask, out=[(b + 2,), (b * s,), (1,)], dtypes=["int64"] * 3)
    return starts, place, int(total[0])


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 5), s=st.integers(1, 20), seed=st.integers(0, 99))
def test_pack_and_unpack(compiled, isa: Isa, b: int, s: int, seed: int):
    rng = np.random.default_rng(seed)
    mask = rng.random((b, s)) < 0.6
    starts, place, total = layout(compiled, mask, isa)
    lengths = mask.sum(1)
    np.testing.assert_array_equal(starts, [*np.concatenate([[0], lengths.cumsum()]), lengths.max()])
    assert total == mask.sum()
    for width in (1, 16, 35):
        x = rng.standard_normal((b, s, width)).astype(np.float32)
        [packed] = compiled(padding, padding.Workload("pack", width), isa)(x, place, out=[(total, width)])
        np.testing.assert_array_equal(packed, x[mask])
        [back] = compiled(padding, padding.Workload("unpack", width), isa)(packed, place, out=[x.shape])
        np.testing.assert_array_equal(back, np.where(mask[..., None], x, 0))


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("config", [SMALL, Config(2, 8, 4, 5), None])
def test_packed_attention_keeps_sequences_apart(compiled, operands: str, causal: bool, config: Config | None):
    rng = np.random.default_rng(0)
    w = workload(2, 1, 8, 6, layout=fused, packed=True, causal=causal, operands=operands)
    for lengths in ([5], [1, 40, 17], [3, 0, 33], [16, 32, 70, 1]):
        total = sum(lengths)
        x = (2 * rng.standard_normal((total, 2 * 8 + 8 + 6))).astype(np.float32)
        stored = x if operands == "float32" else precision.to_bfloat16(x)
        exact = x if operands == "float32" else precision.from_bfloat16(stored)
        starts = np.array([0, *np.cumsum(lengths), max(lengths)], np.int64)
        [o] = compiled(attention, w, AVX512, config)(stored, starts, out=[(total, 12)])
        for low, length in zip(starts, lengths):
            if not length:
                continue
            own = exact[None, low : low + length]
            q, k, v = own[..., :16], own[..., 16:24], own[..., 24:]
            expected = reference(w, q, k, v, None)[0]
            bound = 3e-5 + (operands == "bfloat16") * 2.0**-8 * reference(w, q, k, np.abs(v), None)[0]
            assert (np.abs(o[low : low + length] - expected) <= bound).all()
