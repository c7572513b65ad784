"""Products of two activations against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xopt.kernels import batch_matmul
from xopt.kernels.batch_matmul import Config, Workload
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa

ISAS = [pytest.param(isa, id=isa.name) for isa in (AVX512, AVX2, NEON)]


def check(compiled, w: Workload, isa: Isa, batch: tuple[int, ...], m: int, k: int, n: int, config=None) -> None:
    rng = np.random.default_rng(m + 100 * k + 10000 * n)
    a = rng.standard_normal((*batch, m, k)).astype(np.float32)
    b = rng.standard_normal((k, n) if w.shared else (*batch, k, n)).astype(np.float32)
    [c] = compiled(batch_matmul, w, isa, config)(a, b, out=[(*batch, m, n)])
    wide = np.abs(a.astype(np.float64)) @ np.abs(b)
    assert (np.abs(c - a.astype(np.float64) @ b) <= (k + 2) * 2.0**-24 * wide).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), m=st.integers(0, 20), k=st.integers(1, 30), n=st.integers(1, 70))
def test_any_extent(compiled, isa: Isa, batch: int, m: int, k: int, n: int):
    check(compiled, Workload((None, 2), None, None, None), isa, (batch, 2), m, k, n, Config(4, 2))


@pytest.mark.parametrize("shared", [False, True])
def test_static_extents_and_a_shared_matrix(compiled, shared: bool):
    check(compiled, Workload((2,), 21, 17, 33, shared), AVX512, (2,), 21, 17, 33, Config(4, 3))
    check(compiled, Workload((), 100, 5, 40, shared), AVX512, (), 100, 5, 40, Config(5, 1))
