"""GELU and SiLU in the spellings of common model code become one node; lookalikes stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import check, model_of
from tests.ir.net import Net
from xopt.ir import canonicalize

SIGNATURE = (
    "(float[B, S, 4] x) => (float[B, S, 4] y) <float half = {0.5}, float one = {1.0}, float root2 = {1.4142135}, "
    "float iroot2 = {0.70710678}, float k = {0.7978845608}, float c = {0.044715}, float two = {2.0}, "
    "float three = {3.0}, float quick = {1.702}>"
)
ERF = {
    "div": "a = Div(x, root2) e = Erf(a) s = Add(e, one)",
    "mul": "a = Mul(iroot2, x) e = Erf(a) s = Add(one, e)",
}
GATES = {
    "x*half*s": "h = Mul(x, half) y = Mul(h, s)",
    "x*s*half": "h = Mul(x, s) y = Mul(h, half)",
    "half*s*x": "h = Mul(half, s) y = Mul(h, x)",
    "x*s/two": "h = Mul(s, x) y = Div(h, two)",
}
CUBICS = {
    "pow": "p = Pow(x, three) q = Mul(p, c) r = Add(x, q) a = Mul(r, k)",
    "products": "x2 = Mul(x, x) x3 = Mul(x2, x) q = Mul(c, x3) r = Add(q, x) a = Mul(k, r)",
    "taken-out": "x2 = Mul(x, x) q = Mul(x2, c) r = Add(q, one) z = Mul(x, k) a = Mul(z, r)",
    "hf-fast": "z = Mul(x, k) w = Mul(c, x) v = Mul(w, x) r = Add(one, v) a = Mul(z, r)",
}
SWISH = {
    "silu": "s = Sigmoid(x) y = Mul(x, s)",
    "silu-left": "s = Sigmoid(x) y = Mul(s, x)",
    "quick": "a = Mul(x, quick) s = Sigmoid(a) y = Mul(x, s)",
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("erf", ERF)
def test_erf(erf: str, gate: str) -> None:
    model = check(model_of(SIGNATURE, f"{ERF[erf]} {GATES[gate]}"), {"Gelu": 1})
    assert model.graph[0].attributes["approximate"].value == "none"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cubic", CUBICS)
def test_tanh(cubic: str, gate: str) -> None:
    body = f"{CUBICS[cubic]} t = Tanh(a) s = Add(t, one) {GATES[gate]}"
    model = check(model_of(SIGNATURE, body), {"Gelu": 1})
    assert model.graph[0].attributes["approximate"].value == "tanh"


@pytest.mark.parametrize("kind", SWISH)
def test_swish(kind: str) -> None:
    model = check(model_of(SIGNATURE, SWISH[kind]), {"Swish": 1})
    assert model.graph[0].attributes["alpha"].value == pytest.approx(1.702 if kind == "quick" else 1.0)


def test_gated() -> None:
    signature = SIGNATURE.replace("[B, S, 4] x)", "[B, S, 4] x, float[B, S, 4] u)")
    check(model_of(signature, "s = Sigmoid(x) g = Mul(x, s) y = Mul(g, u)"), {"Swish": 1, "Mul": 1})
    body = f"{ERF['div']} h = Mul(x, half) g = Mul(h, s) y = Mul(g, u)"
    check(model_of(signature, body), {"Gelu": 1, "Mul": 1})


def test_operand_that_is_a_product() -> None:
    """The input of the GELU is itself a product, which must not be taken apart."""
    signature = SIGNATURE.replace("[B, S, 4] x)", "[B, S, 4] u)")
    body = f"x = Mul(u, quick) {ERF['mul']} {GATES['half*s*x']}"
    check(model_of(signature, body), {"Gelu": 1, "Mul": 1})


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul(x, half) e = Erf(a) s = Add(e, one) h = Mul(x, half) y = Mul(h, s)",
        "a = Div(x, root2) e = Erf(a) s = Add(e, half) h = Mul(x, half) y = Mul(h, s)",
        "a = Div(x, root2) e = Erf(a) s = Add(e, one) y = Mul(x, s)",
        "p = Pow(x, two) q = Mul(p, c) r = Add(x, q) a = Mul(r, k) t = Tanh(a) s = Add(t, one) "
        "h = Mul(x, half) y = Mul(h, s)",
        "a = Mul(x, half) s = Sigmoid(a) y = Mul(a, x)",
    ],
    ids=["other-slope", "other-offset", "no-half", "square", "no-gate"],
)
def test_lookalikes_stay(body: str) -> None:
    model = check(model_of(SIGNATURE, body))
    assert not {"Gelu", "Swish"} & {node.op_type for node in model.graph}


def test_defaults_are_written() -> None:
    model = check(model_of(SIGNATURE, "y = Gelu(x)"), {"Gelu": 1})
    assert model.graph[0].attributes["approximate"].value == "none"


def test_gelu_in_bfloat16() -> None:
    """Its constants are rounded to three digits, and numpy does not know them for numbers."""
    one, narrow = np.float32(1), ir.DataType.BFLOAT16.numpy()
    net = Net("narrow")
    x = net.input("x", ["n", 8], ir.DataType.BFLOAT16)

    def number(name: str, value: float) -> ir.Value:
        return net.constant(name, np.asarray(one * value, narrow))

    cube = net.op("Mul", net.op("Pow", x, number("three", 3)), number("c", 0.044715))
    gate = net.op("Tanh", net.op("Mul", net.op("Add", x, cube), number("k", 0.7978845608)))
    half = net.op("Mul", x, number("half", 0.5))
    net.output(net.op("Mul", half, net.op("Add", gate, number("one", 1))), "y")
    model = net.build()
    canonicalize(model)
    assert [node.op_type for node in model.graph] == ["Gelu"]
