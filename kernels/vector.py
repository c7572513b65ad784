"""Vector math in plain multiply-adds: exp, erfc, tanh, sigmoid and the activations made of them.

Every function takes and gives a float32 vector expression of ``lanes`` lanes; NaN goes in and comes out.  Polynomials
are minimax fits (Lawson iteration on Chebyshev nodes); tests/kernels/test_vector.py holds their error bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tvm import tirx

from xopt.kernels.emit import Expr, keep, let, splat

LOG2_E = 1.4426950408889634
LN_2_HIGH = 0.693359375  # exact in 10 bits, so that n * LN_2_HIGH is exact for every exponent n
LN_2_LOW = -2.12194440054690583e-4
SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654
MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves an integer in the low mantissa bits
MAGIC_BITS = 0x4B400000
BIAS = 127.0

# 2**f on [-0.5, 0.5], relative error 2e-9
EXP2 = (0.00015353362, 0.0013398874, 0.0096184369, 0.0555033237, 0.2402264774, 0.6931471825, 1.0)
# log2(erfc(z)) / z on [0, 4], such that erfc is off by less than 2e-8
LOG2_ERFC = (
    -4.535860352916643e-05, 0.0004455076996237, -0.0014894418418407, -0.0007746291230432, 0.0282536800950766,
    -0.1484816074371338, -0.9184163808822632, -1.6279085874557495,
)  # fmt: skip
# erf(x / sqrt 2) / x and tanh(sqrt(2 / pi) (x + 0.044715 x**3)) / x on [-4.5, 4.5], in 2 (x / 4.5)**2 - 1
COARSE_END = 4.5
COARSE_ERF = (
    0.0067073898, -0.0186570766, 0.0244170327, -0.0334880881, 0.0552588125, -0.0811115355, 0.109637135, -0.15434392,
    0.313804225,
)  # fmt: skip
COARSE_TANH = (
    0.00771173232, -0.0203097284, 0.0240008708, -0.0315331476, 0.0543033766, -0.0811616201, 0.109883864, -0.154539033,
    0.313869506,
)  # fmt: skip
ERFC_END = 4.0  # erfc(4) = 1.5e-8 is below half a unit in the last place of 1


def horner(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    """The polynomial with ``coefficients``, highest power first."""
    value = splat(coefficients[0], lanes)
    for c in coefficients[1:]:
        value = value * x + splat(c, lanes)
    return value


def at_least(x: Expr, bound: float, lanes: int) -> Expr:
    return tirx.Select(x < splat(bound, lanes), splat(bound, lanes), x)


def at_most(x: Expr, bound: float, lanes: int) -> Expr:
    return tirx.Select(x > splat(bound, lanes), splat(bound, lanes), x)


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger of two vectors; ``a`` where ``b`` is NaN."""
    return tirx.Select(a < b, b, a)


def _integer(n: Expr, offset: float, lanes: int) -> Expr:
    """The integer n + offset in the low bits of an int32 vector: no conversion, so NaN is no undefined behaviour."""
    return tirx.reinterpret(f"int32x{lanes}", n + splat(MAGIC + offset, lanes))


def _power(exponent: Expr, lanes: int) -> Expr:
    """2**n from an int32 vector that holds n + 127 in its low 9 bits; 0 for n = -127."""
    return tirx.reinterpret(f"float32x{lanes}", exponent << splat(23, lanes, "int32"))


def exp2_nonpositive(x: Expr, lanes: int) -> Expr:
    """2**x for x <= 0 (softmax, erfc): relative error 1e-7, zero below 2**-126.5."""
    x = keep(at_least(keep(x, lanes), -127.0, lanes), lanes)
    n = keep(tirx.nearbyint(x), lanes)
    return horner(EXP2, keep(x - n, lanes), lanes) * _power(_integer(n, BIAS, lanes), lanes)


