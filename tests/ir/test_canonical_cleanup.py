"""What does nothing goes, what does something stays; functions and constants dissolve."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.ir.canonical import check, model_of
from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.ir.io import to_bytes
from xopt.runtime.reference import ReferenceSession

SIGNATURE = (
    "(float[B, 3, 4] x) => (float[B, 3, 4] y) <float zero = {0.0}, float one = {1.0}, float[1, 1, 1, 1] ones = {1.0}, "
    "int64[1] first = {0}, int64[1] last = {9223372036854775807}, int64[1] some = {2}, int64[1] axis = {1}, "
    "float rate = {0.5}, int64[3] same = {0, 3, 4}, int64[2] flat = {-1, 12}, int64[3] back = {-1, 3, 4}, "
    "bool no = {0}>"
)


def form(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "nothing",
    [
        "a = Identity(r)",
        "a = Dropout(r)",
        "a = Dropout(r, rate, no)",
        "a = Cast <to: int = 1> (r)",
        "c = Cast <to: int = 11> (r) a = Cast <to: int = 1> (c)",
        "a = Add(r, zero)",
        "a = Sub(r, zero)",
        "a = Mul(one, r)",
        "a = Div(r, one)",
        "a = Transpose <perm: ints = [0, 1, 2]> (r)",
        "t = Transpose <perm: ints = [2, 0, 1]> (r) a = Transpose <perm: ints = [1, 2, 0]> (t)",
        "a = Reshape(r, same)",
        "f = Reshape(r, flat) a = Reshape(f, back)",
        "u = Unsqueeze(r, axis) a = Squeeze(u, axis)",
        "a = Concat <axis: int = 1> (r)",
        "a = Slice(r, first, last, axis)",
        "s = Shape(r) a = Expand(r, s)",
    ],
)
def test_goes(nothing: str) -> None:
    assert form(check(model_of(SIGNATURE, f"r = Relu(x) {nothing} y = Tanh(a)"))) == ["Relu", "Tanh"]


@pytest.mark.parametrize(
    ("something", "left"),
    [
        ("c = Cast <to: int = 10> (r) a = Cast <to: int = 1> (c)", ["Cast", "Cast"]),
        ("a = Sub(zero, r)", ["Sub"]),
        ("a = Div(one, r)", ["Div"]),
        ("m = Mul(r, ones) q = Reshape(m, back) a = Sqrt(q)", ["Mul", "Reshape", "Sqrt"]),
        (
            "s = Slice(r, first, some, axis) p = ReduceMax <keepdims: int = 1> (s) a = Sub(r, p)",
            ["Slice", "ReduceMax", "Sub"],
        ),
    ],
)
def test_stays(something: str, left: list[str]) -> None:
    assert form(check(model_of(SIGNATURE, f"r = Abs(x) {something} y = Tanh(a)"))) == ["Abs", *left, "Tanh"]


@pytest.mark.parametrize("places", ["{0}", "{-1}"])
def test_whole_rows_at_constant_places_are_gathered(places: str) -> None:
    body = f"i = Constant <value: tensor = int64[1, 1] {places}> () a = Relu(x) y = GatherND(a, i)"
    assert form(check(model_of("(float[B, 3, 4] x) => (float[1, 3, 4] y)", body))) == ["Relu", "Gather"]


@pytest.mark.parametrize(
    "body",
    [
        "i = Constant <value: tensor = int64[1, 2] {0, 2}> () a = Relu(x) y = GatherND(a, i)",
        "i = Constant <value: tensor = int64[2, 1] {2, 0}> () a = Relu(x) y = GatherND <batch_dims: int = 1> (a, i)",
    ],
)
def test_other_places_are_not(body: str) -> None:
    assert form(check(model_of("(float[2, 3, 4] x) => (float[p, 4] y)", body))) == ["Relu", "GatherND"]


def test_transposes_merge() -> None:
    body = "a = Transpose <perm: ints = [2, 0, 1]> (x) b = Relu(a) c = Transpose <perm: ints = [0, 2, 1]> (b) "
    body += "d = Transpose <perm: ints = [1, 2, 0]> (c) y = Tanh(d)"
    model = check(model_of(SIGNATURE.replace("float[B, 3, 4] y", "float[p, q, s] y"), body))
    assert form(model).count("Transpose") == 2


def test_equal_computations_are_shared() -> None:
    body = "a = Relu(x) b = Relu(x) c = Exp(a) d = Exp(b) y = Add(c, d)"
    assert form(check(model_of(SIGNATURE, body))) == ["Relu", "Exp", "Add"]


def test_names_of_inputs_and_outputs_survive() -> None:
    for body in ("y = Identity(x)", "r = Relu(x) y = Identity(r)", "r = Relu(x) i = Identity(r) y = Dropout(i)"):
        model = check(model_of(SIGNATURE, body))
        assert [value.name for value in [*model.graph.inputs, *model.graph.outputs]] == ["x", "y"]


def test_one_value_in_two_outputs() -> None:
    signature = SIGNATURE.replace("float[B, 3, 4] y", "float[B, 3, 4] y, float[B, 3, 4] z")
    model = check(model_of(signature, "r = Relu(x) y = Identity(r) z = Identity(r)"))
    assert [value.name for value in model.graph.outputs] == ["y", "z"]


def test_constants_become_initializers() -> None:
    body = (
        "c = Constant <value_floats: floats = [1.0, 2.0, 3.0, 4.0]> () k = Constant <value_int: int = 2> () "
        "e = Constant <value_float: float = 3.0> () p = Pow(c, e) f = Cast <to: int = 1> (k) "
        "q = Mul(p, f) y = Add(x, q)"
    )
    model = check(model_of(SIGNATURE, body), {"Add": 1})
    (constant,) = [v for v in model.graph.initializers.values() if v.uses()]
    assert constant.const_value.numpy().tolist() == [2, 16, 54, 128]


def test_shape_arithmetic_is_computed() -> None:
    body = (
        "s = Shape(x) i = Constant <value_int: int = 2> () g = Gather(s, i) u = Constant <value_ints: ints = [0]> () "
        "d = Unsqueeze(g, u) k = Concat <axis: int = 0> (first, axis, axis, d) r = Reshape(x, k) y = Squeeze(r, axis)"
    ).replace("(first, axis, axis, d)", "(first, some2, d)")
    signature = SIGNATURE.replace("int64[1] some", "int64[1] some2 = {3}, int64[1] some")
    assert form(check(model_of(signature, body.replace("y = Squeeze(r, axis)", "y = Tanh(r)")))) == ["Tanh"]


def test_nested_functions() -> None:

    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20, "p" : 1]> g (float[B, S, 4] x) => (float[B, S, 4] y) '
            "{ a = p.Outer <k: float = 2.0> (x) y = p.Outer <k: float = 3.0> (a) }"
            '<domain: "p", opset_import: ["" : 20, "p" : 1]> Outer <k: float> (x) => (r) '
            "{ c = Constant <value_float: float = @k> () i = p.Inner(x) r = Mul(i, c) }"
            '<domain: "p", opset_import: ["" : 20]> Inner (x) => (r) { r = Relu(x) }'
        )
    )
    assert form(check(model)) == ["Relu", "Mul", "Relu", "Mul"]
    assert not model.functions
    assert set(model.opset_imports) == {""}


def test_recursive_functions_are_refused() -> None:

    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20, "p" : 1]> g (float[4] x) => (float[4] y) { y = p.F(x) }'
            '<domain: "p", opset_import: ["" : 20, "p" : 1]> F (x) => (r) { r = p.F(x) }'
        )
    )
    with pytest.raises(InputError, match="E-FORMAT"):
        canonicalize(model)


def test_initializers_that_are_inputs_are_weights() -> None:
    """Old exporters list weights among the inputs."""
    model = model_of("(float[B, 4] x, float[4] w) => (float[B, 4] y) <float[4] w = {1, 2, 3, 4}>", "y = Add(x, w)")
    canonicalize(model)
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("number", ["1e30", "-1e30", "inf", "nan"])
def test_what_no_integer_holds_is_left_to_the_runtime(number: str) -> None:
    """numpy makes the least integer of each of these, a runtime the nearest."""
    body = "q = QuantizeLinear(c, step, zero) d = DequantizeLinear(q, step, zero) y = Add(x, d)"
    constants = "float[4] c = {1, 2, 3, 4}, float step = {0.5}, uint8 zero = {7}"
    model = model_of(f"(float[B, S, 4] x) => (float[B, S, 4] y) <{constants}>", body)
    content = np.array([0.5, float(number), 1e3, -1e3], np.float32)
    model.graph.initializers["c"].const_value = ir.tensor(content, name="c")
    check(model)


def test_a_cast_to_the_type_of_a_value_keeps_how_it_rounds() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[3] x, float8e4m3fn[1] like) => (float8e4m3fn[3] y) { y = CastLike <saturate: int = 0> (x, like) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    canonicalize(model)
    (node,) = model.graph
    assert (node.op_type, node.attributes["saturate"].value) == ("Cast", 0)
    assert node.attributes["to"].value == ir.DataType.FLOAT8E4M3FN


def test_a_range_to_a_vector_of_one_number() -> None:
    """ONNX asks for scalars, runtimes take both, and so do exporters."""
    body = """
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64[1] {1}> ()
        size = Shape <start: int = 1, end: int = 2> (x)
        y = Range (zero, size, one)
    """
    model = model_of("(float[B, S, 4] x) => (int64[N] y)", body)
    want = onnxruntime.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
    canonicalize(model)
    x = np.ones((2, 5, 4), np.float32)
    (got,) = ReferenceSession(model).run({"x": x}).values()
    np.testing.assert_array_equal(got, want.run(None, {"x": x})[0])
