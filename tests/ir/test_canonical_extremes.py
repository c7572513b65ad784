"""Numbers that rewrites forget: NaN, infinities, zeros of both signs, the largest and the smallest, rows of one number.

Each graph is run in onnxruntime as it is and in canonical form, and after all exact passes. What is not finite must
stay where it was; what is finite may differ by rounding. (Numbers so large that only some order of the operations
overflows are left out: 0.5 * x * (1 + erf(x)) is infinite for x = 3e38, Gelu is not.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ir.canonical import model_of
from xopt.ir.io import to_bytes
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.registry import create
from xopt.runtime.reference import ReferenceSession
from xopt.search.job import EXACT

WIDTH = 8
EXTREMES = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1e-40, 1.0, -1.0, 0.5, 2.5, 100.0, -100.0)

NUMBERS = (
    "float zero = {0.0}, float one = {1.0}, float half = {0.5}, float two = {2.0}, float root = {1.4142135}, "
    "float three = {3.0}, float k = {0.7978846}, float c = {0.044715}, float eps = {0.00001}, float q = {1.702}, "
    "int64[1] last = {-1}, float cap = {30.0}, float[8] zeros = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}"
)
NORM = "m = ReduceMean <keepdims: int = 1> ({}, last) "
GRAPHS = {
    "x + 0": "y = Add(x, zero)",
    "0 + x": "y = Add(zero, x)",
    "x + zeros": "y = Add(x, zeros)",
    "x - 0": "y = Sub(x, zero)",
    "0 - x": "y = Sub(zero, x)",
    "x * 1": "y = Mul(x, one)",
    "x / 1": "y = Div(x, one)",
    "x * 0": "y = Mul(x, zero)",
    "0 / x": "y = Div(zero, x)",
    "x - x": "y = Sub(x, x)",
    "x / x": "y = Div(x, x)",
    "x ** 0": "y = Pow(x, zero)",
    "x ** 1": "y = Pow(x, one)",
    "x ** 2": "y = Pow(x, two)",
    "- - x": "a = Neg(x) y = Neg(a)",
    "1 / (1 / x)": "a = Reciprocal(x) y = Reciprocal(a)",
    "sqrt(x * x)": "a = Mul(x, x) y = Sqrt(a)",
    "exp(log(x))": "a = Log(x) y = Exp(a)",
    "where, same": "a = IsNaN(x) y = Where(a, x, x)",
    "where, nan": "a = IsNaN(x) y = Where(a, zero, x)",
    "where, inf": "a = IsInf(x) y = Where(a, one, x)",
    "max": "y = Max(x, zero)",
    "min": "y = Min(x, one)",
    "max, same": "y = Max(x, x)",
    "clip": "y = Clip(x, zero, one)",
    "clip twice": "a = Clip(x, zero, two) y = Clip(a, one, three)",
    "relu": "a = Relu(x) y = Relu(a)",
    "wide and back": "a = Cast <to: int = 11> (x) y = Cast <to: int = 1> (a)",
    "narrow and back": "a = Cast <to: int = 10> (x) y = Cast <to: int = 1> (a)",
    "flags": "a = Cast <to: int = 9> (x) y = Cast <to: int = 1> (a)",
    "wide flags": "a = Cast <to: int = 11> (x) b = Cast <to: int = 9> (a) y = Cast <to: int = 1> (b)",
    "gelu": "a = Div(x, root) b = Erf(a) d = Add(b, one) e = Mul(x, d) y = Mul(e, half)",
    "gelu, tanh": "a = Pow(x, three) b = Mul(a, c) d = Add(x, b) e = Mul(d, k) f = Tanh(e) g = Add(f, one) "
    "h = Mul(x, g) y = Mul(h, half)",
    "silu": "a = Sigmoid(x) y = Mul(x, a)",
    "quick gelu": "a = Mul(x, q) b = Sigmoid(a) y = Mul(x, b)",
    "layer norm": NORM.format("x") + "d = Sub(x, m) p = Pow(d, two) v = ReduceMean <keepdims: int = 1> (p, last) "
    "e = Add(v, eps) s = Sqrt(e) y = Div(d, s)",
    "rms norm": "p = Pow(x, two) " + NORM.format("p") + "e = Add(m, eps) s = Sqrt(e) r = Reciprocal(s) y = Mul(x, r)",
    "softmax": "y = Softmax <axis: int = -1> (x)",
    "softmax, guarded": "a = Softmax <axis: int = -1> (x) b = IsNaN(a) y = Where(b, zero, a)",
    "soft cap": "a = Div(x, cap) b = Tanh(a) y = Mul(b, cap)",
    "mean": "y = ReduceMean <keepdims: int = 1> (x, last)",
    "largest": "y = ReduceMax <keepdims: int = 1> (x, last)",
    "smallest": "y = ReduceMin <keepdims: int = 1> (x, last)",
    "gemm without c": "y = Gemm <beta: float = 0.0> (x, w, x)",
    "gemm": "y = Gemm <alpha: float = 0.5, beta: float = 2.0, transB: int = 1> (x, w, x)",
    "linear": "a = MatMul(x, w) y = Add(a, zeros)",
    "attention": "t = Transpose <perm: ints = [1, 0]> (x) a = Unsqueeze(x, first) b = Unsqueeze(t, first) "
    "s = MatMul(a, b) n = Mul(s, half) p = Softmax <axis: int = -1> (n) o = MatMul(p, a) y = Squeeze(o, first)",
    "order": "a = Greater(x, zero) b = Not(a) y = Cast <to: int = 1> (b)",
    "order, equal": "a = GreaterOrEqual(x, zero) b = LessOrEqual(x, zero) d = And(a, b) y = Cast <to: int = 1> (d)",
    "equal": "a = Equal(x, x) y = Cast <to: int = 1> (a)",
    "sign": "a = Sign(x) y = Identity(a)",
    "concat and split": "a = Concat <axis: int = 0> (x) y = Slice(a, start, end)",
}


def graph(name: str) -> ir.Model:
    weight = ", ".join(f"{0.25 * (-1) ** (i % 3) * (1 + i % 5):g}" for i in range(WIDTH * WIDTH))
    more = f", float[8, 8] w = {{{weight}}}, int64[1] first = {{0}}, int64[1] start = {{0}}, "
    more += "int64[1] end = {9223372036854775807}"
    return model_of(f"(float[8, 8] x) => (float[N, M] y) <{NUMBERS}{more}>", GRAPHS[name])


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """As it is, in onnxruntime without its own rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


