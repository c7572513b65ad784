"""Norms, softmax and rotary embedding against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from xopt.kernels import norm, rotary, softmax
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa

ISAS = [pytest.param(isa, id=isa.name) for isa in (AVX512, AVX2, NEON)]
VARIANTS = {
    "layer": {},
    "layer-without-bias-residual": {"bias": False, "residual": True},
    "rms": {"rms": True},
    "rms-residual": {"rms": True, "residual": True},
}


def check_norm(compiled, w: norm.Workload, isa: Isa, lead: tuple[int, ...], x: np.ndarray | None = None) -> np.ndarray:
    rng = np.random.default_rng(w.width)
    x = (3 + rng.standard_normal((*lead, w.width))).astype(np.float32) if x is None else x
    r = rng.standard_normal(x.shape).astype(np.float32)
    scale, bias = rng.standard_normal((2, w.width)).astype(np.float32)
    inputs = [x, *([r] if w.residual else []), norm.pack_vector(scale, isa)]
    inputs += [norm.pack_vector(bias, isa)] if w.bias and not w.rms else []
    outputs = compiled(norm, w, isa)(*inputs, out=[x.shape] * (2 if w.residual else 1))
    total = x + r if w.residual else x
    if w.residual:
        assert np.array_equal(outputs[0], total)
    z = total.astype(np.float64)
    mean = 0.0 if w.rms else z.mean(-1, keepdims=True)
    y = (z - mean) / np.sqrt(((z - mean) ** 2).mean(-1, keepdims=True) + w.epsilon) * scale
    y = y + bias if w.bias and not w.rms else y
    # The mean of numbers near 3 is rounded at 2e-7; divided by a deviation that may be small for two or three of them.
    np.testing.assert_allclose(outputs[-1], y, rtol=2e-5, atol=2e-5)
    return outputs[-1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("isa", "width"), [(AVX512, 1), (AVX512, 13), (AVX512, 64), (AVX512, 391), (AVX2, 37), (AVX2, 16), (NEON, 37)]
)
def test_norm(compiled, isa: Isa, width: int, variant: str):
    w = norm.Workload((None, None), width, 1e-2 if width < 4 else 1e-5, **VARIANTS[variant])
    for lead in ((1, 1), (2, 5)):
        check_norm(compiled, w, isa, lead)


def test_norm_variance_does_not_cancel(compiled):
    """A one-pass variance would lose every digit of a unit deviation at 4096."""
    x = (4096 + np.random.default_rng(0).choice([-1.0, 1.0], (4, 256))).astype(np.float32)
    w = norm.Workload((None,), 256, 1e-5)
    z = x.astype(np.float64)
    scale, bias = np.ones(256, np.float32), np.zeros(256, np.float32)
    [y] = compiled(norm, w, AVX512)(x, scale, bias, out=[x.shape])
    expected = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_norm_nan_stays_in_its_row(compiled):
    x = np.random.default_rng(0).standard_normal((3, 37)).astype(np.float32)
    x[1, 36] = np.nan
    ones = norm.pack_vector(np.ones(37, np.float32), AVX512)
    [y] = compiled(norm, norm.Workload((None, None), 37, 1e-5), AVX512)(x[None], ones, ones, out=[(1, 3, 37)])
    assert np.isnan(y[0, 1]).all() and np.isfinite(y[0, [0, 2]]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_softmax_of_any_width(compiled, isa: Isa):
    rng = np.random.default_rng(0)
    w = softmax.Workload((None, None), None)
    for lead, width in (((1, 1), 1), ((2, 3), 7), ((1, 4), 16), ((3, 1), 100)):
        x = (10 * rng.standard_normal((*lead, width))).astype(np.float32)
        x[0, 0, width // 2] = -np.inf if width > 1 else 0
        [y] = compiled(softmax, w, isa)(x, out=[x.shape])
        z = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
        np.testing.assert_allclose(y, z / z.sum(-1, keepdims=True), rtol=1e-5, atol=1e-30)


def test_softmax_special_values(compiled):
    x = np.zeros((1, 4, 20), np.float32)
    x[0, 1, 3], x[0, 2] = np.nan, -np.inf
    x[0, 3, 19] = 3e38
    [y] = compiled(softmax, softmax.Workload((None, None), None), AVX512)(x, out=[x.shape])
    assert np.allclose(y[0, 0], 0.05) and np.isnan(y[0, 1]).all() and np.isnan(y[0, 2]).all()
    assert y[0, 3, 19] == 1 and (y[0, 3, :19] == 0).all()


@pytest.mark.parametrize("table", [0, None])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("isa", "d", "turned"), [(AVX512, 80, 48), (AVX512, 6, 6), (AVX2, 32, 32), (NEON, 20, 10)])
def test_rotary(compiled, isa: Isa, d: int, turned: int, interleaved: bool, table: int | None):
    rng = np.random.default_rng(d)
    b, s, heads = 2, 5, 3
    w = rotary.Workload(None, None, heads, d, turned, interleaved, table)
    x = rng.standard_normal((b, s, heads * d)).astype(np.float32)
    lead = (b, s) if table == 0 else (11,)
    cos, sin = rng.standard_normal((2, *lead, turned // 2)).astype(np.float32)
    ids = rng.integers(0, 11, (b, s))
    inputs = [x, cos, sin] + ([] if table == 0 else [ids])
    [y] = compiled(rotary, w, isa)(*inputs, out=[x.shape])
    c, n = (t[..., None, :] if table == 0 else t[ids][..., None, :] for t in (cos, sin))
    z = x.reshape(b, s, heads, d)
    expected = z.copy()
    first, second = (
        (slice(0, turned, 2), slice(1, turned, 2))
        if interleaved
        else (slice(0, turned // 2), slice(turned // 2, turned))
    )
    expected[..., first] = c * z[..., first] - n * z[..., second]
    expected[..., second] = n * z[..., first] + c * z[..., second]
    np.testing.assert_allclose(y, expected.reshape(x.shape), rtol=1e-5, atol=1e-6)
