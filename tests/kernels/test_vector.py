"""Vector math against float64, over the whole float32 range and its special values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from xopt.kernels import vector
from xopt.kernels.isa import AVX2, AVX512, NEON, Isa

SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 1e-30, 88.0, 88.7, 89.0, -87.0, -87.4, -88.0, -100.0, -104.0, -120.0, 1e30, -1e30]
ISAS = [pytest.param(isa, id=isa.name) for isa in (AVX512, AVX2, NEON)]


def evaluate(function, x: np.ndarray, isa: Isa) -> np.ndarray:
    import tvm

    from xopt.kernels import emit

    n = len(x)
    assert n % isa.lanes == 0

    def body() -> None:
        source, result = emit.argument("x", (n,)), emit.argument("y", (n,))
        with emit.serial(n // isa.lanes) as v:
            value = emit.keep(emit.load(source, v * isa.lanes, lanes=isa.lanes), isa.lanes)
            emit.store(result, function(value, isa.lanes), v * isa.lanes, lanes=isa.lanes)

    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    kernel = emit.compiled(emit.prim_func("vector", body), target)
    y = tvm.runtime.tensor(np.zeros(n, np.float32))
    kernel(tvm.runtime.tensor(x), y)
    return y.numpy()


def samples(low: float, high: float, extra: list[float]) -> np.ndarray:
    values = np.concatenate([np.linspace(low, high, 20000), extra, SPECIAL]).astype(np.float32)
    return np.pad(values, (0, -len(values) % 16), mode="edge")


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_accurate_over_the_whole_range(isa: Isa):
    x = samples(-104, 89, [np.inf, -np.inf, np.nan])
    y = evaluate(vector.exp, x, isa)
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
    normal = (exact > 2.0**-126) & (exact < 3.4e38)
    # half an ulp of the result, half of the last multiplication, and the polynomial: under 2.5e-7 in all
    assert np.abs(y[normal] / exact[normal] - 1).max() < 2.5e-7
    tiny = exact <= 2.0**-126
    assert np.abs(y[tiny] - exact[tiny]).max() <= 2.0**-148
    assert np.isposinf(y[exact > 3.5e38]).all()
    assert np.isnan(y[np.isnan(x)]).all() and not np.isnan(y[~np.isnan(x)]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_exp2_of_nonpositive_numbers(isa: Isa):
    x = -np.abs(samples(-140, 0, [-np.inf, np.nan]))
    y = evaluate(vector.exp2_nonpositive, x, isa)
    exact = np.exp2(x.astype(np.float64))
    kept = x > -126
    assert np.abs(y[kept] / exact[kept] - 1).max() < 2.5e-7
    assert (y[x < -127] == 0).all()
    assert np.isnan(y[np.isnan(x)]).all()


EXACT = {
    "erf": (vector.erf, special.erf),
    "sigmoid": (vector.sigmoid, special.expit),
    "tanh": (vector.tanh, np.tanh),
}


@pytest.mark.parametrize("name", EXACT)
def test_bounded_functions(name: str):
    function, exact = EXACT[name]
    x = samples(-12, 12, [np.inf, -np.inf, np.nan])
    y = evaluate(function, x, AVX512)
    expected = exact(x.astype(np.float64))
    assert np.nanmax(np.abs(y - expected)) < 3e-7
    assert (np.isnan(y) == np.isnan(x)).all()


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh", "swish", "relu"])
def test_activations(name: str):
    x = samples(-30, 30, [np.nan, np.inf])
    y = evaluate(vector.activation(name, 1.702), x, AVX512)
    z = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = {
            "gelu": z * 0.5 * special.erfc(-z / np.sqrt(2)),
            "gelu-tanh": z * special.expit(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)),
            "swish": z * special.expit(1.702 * z),
            "relu": np.maximum(z, 0),
        }[name]
    finite = np.isfinite(expected)
    # each is x times a factor in [0, 1] that is right to 3e-7
    assert (np.abs(y[finite] - expected[finite]) <= 3e-7 * np.maximum(np.abs(z[finite]), 1e-30)).all()
    assert np.isnan(y[np.isnan(x)]).all() and np.isposinf(y[np.isposinf(x)]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["gelu", "gelu-tanh"])
def test_coarse_gelu(isa: Isa, name: str):
    x = samples(-12, 12, [np.inf, np.nan])
    y = evaluate(vector.activation(name, coarse=True), x, isa)
    z = x.astype(np.float64)
    exact = {
        "gelu": z * 0.5 * special.erfc(-z / np.sqrt(2)),
        "gelu-tanh": z * special.expit(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)),
    }[name]
    finite = np.isfinite(z)
    assert np.abs(y[finite] - exact[finite]).max() < 5e-5
    assert np.isnan(y[np.isnan(x)]).all() and np.isposinf(y[np.isposinf(x)]).all()
