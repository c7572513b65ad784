"""Linear layers take one form, whatever the exporter wrote."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import check, model_of

WEIGHTS = (
    "<float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2, 4] v = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {0.5, -1}, "
    "float[1, 2] b2 = {0.5, -1}, int64[2] flat = {-1, 4}, int64[3] split = {-1, 3, 2}>"
)
FLAT = f"(float[B, 4] x) => (float[B, 2] y) {WEIGHTS}"
DEEP = f"(float[B, 3, 4] x) => (float[B, 3, 2] y) {WEIGHTS}"


def form(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm(x, w, b)",
        "y = Gemm <transB: int = 1> (x, v, b)",
        "y = Gemm <alpha: float = 0.5, beta: float = 2.0> (x, w, b2)",
        "z = MatMul(x, w) y = Add(b, z)",
    ],
)
def test_two_dimensions(body: str) -> None:
    model = check(model_of(FLAT, body))
    assert form(model) == ["MatMul", "Add"]
    product, bias = model.graph[0], model.graph[1]
    assert product.inputs[1].const_value.shape == (4, 2)
    assert bias.inputs[0] is product.outputs[0]
    assert bias.inputs[1].const_value.shape == (2,)


def test_no_bias() -> None:
    assert form(check(model_of(FLAT, "y = Gemm(x, w)"))) == ["MatMul"]
    assert form(check(model_of(FLAT, "y = Gemm <beta: float = 0.0> (x, w, b)"))) == ["MatMul"]


def test_transposed_activations_stay_transposed() -> None:
    signature = f"(float[4, 3] x) => (float[3, 2] y) {WEIGHTS}"
    assert form(check(model_of(signature, "y = Gemm <transA: int = 1> (x, w, b)"))) == ["Transpose", "MatMul", "Add"]


def test_transposed_weight_is_folded_once() -> None:
    body = "t = Transpose <perm: ints = [1, 0]> (v) p = MatMul(x, t) q = MatMul(x, t) r = Relu(q) y = Add(p, r)"
    model = check(model_of(DEEP, body))
    assert form(model).count("Transpose") == 0
    assert len([v for v in model.graph.initializers.values() if v.const_value.size == 8]) == 1


def test_reshapes_around_a_linear_layer_go() -> None:
    """GPT-2's Conv1D flattens tokens before a Gemm and restores them after."""
    body = "f = Reshape(x, flat) g = Gemm(f, w, b) y = Reshape(g, split)"
    model = check(model_of(DEEP, body))
    assert form(model) == ["MatMul", "Add"]
    assert str(model.graph[1].outputs[0].shape) == "[B,3,2]"


def test_reshape_that_regroups_stays() -> None:
    signature = DEEP.replace("split = {-1, 3, 2}", "split = {3, -1, 2}").replace("float[B, 3, 2] y", "float[p, q, 2] y")
    body = "f = Reshape(x, flat) g = Gemm(f, w, b) y = Reshape(g, split)"
    assert form(check(model_of(signature, body))) == ["Reshape", "MatMul", "Add", "Reshape"]


@pytest.mark.parametrize(
    "body", ['y = Einsum <equation = "bsk,kn->bsn"> (x, w)', 'y = Einsum <equation = "bsk,nk->bsn"> (x, v)']
)
def test_einsum(body: str) -> None:
    assert form(check(model_of(DEEP, body))) == ["MatMul"]


def test_einsum_in_another_order() -> None:
    signature = DEEP.replace("float[B, 3, 2] y", "float[2, 3, B] y")
    body = 'y = Einsum <equation = "bsk,kn->nsb"> (x, w)'
    assert form(check(model_of(signature, body))) == ["MatMul", "Transpose"]


@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bqhd,bkhd->qhkb", "bqhd,bthd->bqth"])
def test_einsum_of_two_computed_tensors(equation: str) -> None:
    letters = dict(zip("bqhdkt", "B3245S"))
    letters["k"] = letters["t"] = "S"
    result = ", ".join(letters[letter] for letter in equation.split("->")[1])
    signature = f"(float[B, 3, 2, 4] x, float[B, S, 2, 4] z) => (float[{result}] y)"
    found = form(check(model_of(signature, f'y = Einsum <equation = "{equation}"> (x, z)')))
    assert "Einsum" not in found
    assert found.count("MatMul") == 1


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("bsk,kn->bn", "B, 2"), ("bsk,kn->bkn", "B, 4, 2"), ("bsk,kn->bskn", "B, 3, 4, 2")],
)
def test_einsums_that_are_no_product_stay(equation: str, shape: str) -> None:
    signature = DEEP.replace("float[B, 3, 2] y", f"float[{shape}] y")
    assert form(check(model_of(signature, f'y = Einsum <equation = "{equation}"> (x, w)'))) == ["Einsum"]


def test_packed_weights_are_cut_now() -> None:
    numbers = "float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, int64[2] sizes = {2, 1}"
    signature = f"(float[B, 3, 4] x) => (float[B, 3, 2] y, float[B, 3, 1] z) <{numbers}>"
    parts = "a, c = Split <axis: int = 0> (w, sizes) at = Transpose (a) ct = Transpose (c) "
    body = parts + "y = MatMul(x, at) z = MatMul(x, ct)"
    assert form(check(model_of(signature, body))) == ["MatMul", "MatMul"]


def test_computed_right_operand_is_no_linear_layer() -> None:
    signature = "(float[B, 4] x, float[4, 2] u) => (float[B, 2] y) <float[2] b = {1, 2}>"
    model = check(model_of(signature, "y = Gemm <alpha: float = 2.0> (x, u, b)"))
    assert form(model) == ["Mul", "MatMul", "Add"]
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), np.float32(2))