SESSIONS: dict[str, ReferenceSession] = {}


def rewritten(name: str) -> ReferenceSession:
    if name not in SESSIONS:
        model = graph(name)
        PassManager([create(one, {}) for one in EXACT], instruments=[]).run(model, PassContext())
        SESSIONS[name] = ReferenceSession(model, threads=1)
    return SESSIONS[name]


def check(name: str, x: np.ndarray) -> None:
    want, got = run(graph(name), x), rewritten(name).run({"x": x})["y"]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=f"{name}: NaN")
    infinite = np.isinf(want) | np.isinf(got)
    np.testing.assert_array_equal(got[infinite], want[infinite], err_msg=f"{name}: infinities")
    finite = np.isfinite(want) & np.isfinite(got)
    np.testing.assert_allclose(got[finite], want[finite], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_extreme_by_itself_and_among_others(name: str) -> None:
    """Rows of one extreme each, and one extreme in a row of usual numbers."""
    usual = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    for extreme in EXTREMES:
        x = usual.copy()
        x[0], x[1, 3] = extreme, extreme
        check(name, x)


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.integers(0, len(EXTREMES) - 1), min_size=64, max_size=64))
def test_any_mixture_of_extremes(name: str, picks: list[int]) -> None:
    check(name, np.array([EXTREMES[i] for i in picks], np.float32).reshape(WIDTH, WIDTH))


