"""Norms in every spelling become one node with the same outputs; lookalikes stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.ir.canonical import check, model_of
from xopt.ir import canonicalize

MEAN = "m = ReduceMean(x, last) d = Sub(x, m) "
SQUARES = {"pow": "q = Pow(d, two)", "mul": "q = Mul(d, d)"}
DIVISIONS = {
    "div": "r = Sqrt(u) n = Div(d, r)",
    "reciprocal": "r = Sqrt(u) i = Reciprocal(r) n = Mul(d, i)",
    "one-over": "r = Sqrt(u) i = Div(one, r) n = Mul(i, d)",
    "power": "i = Pow(u, minus_half) n = Mul(d, i)",
    "half-power": "r = Pow(u, half) n = Div(d, r)",
}
AFFINE = {"full": "s = Mul(n, scale) y = Add(s, bias)", "left": "s = Mul(scale, n) y = Add(bias, s)"}
CONSTANTS = (
    "int64[1] last = {-1}, float two = {2.0}, float one = {1.0}, float half = {0.5}, float minus_half = {-0.5}, "
    "float eps = {0.00001}, float[4] scale = {1.5, 0.5, -1.0, 2.0}, float[4] bias = {0.1, 0.2, -0.3, 0.0}"
)


def build(body: str, constants: str = CONSTANTS) -> ir.Model:
    return model_of(f"(float[B, S, 4] x) => (float[B, S, 4] y) <{constants}>", body)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("kind", ["LayerNormalization", "RMSNormalization"])
def test_decomposed(kind: str, square: str, division: str, affine: str) -> None:
    start = MEAN if kind == "LayerNormalization" else "d = Identity(x) "
    end = AFFINE[affine] if kind == "LayerNormalization" else "y = Mul(scale, n)"
    body = f"{start} {SQUARES[square]} v = ReduceMean(q, last) u = Add(eps, v) {DIVISIONS[division]} {end}"
    model = check(build(body), {kind: 1})
    node = model.graph[0]
    assert node.attributes["axis"].value == -1
    assert node.attributes["epsilon"].value == pytest.approx(1e-5)


def test_no_affine_gets_ones() -> None:
    body = f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) u = Add(v, eps) r = Sqrt(u) y = Div(d, r)"
    model = check(build(body), {"LayerNormalization": 1})
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), np.ones(4))


def test_a_bias_of_more_axes_is_none() -> None:
    """What is added has four axes, and so has the sum."""
    body = f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) u = Add(v, eps) r = Sqrt(u) n = Div(d, r) y = Add(n, tall)"
    constants = CONSTANTS + ", float[1, 1, 1, 4] tall = {1, 2, 3, 4}"
    check(model_of(f"(float[B, S, 4] x) => (float[1, B, S, 4] y) <{constants}>", body))


@pytest.mark.parametrize("kind", [10, 16])
@pytest.mark.parametrize("place", ["m", "d", "q", "r"])
def test_what_is_rounded_inside_is_not_the_norm(place: str, kind: int) -> None:
    """Half precision, or bfloat16, somewhere between: a norm in float32 gives other numbers."""
    parts = {
        "m": "m = ReduceMean(x, last)", "d": "d = Sub(x, m)", "q": "q = Mul(d, d)", "v": "v = ReduceMean(q, last)",
        "u": "u = Add(v, eps)", "r": "r = Sqrt(u)", "y": "y = Div(d, r)",
    }  # fmt: skip
    rounded = parts[place].replace(f"{place} =", f"{place}0 =") + (
        f" {place}1 = Cast <to: int = {kind}> ({place}0) {place} = Cast <to: int = 1> ({place}1)"
    )
    check(build(" ".join({**parts, place: rounded}.values())))


def test_two_subtractions() -> None:
    """Old exports compute x - mean twice."""
    body = (
        "m = ReduceMean(x, last) d = Sub(x, m) e = Sub(x, m) q = Mul(e, e) v = ReduceMean(q, last) u = Add(v, eps) "
        "r = Sqrt(u) n = Div(d, r) s = Mul(n, scale) y = Add(s, bias)"
    )
    check(build(body), {"LayerNormalization": 1})


@pytest.mark.parametrize(
    "body",
    [
        f"{MEAN} q = Mul(d, d) v = ReduceMean <keepdims: int = 1> (q, first) u = Add(v, eps) r = Sqrt(u) y = Div(d, r)",
        f"{MEAN} q = Mul(d, x) v = ReduceMean(q, last) u = Add(v, eps) r = Sqrt(u) y = Div(d, r)",
        f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) u = Add(v, eps) y = Div(d, u)",
        f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) u = Mul(v, eps) r = Sqrt(u) y = Div(d, r)",
    ],
    ids=["other-axis", "no-square", "no-root", "no-epsilon"],
)
def test_lookalikes_stay(body: str) -> None:
    model = check(build(body, CONSTANTS + ", int64[1] first = {0}"))
    assert not {"LayerNormalization", "RMSNormalization"} & {node.op_type for node in model.graph}


def test_middle_read_elsewhere_still_fuses() -> None:
    text = f"(float[B, S, 4] x) => (float[B, S, 4] y, float[B, S, 1] m) <{CONSTANTS}>"
    body = f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) u = Add(v, eps) r = Sqrt(u) y = Div(d, r)"
    check(model_of(text, body), {"LayerNormalization": 1, "ReduceMean": 1})


def test_unknown_width_without_scale_is_refused() -> None:
    text = f"(float[B, S, D] x) => (float[B, S, D] y) <{CONSTANTS}>"
    model = model_of(text, "q = Mul(x, x) v = ReduceMean(q, last) u = Add(v, eps) r = Sqrt(u) y = Div(x, r)")
    report = canonicalize(model)
    assert "norm-width-unknown" in {refused.reason for refused in report.refused}
    assert Counter(node.op_type for node in model.graph)["Div"] == 1


@pytest.mark.parametrize("working", [1, 11])
def test_float16_with_casts(working: int) -> None:
    """T5 in half precision works in float32, the exporter of TorchScript in double; scale and result are float16."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float16[B, 4] x) => (float16[B, 4] y) <KIND eps = {0.000001}, '
        "KIND two = {2.0}, int64[1] last = {-1}> { f = Cast <to: int = TO> (x) q = Pow(f, two) v = ReduceMean(q, last) "
        "u = Add(v, eps) r = Sqrt(u) n = Div(f, r) h = Cast <to: int = 10> (n) y = Mul(scale, h) }".replace(
            "KIND", {1: "float", 11: "double"}[working]
        ).replace("TO", str(working))
    )
    scale = np.array([1.5, 0.5, -1.0, 2.0], np.float16)
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "scale"))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
    want = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    canonical = ir.from_proto(model)
    canonicalize(canonical)
    assert [node.op_type for node in canonical.graph] == ["RMSNormalization"]
    f = x.astype(np.float64)
    exact = f / np.sqrt((f**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(want[0], exact, rtol=2e-3)  # two roundings to float16, 2**-11 each
    reference = onnx.reference.ReferenceEvaluator(ir.to_proto(canonical)).run(None, {"x": x})[0]
    np.testing.assert_allclose(reference, exact, rtol=2e-3)


def test_existing_nodes_get_axis_and_epsilon() -> None:
    model = check(build("y = LayerNormalization <axis: int = 2> (x, scale, bias)"), {"LayerNormalization": 1})
    attributes = model.graph[0].attributes
    assert (attributes["axis"].value, attributes["epsilon"].value) == (-1, pytest.approx(1e-5))
