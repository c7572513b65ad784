"""The linear layer on bfloat16 and int8 operands: every instruction set, remainder and result format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.isas import parameters
from xopt.kernels import gemm, precision
from xopt.kernels.isa import Isa

ISAS = parameters()
SMALL = gemm.Config(3, 2)


def bfloat16_case(compiled, isa: Isa, m: int, k: int, n: int, results: tuple[str, ...], seed: int):
    rng = np.random.default_rng(seed)
    form = precision.BFLOAT16
    a = precision.to_bfloat16(rng.standard_normal((m, k)).astype(np.float32))
    w = rng.standard_normal((k, n)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    padded = np.zeros((m, form.padded(k)), np.uint16)
    padded[:, :k] = a
    workload = gemm.Workload((None,), k, n, bias=True, operands="bfloat16", results=results)
    run = compiled(gemm, workload, isa, SMALL)
    packed = gemm.pack_weight(w, SMALL, isa, "bfloat16"), gemm.pack_columns(bias, SMALL, isa)
    dtypes = [precision.STORAGE[form] for form in results]
    got = run(padded, *packed, out=[(m, n)] * len(results), dtypes=dtypes)
    exact_a, exact_w = (precision.from_bfloat16(x).astype(np.float64) for x in (a, precision.to_bfloat16(w)))
    return dict(zip(results, got)), exact_a @ exact_w + bias, np.abs(exact_a) @ np.abs(exact_w) + np.abs(bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 3), (33, 67), (64, 32), (127, 49)])
def test_bfloat16_products_accumulate_in_float32(compiled, isa: Isa, k: int, n: int):
    for m in (0, 1, 3, 7):
        got, expected, scale = bfloat16_case(compiled, isa, m, k, n, ("float32",), m)
        # Products of bfloat16 are exact in float32; the sum rounds at most once a product.
        assert (np.abs(got["float32"] - expected) <= (k + 4) * 2.0**-24 * scale).all()


@pytest.mark.parametrize("isa", ISAS)
def test_results_in_bfloat16_are_the_float32_ones_rounded(compiled, isa: Isa):
    got, _, _ = bfloat16_case(compiled, isa, 5, 40, 37, ("float32", "bfloat16"), 1)
    assert (got["bfloat16"] == precision.to_bfloat16(got["float32"])).all()


def int8_case(compiled, isa: Isa, m: int, k: int, n: int, results: tuple[str, ...], seed: int, extreme: bool = False):
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 256, (m, k)).astype(np.uint8)
    w = rng.integers(-128, 128, (k, n)).astype(np.int8)
    if extreme:
        q[:], w[:] = 255, rng.choice([-128, 127], (k, n))
    zero_point = int(rng.integers(0, 256))
    scale = rng.uniform(0.5, 2, n).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    padded = rng.integers(0, 256, (m, precision.INT8.padded(k))).astype(np.uint8)  # what is past K does not count
    padded[:, :k] = q
    workload = gemm.Workload((None,), k, n, bias=True, operands="int8", results=results)
    run = compiled(gemm, workload, isa, SMALL)
    quantization = np.array([1 / 7, 128], np.float32)
    columns = [gemm.pack_columns(x, SMALL, isa) for x in (scale, gemm.offset(w, zero_point), bias)]
    inputs = [padded, gemm.pack_weight(w, SMALL, isa, "int8"), *columns]
    inputs += [quantization] if "uint8" in results else []
    dtypes = [precision.STORAGE[form] for form in results]
    got = run(*inputs, out=[(m, n)] * len(results), dtypes=dtypes)
    sums = (q.astype(np.int64) - zero_point) @ w.astype(np.int64)
    # The multiply-add of scale and bias rounds once, as float64 arithmetic rounded to float32 does.
    expected = (sums.astype(np.float32).astype(np.float64) * scale + bias).astype(np.float32)
    return dict(zip(results, got)), expected, quantization


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 5), (4, 16), (33, 67), (64, 32), (130, 49)])
def test_int8_bit_for_bit(compiled, isa: Isa, k: int, n: int):
    for m in (0, 1, 3, 7):
        got, expected, _ = int8_case(compiled, isa, m, k, n, ("float32",), m)
        np.testing.assert_array_equal(got["float32"], expected)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_extremes_do_not_saturate(compiled, isa: Isa):
    got, expected, _ = int8_case(compiled, isa, 5, 400, 33, ("float32",), 0, extreme=True)
    np.testing.assert_array_equal(got["float32"], expected)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None)
@given(m=st.integers(0, 20), seed=st.integers(0, 2**16))
def test_quantized_results(compiled, isa: Isa, m: int, seed: int):
    got, expected, quantization = int8_case(compiled, isa, m, 33, 35, ("uint8", "float32"), seed)
    inverse, zero_point = quantization
    q = np.clip(np.rint(got["float32"] * inverse) + zero_point, 0, 255)
    np.testing.assert_array_equal(got["uint8"], q.astype(np.uint8))
    np.testing.assert_array_equal(got["float32"], expected)


def test_round_to_bfloat16_is_to_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, -np.inf, np.nan, -0.0], np.float32)
    back = precision.from_bfloat16(precision.to_bfloat16(values))
    np.testing.assert_array_equal(back, np.array([1, 1, 1 + 2**-6, 1 + 2**-7, np.inf, -np.inf, np.nan, -0.0]))
