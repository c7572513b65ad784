"""Feed-forward networks of stacked matrices are named, and nothing else is."""

from __future__ import annotations

import pytest

from tests.ir.canonical import model_of
from xopt.facts import left_out
from xopt.ir.canonical import canonicalize

UP, DOWN, FLAT = "u = MatMul(x, up) ", "y = MatMul(h, down)", "u = MatMul(x, flat) "


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (UP + "h = Relu(u) " + DOWN, True),
        (UP + "h = Mul(u, u) g = Tanh(h) t = Mul(g, u) y = MatMul(t, down)", True),
        (FLAT + "h = Gelu(u) " + DOWN, True),
        ("m = Gather(up, i) n = Gather(down, i) u = MatMul(x, m) h = Relu(u) y = MatMul(h, n)", True),
        (UP + 'h = Relu(u) y = Einsum <equation: string = "behw,ewc,be->bhc"> (h, down, gate)', True),
        (UP + "h = Neg(u) " + DOWN, False),
        ("h = Relu(x) y = MatMul(h, up)", False),
        (FLAT + "h = Relu(u) y = MatMul(h, flat)", False),
        (FLAT + "h = Relu(u) y = MatMul(h, one)", False),
    ],
    ids=["stacks", "gated", "one for all", "chosen", "weighed", "linear", "alone", "no stack", "a stack of one"],
)
def test_named(body: str, named: bool) -> None:
    values = {"float[3, 4, 4] up": 48, "float[3, 4, 4] down": 48, "float[4, 4] flat": 16, "float[1, 4, 4] one": 16}
    constants = ", ".join(f"{name} = {{{', '.join(str(n % 5) for n in range(size))}}}" for name, size in values.items())
    rank = "a, b, c" if "Einsum" in body else "a, b, c, d"
    inputs = "float[B, 3, S, 4] x, int64[3] i, float[B, 3] gate"
    model = model_of(f"({inputs}) => (float[{rank}] y) <{constants}>", body, 20)
    report = canonicalize(model)
    found = {(place["what"], place["reason"]) for place in left_out(model, report.refused)}
    assert (("feed-forward", "stacked-weights") in found) == named


def test_a_softmax_of_a_projection_is_no_attention() -> None:
    """Routers choose experts, classifiers classes along any axis: neither is an attention that was not found."""
    body = (
        "l = MatMul(x, flat) w = Softmax <axis: int = -1> (l) c = Softmax <axis: int = 1> (x) "
        "best, place = TopK <axis: int = -1> (w, two) y = ReduceSum(best) z = Identity(c)"
    )
    constants = f"float[4, 3] flat = {{{', '.join('1' * 12)}}}, int64[1] two = {{2}}"
    model = model_of(f"(float[B, S, 4] x) => (float[a, b, c] y, float[B, S, 4] z) <{constants}>", body)
    assert not left_out(model, canonicalize(model).refused)