def exp(x: Expr, lanes: int) -> Expr:
    """e**x over the whole range: relative error 1e-7, gradual underflow, overflow to infinity."""
    x = keep(at_most(keep(at_least(x, -105.0, lanes), lanes), 90.0, lanes), lanes)
    n = keep(tirx.nearbyint(x * splat(LOG2_E, lanes)), lanes)
    rest = x - n * splat(LN_2_HIGH, lanes) - n * splat(LN_2_LOW, lanes)
    fraction = keep(rest * splat(LOG2_E, lanes), lanes)
    # 2**n in two factors, since n itself may leave the range of one float
    whole = let(_integer(n, 0.0, lanes) - splat(MAGIC_BITS, lanes, "int32"))
    half = let(whole >> splat(1, lanes, "int32"))
    bias = splat(127, lanes, "int32")
    return horner(EXP2, fraction, lanes) * _power(half + bias, lanes) * _power(whole - half + bias, lanes)


def erf(x: Expr, lanes: int) -> Expr:
    """The error function, absolute error 1e-7."""
    z = keep(at_most(tirx.abs(x), ERFC_END, lanes), lanes)
    erfc = keep(exp2_nonpositive(z * horner(LOG2_ERFC, z, lanes), lanes), lanes)
    one = splat(1.0, lanes)
    return tirx.Select(x < splat(0.0, lanes), erfc - one, one - erfc)


def sigmoid(x: Expr, lanes: int) -> Expr:
    one = splat(1.0, lanes)
    return one / (one + exp(keep(splat(0.0, lanes) - x, lanes), lanes))


def tanh(x: Expr, lanes: int) -> Expr:
    """Hyperbolic tangent, absolute error 2e-7."""
    one, two = splat(1.0, lanes), splat(2.0, lanes)
    return one - two / (one + exp(keep(two * x, lanes), lanes))


def gelu(x: Expr, lanes: int) -> Expr:
    """Gives x * Phi(x) with the exact normal distribution."""
    half = splat(0.5, lanes) * x
    return half + half * erf(keep(x * splat(SQRT_HALF, lanes), lanes), lanes)


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """The tanh form of GELU, as x * sigmoid(2 u) (the same function, one division)."""
    cube = x * x * splat(0.044715, lanes) * x
    return x * sigmoid(keep(splat(2.0 * SQRT_2_OVER_PI, lanes) * (x + cube), lanes), lanes)


def _coarse_gelu(x: Expr, lanes: int, coefficients: Sequence[float]) -> Expr:
    """Gives x / 2 (1 + odd polynomial): absolute error 5e-5, for results that are rounded to 8 bits or so anyway."""
    inside = keep(at_most(keep(at_least(x, -COARSE_END, lanes), lanes), COARSE_END, lanes), lanes)
    u = keep(inside * inside * splat(2.0 / COARSE_END**2, lanes) - splat(1.0, lanes), lanes)
    odd = keep(inside * horner(coefficients, u, lanes), lanes)
    odd = keep(at_most(keep(at_least(odd, -1.0, lanes), lanes), 1.0, lanes), lanes)
    half = splat(0.5, lanes) * x
    return half + half * odd


def swish(x: Expr, lanes: int, alpha: float = 1.0) -> Expr:
    """Gives x * sigmoid(alpha * x): SiLU for alpha 1, quick GELU for 1.702."""
    return x * sigmoid(splat(alpha, lanes) * x, lanes)


def relu(x: Expr, lanes: int) -> Expr:
    return at_least(x, 0.0, lanes)


def identity(x: Expr, lanes: int) -> Expr:
    return x


def activation(name: str, alpha: float = 1.0, coarse: bool = False) -> Callable[[Expr, int], Expr]:
    """The activation of that name: none, gelu, gelu-tanh, swish, relu.

    Args:
        name: which one.
        alpha: the factor inside swish.
        coarse: results are rounded to bfloat16 or to 8 bits, so an absolute error of 5e-5 is lost in the rounding.
    """
    table: dict[str, Callable[[Expr, int], Expr]] = {
        "none": identity,
        "gelu": partial(_coarse_gelu, coefficients=COARSE_ERF) if coarse else gelu,
        "gelu-tanh": partial(_coarse_gelu, coefficients=COARSE_TANH) if coarse else gelu_tanh,
        "swish": partial(swish, alpha=alpha),
        "relu": relu,
    }
    return table[name]
