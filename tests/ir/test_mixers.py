"""Mixers of tokens that are no attention of a softmax are named, and nothing else is."""

from __future__ import annotations

import pytest

from tests.ir.canonical import model_of
from xopt.facts import left_out
from xopt.ir.canonical import canonicalize

INPUTS = "float[B, 2, S, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v"
ADDITIVE = "additive-attention"
TURNED = "kt = Transpose <perm: ints = [0, 1, 3, 2]> (k) "


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        ("kv = MatMul(kt, v) y = MatMul(q, kv)", {"linear-attention"}),
        ("kv = MatMul(kt, v) n = Mul(kv, half) y = MatMul(q, n)", {"linear-attention"}),
        ('kv = Einsum <equation: string = "bhde,bhef->bhdf"> (kt, v) y = MatMul(q, kv)', {"linear-attention"}),
        ("s = MatMul(q, kt) w = Sigmoid(s) y = MatMul(w, v)", {"no-softmax"}),
        ("s = MatMul(q, kt) w = Relu(s) p = Mul(w, w) y = MatMul(p, v)", {"no-softmax"}),
        ("f = Unsqueeze(q, last) d = DFT(f, , three) y = Identity(d)", {"fourier"}),
        ("l = MatMul(q, column) w = Softmax <axis: int = 2> (l) p = Mul(w, q) y = ReduceSum(p, last)", {ADDITIVE}),
        (
            "l = MatMul(q, column) b = Add(l, one) n = Mul(b, half) "
            "w = Softmax(n) p = Mul(q, w) y = ReduceMean(p, last)",
            {ADDITIVE},
        ),
        ("l = MatMul(q, column) w = Softmax(l) p = Mul(w, v) y = ReduceSum(p, last)", set()),
        ("l = MatMul(q, column) w = Sigmoid(l) p = Mul(w, q) y = ReduceSum(p, last)", set()),
        ("s = MatMul(q, kt) y = Identity(s)", set()),
        ("l = MatMul(q, square) w = Relu(l) y = MatMul(w, square)", set()),
        ("l = MatMul(q, square) s = Softmax <axis: int = -1> (l) y = Identity(s)", set()),
    ],
)
def test_named(body: str, reasons: set[str]) -> None:
    column = "float[4, 1] column = {1, 2, 3, 4}, float[1] one = {1}"
    constants = f"float half = {{0.5}}, int64[1] last = {{-1}}, int64 three = {{3}}, {column}, float[4, 4] square = {{"
    model = model_of(f"({INPUTS}) => (float[a, b, c, d] y) <{constants}{', '.join('1' * 16)}}}>", TURNED + body)
    report = canonicalize(model)
    found = left_out(model, report.refused)
    assert {place["reason"] for place in found if place["what"] == "token mixer"} == reasons


@pytest.mark.parametrize("chosen", ["Gather(stack, i)", "GatherND(stack, pairs)"])
@pytest.mark.parametrize(("stack", "reasons"), [("float[3, 4, 4]", set()), ("float[3, 4]", {"no-softmax"})])
def test_chosen_matrices_are_weights_but_chosen_rows_are_tokens(stack: str, reasons: set[str], chosen: str) -> None:
    count = 48 if stack.count(",") == 2 else 12
    body = (
        f"last = Constant <value = int64[1] {{-1}}> () pairs = Unsqueeze (i, last) m = {chosen} "
        "t = Transpose <perm: ints = [0, 1, 3, 2]> (m) "
        "s = MatMul(q, t) w = Relu(s) y = MatMul(w, m)"
    )
    index = "int64[B, 2]" if count == 48 else "int64[B, 2, S]"
    constants = f"{stack} stack = {{{', '.join('1' * count)}}}"
    model = model_of(f"(float[B, 2, S, 4] q, {index} i) => (float[B, 2, S, 4] y) <{constants}>", body)
    report = canonicalize(model)
    found = left_out(model, report.refused)
    assert {place["reason"] for place in found if place["what"] == "token mixer"} == reasons


def test_heads_that_are_mixed_before_the_softmax() -> None:
    body = (
        "s = MatMul(q, kt) f = Transpose <perm: ints = [0, 2, 3, 1]> (s) m = MatMul(f, heads) "
        "b = Transpose <perm: ints = [0, 3, 1, 2]> (m) w = Softmax <axis: int = -1> (b) y = MatMul(w, v)"
    )
    model = model_of(f"({INPUTS}) => (float[B, 2, S, 4] y) <float[2, 2] heads = {{1, 2, 3, 4}}>", TURNED + body)
    report = canonicalize(model)
    assert "mixed-heads" in {place["reason"] for place in left_out(model, report.refused)}


@pytest.mark.parametrize("attends", [True, False])
def test_attention_in_a_branch(attends: bool) -> None:
    """No pass looks into branches: what attends there is named, and nothing else in them."""
    taken = "s = MatMul(q, kt) w = Softmax <axis: int = -1> (s) z = MatMul(w, v)" if attends else "z = Relu(q)"
    body = (
        f"y = If (c) <then_branch = g1 () => (float[a, b, e, d] z) {{ {taken} }}, "
        "else_branch = g2 () => (float[a, b, e, d] n) { n = Neg(q) }>"
    )
    model = model_of(f"({INPUTS}, bool c) => (float[a, b, e, d] y)", TURNED + body)
    report = canonicalize(model)
    found = [place["reason"] for place in left_out(model, report.refused) if place["what"] == "attention"]
    assert found == ["inside-if"] * attends
