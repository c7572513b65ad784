"""The linear layer against float64 numpy: every remainder in M, K and N, every epilogue, every vector width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from xopt.kernels import gemm
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa

ISAS = [pytest.param(isa, id=isa.name) for isa in (AVX512, AVX2, NEON)]
EPILOGUES = {
    "plain": {},
    "bias-gelu": {"bias": True, "activation": "gelu"},
    "bias-tanh-gelu-residual": {"bias": True, "activation": "gelu-tanh", "residual": True},
    "swish-gate": {"activation": "swish", "gate": True},
    "quick-gelu": {"bias": True, "activation": "swish", "alpha": 1.702},
    "everything": {"bias": True, "activation": "relu", "gate": True, "residual": True},
}


def activate(workload: gemm.Workload, y: np.ndarray) -> np.ndarray:
    return {
        "none": lambda: y,
        "gelu": lambda: 0.5 * y * (1 + special.erf(y / np.sqrt(2))),
        "gelu-tanh": lambda: y * special.expit(2 * np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)),
        "swish": lambda: y * special.expit(workload.alpha * y),
        "relu": lambda: np.maximum(y, 0),
    }[workload.activation]()


def check(compiled, workload: gemm.Workload, isa: Isa, lead: tuple[int, ...], seed: int, config=None) -> None:
    rng = np.random.default_rng(seed)
    config = config or gemm.heuristic(workload, isa)
    a = rng.standard_normal((*lead, workload.k)).astype(np.float32)
    weight = rng.standard_normal((workload.k, workload.n)).astype(np.float32)
    bias = rng.standard_normal(workload.n).astype(np.float32)
    gate, residual = rng.standard_normal((2, *lead, workload.n)).astype(np.float32)
    inputs = [a, gemm.pack_weight(weight, config, isa)]
    expected = a.astype(np.float64) @ weight
    scale = np.abs(a.astype(np.float64)) @ np.abs(weight)
    if workload.bias:
        inputs.append(gemm.pack_columns(bias, config, isa))
        expected, scale = expected + bias, scale + np.abs(bias)
    expected = activate(workload, expected)
    if workload.gate:
        inputs.append(gate)
        expected, scale = expected * gate, scale * np.abs(gate)
    if workload.residual:
        inputs.append(residual)
        expected, scale = expected + residual, scale + np.abs(residual)
    [c] = compiled(gemm, workload, isa, config)(*inputs, out=[(*lead, workload.n)])
    # A dot product of length K rounds at most K times; the slopes of the activations stay under 1.2.
    bound = 1.2 * (workload.k + 8) * 2.0**-24 * scale + 1e-6
    assert (np.abs(c - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 40), seed=st.integers(0, 2**16))
def test_any_number_of_rows(compiled, isa: Isa, m: int, seed: int):
    check(compiled, gemm.Workload((None,), 33, 67, bias=True), isa, (m,), seed)


@given(m=st.integers(1, 500), mt=st.integers(1, 14), vectors=st.integers(1, 6))
def test_there_is_a_tile_for_every_row_count(m: int, mt: int, vectors: int):
    """Of an even split, for rows known when compiling and for rows known later."""
    blocks = -(-m // mt)
    needed = {(b + 1) * m // blocks - b * m // blocks for b in range(blocks)}
    for known in (m, None):
        few, many = gemm._counts(known, gemm.Config(mt, vectors))
        assert needed <= set(few if blocks < vectors else many)


SHAPES = [(1, 1), (2, 3), (7, 16), (16, 17), (31, 15), (70, 70), (64, 48), (5, 65), (129, 49), (8, 200)]


@pytest.mark.parametrize(
    ("isa", "k", "n"),
    [(AVX512, *shape) for shape in SHAPES] + [(isa, *shape) for isa in (AVX2, NEON) for shape in SHAPES[3:6]],
)
def test_every_remainder_of_columns_and_depth(compiled, isa: Isa, k: int, n: int):
    # A small tile: three row counts to compile, and row blocks of every size.
    config = gemm.Config(3, 2)
    workload = gemm.Workload((None,), k, n, bias=True, residual=True)
    for m in (1, 2, 3, 4, 11):
        check(compiled, workload, isa, (m,), m, config)


@pytest.mark.parametrize(
    ("isa", "epilogue"), [(AVX512, e) for e in EPILOGUES] + [(AVX2, "everything"), (NEON, "bias-gelu")]
)
def test_epilogues(compiled, isa: Isa, epilogue: str):
    workload = gemm.Workload((None, None), 37, 53, **EPILOGUES[epilogue])
    for lead in ((1, 1), (2, 5), (3, 7)):
        check(compiled, workload, isa, lead, 0, gemm.Config(4, 1))


@pytest.mark.parametrize("rows", [(1,), (9,), (1, 197), (2, 8)])
def test_static_rows(compiled, rows: tuple[int, ...]):
    check(compiled, gemm.Workload(rows, 40, 100, bias=True), AVX512, rows, 1)


def test_rows_in_groups_when_the_input_outgrows_the_cache(compiled, monkeypatch):
    monkeypatch.setattr(gemm, "GROUP_BYTES", 4 * 32 * 11)
    workload = gemm.Workload((None,), 32, 31, residual=True)
    for m in (1, 10, 11, 12, 23, 100, 257):
        check(compiled, workload, AVX512, (m,), m, gemm.Config(5, 1))


def test_nan_and_infinity_stay_in_their_row(compiled):
    workload = gemm.Workload((None,), 16, 40, bias=True, activation="gelu")
    config = gemm.heuristic(workload, AVX512)
    a = np.ones((5, 16), np.float32)
    a[1, 3], a[2, 0] = np.nan, np.inf
    weight = gemm.pack_weight(np.ones((16, 40), np.float32), config, AVX512)
    bias = gemm.pack_columns(np.zeros(40, np.float32), config, AVX512)
    [c] = compiled(gemm, workload, AVX512, config)(a, weight, bias, out=[(5, 40)])
    assert np.isnan(c[1]).all() and np.isposinf(c[2]).all() and np.isfinite(c[[0, 3, 4]]).all()


@pytest.mark.parametrize("isa", ISAS)
@given(k=st.integers(1, 5000), n=st.integers(1, 5000), m=st.none() | st.integers(1, 500))
def test_the_heuristic_is_in_the_space_and_fits_the_registers(isa: Isa, k: int, n: int, m: int | None):
    config = gemm.heuristic(gemm.Workload((m,), k, n), isa)
    assert config.mt * config.vectors + config.vectors + 1 <= isa.registers
    assert all(c.mt * c.vectors + c.vectors + 1 <= isa.registers for c in gemm.space(gemm.Workload((m,), k, n), isa))


def test_every_configuration_of_the_space_is_right(compiled):
    workload = gemm.Workload((17,), 9, 50, bias=True)
    for config in list(gemm.space(workload, AVX512))[::6]:
        check(compiled, workload, AVX512, (17,), 3, config)
