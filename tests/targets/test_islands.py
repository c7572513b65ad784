"""Float32 in the midst of half precision, and half precision in the midst of float32, are compiled as one type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.targets.running import execute
from xopt import targets
from xopt.ir import canonicalize
from xopt.targets.lowering import Lowered, lower

Array = np.ndarray
KINDS = {"float16": 10, "bfloat16": 16}
ONE_BITS = {"float16": 11, "bfloat16": 8}
"""Bits of a mantissa, and the one before them."""

ATTENTION = """
q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
q4 = Reshape(q, heads) q5 = Transpose <perm = [0, 2, 1, 3]> (q4)
k4 = Reshape(k, heads) k5 = Transpose <perm = [0, 2, 3, 1]> (k4)
v4 = Reshape(v, heads) v5 = Transpose <perm = [0, 2, 1, 3]> (v4)
s = MatMul(q5, k5) sf = Cast <to = 1> (s) p = Softmax <axis = -1> (sf) ph = Cast <to = KIND> (p)
o4 = MatMul(ph, v5) o5 = Transpose <perm = [0, 2, 1, 3]> (o4) o = Reshape(o5, joined)
"""
GELU = """
h = MatMul(o, wo) e = Div(h, root) ef = Cast <to = 1> (e) r = Erf(ef) rh = Cast <to = KIND> (r)
u = Add(rh, one) t = Mul(h, u) g = Mul(t, half) y = MatMul(g, wy)
"""


def prepared(signature: str, body: str, kind: str, **constants: Any) -> ir.Model:
    """A canonical model, from text in which KIND is the number of a type and HALF its name."""
    text = f'<ir_version: 10, opset_import: ["" : 22]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text.replace("KIND", str(KINDS[kind])).replace("HALF", kind))
    for name, array in constants.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    model = ir.from_proto(proto)
    canonicalize(model)
    return model


def kernels(lowered: Lowered) -> str:
    """The names of what is left to be called."""
    import tvm

    machine = targets.get("cpu")
    with machine.tvm_target(), tvm.transform.PassContext():
        module = machine.pipeline()(lowered.module)
    return " ".join(variable.name_hint for variable in module.get_global_vars())


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_gelu_with_islands_are_single_kernels(kind: str) -> None:
    """As exact as float32: the result is the nearest number of its type, which no chain of rounded steps would give."""
    random = np.random.default_rng(0)
    narrow = ir.DataType(KINDS[kind]).numpy()
    weights = {name: random.standard_normal((16, 16)).astype(narrow) / 4 for name in ("wq", "wk", "wv", "wo", "wy")}
    numbers = {"root": 2**0.5, "one": 1, "half": 0.5}
    shapes = {"heads": np.array([0, 0, 2, 8]), "joined": np.array([0, 0, 16])}
    constants = {name: np.array(value, narrow) for name, value in numbers.items()}
    model = prepared(
        "(HALF[B, S, 16] x) => (HALF[B, S, 16] y)", ATTENTION + GELU, kind, **weights, **shapes, **constants
    )
    lowered = lower(model, targets.get("cpu"))
    called = kernels(lowered)
    assert "attention_" in called
    assert "_gelu" in called
    assert "rounded" not in called
    x = random.standard_normal((2, 5, 16)).astype(narrow)
    given = x if kind == "float16" else x.view(np.uint16)
    found = np.asarray(execute(lowered, {"x": given})[0]).view(narrow).astype(np.float64)
    exact = _exact(x.astype(np.float64), {name: array.astype(np.float64) for name, array in weights.items()})
    np.testing.assert_allclose(found, exact, rtol=1.01 * 2.0 ** -ONE_BITS[kind], atol=1e-5)


def _exact(x: Array, weights: dict[str, Array]) -> Array:
    from math import erf

    q, k, v = ((x @ weights[f"w{part}"]).reshape(2, 5, 2, 8).transpose(0, 2, 1, 3) for part in "qkv")
    scores = np.exp(q @ k.transpose(0, 1, 3, 2))
    o = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(2, 5, 16)
    h = o @ weights["wo"]
    return h * 0.5 * (1 + np.vectorize(erf)(h * 0.5**0.5)) @ weights["wy"]


@pytest.mark.parametrize(
    "body",
    [
        "n = Cast <to = KIND> (x) y = Cast <to = 1> (n)",
        "n = Cast <to = KIND> (x) m = Transpose <perm = [1, 0]> (n) r = Relu(m) y = Cast <to = 1> (r)",
        "n = Cast <to = KIND> (x) m = Mul(n, two) y = Cast <to = 1> (m)",
        "n = Cast <to = KIND> (x) w = Cast <to = 1> (n) y = Sub(x, w)",
    ],
    ids=["at-once", "moved", "doubled", "the-error"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rounding_that_shows_stays(kind: str, body: str) -> None:
    narrow = ir.DataType(KINDS[kind]).numpy()
    model = prepared("(float[6, 6] x) => (float[6, 6] y)", body, kind, two=np.array(2, narrow))
    x = np.random.default_rng(1).standard_normal((6, 6)).astype(np.float32)
    near = x.astype(narrow).astype(np.float32)
    expected = x - near if "Sub" in body else 2 * near if "Mul" in body else np.maximum(near.T, 0)
    expected = near if body.startswith("n = Cast <to = KIND> (x) y") else expected
    np.testing.assert_array_equal(execute(lower(model, targets.get("cpu")), {"x": x})[0], expected)


def test_whole_numbers_are_taken_of_rounded_ones() -> None:
    """An integer is made of the number that float16 has; a sum of it keeps its digits."""
    body = "n = Cast <to = KIND> (x) s = Add(n, n) w = Cast <to = 1> (s) t = Cast <to = 6> (n) z = Identity(t)"
    model = prepared("(float[3] x) => (float[3] w, int32[3] z)", body, "float16")
    x = np.array([2048.9, 4097.5, -0.7], np.float32)
    doubled, whole = execute(lower(model, targets.get("cpu")), {"x": x})
    np.testing.assert_array_equal(whole, x.astype(np.float16).astype(np.int32))
    np.testing.assert_allclose(doubled, 2 * x, rtol=2**-10)


def test_branches_keep_one_type() -> None:
    """What an If gives is of one type in both of its branches, and outputs keep theirs."""
    then = "then () => (float16[4] a) { af = Cast <to = 1> (x) ae = Exp(af) a = Cast <to = 10> (ae) }"
    other = "other () => (float16[4] b) { b = Neg(x) }"
    body = f"chosen = If (c) <then_branch = {then}, else_branch = {other}> y = Mul(chosen, x)"
    model = prepared("(float16[4] x, bool c) => (float16[4] y)", body, "float16")
    run = lower(model, targets.get("cpu"))
    x = np.array([0.5, -1, 2, 0], np.float16)
    for flag, wide in ((True, np.exp(x.astype(np.float32)) * x), (False, -(x.astype(np.float32) ** 2))):
        found = execute(run, {"x": x, "c": np.array(flag)})[0]
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, wide, rtol=2**-10)