FOLDED = {
    "int64, division": (
        "int64[6] a = {7, -7, 7, -7, 0, 1}, int64[6] b = {2, 2, -2, -2, 5, 3}",
        "y = Div(a, b)",
        "int64[6]",
    ),
    "int32, division": ("int32[4] a = {7, -7, 7, -7}, int32[4] b = {2, 2, -2, -2}", "y = Div(a, b)", "int32[4]"),
    "mod": ("int64[4] a = {7, -7, 7, -7}, int64[4] b = {3, 3, -3, -3}", "y = Mod(a, b)", "int64[4]"),
    "fmod": ("int64[4] a = {7, -7, 7, -7}, int64[4] b = {3, 3, -3, -3}", "y = Mod <fmod: int = 1> (a, b)", "int64[4]"),
    "overflow": ("int32[2] a = {2147483647, -2147483648}, int32[2] b = {1, -1}", "y = Add(a, b)", "int32[2]"),
    "product": ("int64[2] a = {4611686018427387903, 3}, int64[2] b = {2, -5}", "y = Mul(a, b)", "int64[2]"),
    "unsigned": ("uint8[2] a = {3, 250}, uint8[2] b = {5, 10}", "y = Sub(a, b)", "uint8[2]"),
    "truncation": ("float[5] a = {1.9, -1.9, 0.5, -0.5, 300.7}", "y = Cast <to: int = 6> (a)", "int32[5]"),
    "narrowing": ("int64[3] a = {300, -1, 4294967297}", "y = Cast <to: int = 6> (a)", "int32[3]"),
    "rounding": ("float[6] a = {0.5, 1.5, 2.5, -0.5, -1.5, 2.4999}", "y = Round(a)", "float[6]"),
    "power": ("int64[3] a = {2, -3, 10}, int64[3] b = {10, 3, 2}", "y = Pow(a, b)", "int64[3]"),
    "mixed power": ("int64[2] a = {2, 3}, float[2] b = {0.5, 2.0}", "y = Pow(a, b)", "int64[2]"),
    "clip, crossed": (
        "float[3] a = {-1.0, 0.5, 2.0}, float lo = {1.0}, float hi = {0.0}",
        "y = Clip(a, lo, hi)",
        "float[3]",
    ),
    "half and back": (
        "float[4] a = {0.1, 65504.0, 70000.0, 0.00000001}",
        "h = Cast <to: int = 10> (a) y = Cast <to: int = 1> (h)",
        "float[4]",
    ),
    "bfloat16 and back": (
        "float[4] a = {0.1, 3.4e38, 1.00390625, 1.01171875}",
        "h = Cast <to: int = 16> (a) y = Cast <to: int = 1> (h)",
        "float[4]",
    ),
    "ties": (
        "float[2, 3] a = {1.0, 3.0, 3.0, 2.0, 2.0, 1.0}",
        "y = ArgMax <axis: int = 1, keepdims: int = 0> (a)",
        "int64[2]",
    ),
    "last of ties": (
        "float[2, 3] a = {1.0, 3.0, 3.0, 2.0, 2.0, 1.0}",
        "y = ArgMax <axis: int = 1, keepdims: int = 0, select_last_index: int = 1> (a)",
        "int64[2]",
    ),
    "sum from behind": (
        "int64[4] a = {1, 2, 3, 4}, int64 axis = {0}",
        "y = CumSum <reverse: int = 1, exclusive: int = 1> (a, axis)",
        "int64[4]",
    ),
    "backwards": (
        "int64[4] a = {1, 2, 3, 4}, int64[1] s = {-1}, int64[1] e = {-9223372036854775807}, "
        "int64[1] t = {-2}, int64[1] x0 = {0}",
        "y = Slice(a, s, e, x0, t)",
        "int64[2]",
    ),
    "from the end": ("int64[4] a = {1, 2, 3, 4}, int64[2] i = {-1, 1}", "y = Gather(a, i)", "int64[2]"),
    "range down": ("int64 s = {5}, int64 e = {0}, int64 t = {-2}", "y = Range(s, e, t)", "int64[3]"),
    "nan": ("float[3] a = {1.0, 2.0, 0.0}, float z = {0.0}", "n = Div(z, z) b = Add(a, n) y = Max(b, a)", "float[3]"),
    "quantize": (
        "float[5] a = {0.5, 1.5, 2.5, -0.5, 400.0}, float s = {1.0}, int8 z = {1}",
        "y = QuantizeLinear(a, s, z)",
        "int8[5]",
    ),
    "quantize, none": (
        "float[5] a = {0.5, 1.5, 2.5, -0.5, 400.0}, float s = {1.0}",
        "y = QuantizeLinear(a, s)",
        "uint8[5]",
    ),
    "shift": (
        "uint8[3] a = {1, 128, 255}, uint8[3] b = {7, 1, 8}",
        'y = BitShift <direction: string = "LEFT"> (a, b)',
        "uint8[3]",
    ),
    "one hot": (
        "int64[3] a = {0, -1, 5}, int64 d = {3}, float[2] v = {0.0, 1.0}",
        "y = OneHot(a, d, v)",
        "float[3, 3]",
    ),
    "empty sum": (
        "int64[1] axes = {0}, int64[2] shape = {0, 3}, float z = {0.0}",
        "a = Expand(z, shape) y = ReduceSum <keepdims: int = 0> (a, axes)",
        "float[3]",
    ),
    "pad": ("float[2] a = {1.0, 2.0}, int64[2] p = {1, 2}", "y = Pad(a, p)", "float[5]"),
    "where of constants": (
        "bool[2] c = {1, 0}, int64[2] a = {1, 2}, int64[1] b = {9}",
        "y = Where(c, a, b)",
        "int64[2]",
    ),
    "trilu": (
        "float[2, 3] a = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, int64 k = {-1}",
        "y = Trilu <upper: int = 1> (a, k)",
        "float[2, 3]",
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_computed_now_is_what_would_be_computed_later(name: str) -> None:
    """Constant expressions: the folder's arithmetic is the runtime's."""
    constants, body, kind = FOLDED[name]
    model = model_of(
        f"(float[8, 8] x) => ({kind} y, float[8, 8] apart) <{constants}>", body + " apart = Identity(x)", opset=21
    )
    x = np.zeros((8, 8), np.float32)
    want = ReferenceSession(model, threads=1).run({"x": x})["y"]
    PassManager([create(one, {}) for one in EXACT], instruments=[]).run(model, PassContext())
    got = ReferenceSession(model, threads=1).run({"x": x})["y"]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype
