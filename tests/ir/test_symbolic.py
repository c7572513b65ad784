"""Symbolic dimensions and shape arithmetic agree with what onnxruntime computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.ir.canonical import model_of
from xopt.ir.canonical import dimensions
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.io import to_bytes
from xopt.ir.shapes import clear_inferred
from xopt.ir.symbolic import Symbols, name_dims

CONSTANTS = (
    "int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] minus = {-1}, int64[1] first = {0}, "
    "int64[1] second = {1}, "
    "int64[1] third = {2}, int64[1] end = {9223372036854775807}, int64[1] four = {4}, int64[1] eight = {8}, "
    "int64[3] over = {-1, 0, 8}, float[4] twice = {1, 2, 1, 0.5}, int64[4] grid = {1, -1, 4, 2}"
)
HEADS = (
    "s = Shape(x) b = Gather(s, zero) n = Gather(s, one) b1 = Unsqueeze(b, first) n1 = Unsqueeze(n, first) "
    "t = Concat <axis: int = 0> (b1, n1, four, minus) r = Reshape(x, t) y = Transpose <perm: ints = [0, 2, 1, 3]> (r)"
)


def build(body: str, output: str = "float[a, b, c, d] y") -> ir.Model:
    model = model_of(f"(float[B, S, 32] x) => ({output}) <{CONSTANTS}>", body)
    clear_inferred(model)
    return model


@pytest.mark.parametrize(
    ("body", "want"),
    [
        (HEADS, "B 4 S 8"),
        ("h, i, j, k = Split <axis: int = 2, num_outputs: int = 4> (x) y = Unsqueeze(h, third)", "B S 1 8"),
        ("p = Slice(x, first, eight, second) y = Unsqueeze(p, third)", "B min(8,S) 1 32"),
        ("p = Slice(x, second, end, second) y = Unsqueeze(p, third)", "B -1+S 1 32"),
        ("p = Concat <axis: int = 1> (x, x) y = Unsqueeze(p, first)", "1 B 2*S 32"),
        ("m = Transpose <perm: ints = [0, 2, 1]> (x) p = MatMul(x, m) y = Unsqueeze(p, second)", "B 1 S S"),
        ("y = Squeeze(x)", None),
        ("g = Slice(x, first, second, first) h = Slice(g, first, second, second) y = Squeeze(h)", "32"),
        ("p = Reshape(x, over) m = ReduceMean(p, third) y = Add(x, m)", "4*B S 32"),
        ("p = Reshape(x, over) m = ReduceMean(p, third) y = Add(m, x)", "4*B S 32"),
        ("p = ReduceMean <keepdims: int = 1> (x, second) y = Unsqueeze(p, second)", "B 1 1 32"),
        ('p = Unsqueeze(x, second) y = Resize <mode: string = "nearest"> (p, , twice)', "B 2 S 16"),
        (
            "s = Shape <end: int = 3> (x) t = Concat <axis: int = 0> (s, four) p = Unsqueeze(x, third) "
            'y = Resize <mode: string = "nearest"> (p, , , t)',
            "B S 32 4",
        ),
        ("p = Unsqueeze(x, first) q = Reshape(x, grid) y = GridSample(p, q)", "1 B 4*B*S 4"),
        ("s = Shape(x) z = ReduceProd <keepdims: int = 1> (s) p = Reshape(x, z) y = Unsqueeze(p, first)", "1 32*B*S"),
    ],
)
def test_dimensions(body: str, want: str | None) -> None:
    model = build(body)
    found = Symbols(model.graph).dims(model.graph[-1].outputs[0])
    assert found is None if want is None else [str(dim) for dim in found or ()] == want.split()


def test_numbers_of_a_target() -> None:
    model = build(HEADS)
    target = next(value for node in model.graph for value in node.outputs if value.name == "t")
    assert [str(number) for number in Symbols(model.graph).numbers(target) or ()] == ["B", "S", "4", "-1"]


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("c = Cast <to: int = 9> (s) t = Cast <to: int = 7> (c)", ["1", "1", "1"]),
        ("z = Sub(s, one) c = Cast <to: int = 9> (z) t = Cast <to: int = 7> (c)", None),
        ("c = Cast <to: int = 3> (s) t = Cast <to: int = 7> (c)", None),
        ("c = Cast <to: int = 6> (s) t = Cast <to: int = 7> (c)", ["B", "S", "32"]),
        ("c = Cast <to: int = 1> (s) d = Cast <to: int = 1> (two) e = Div(c, d) t = Mul(e, d)", None),
        ("c = Cast <to: int = 1> (s) d = Cast <to: int = 1> (two) e = Div(c, d) t = Floor(e)", "halves"),
        ("t = Div(s, two)", "halves"),
        ("m = Slice(s, first, end, first, b1) t = Identity(m)", None),
    ],
)
def test_numbers_of_casts_and_quotients(body: str, want: list[str] | str | None) -> None:
    """A size is what it was only in a type that holds it, and half of it only where that is rounded as it was."""
    prelude = "s = Shape(x) b = Gather(s, zero) b1 = Unsqueeze(b, first) "
    model = build(f"{prelude}{body} y = Reshape(x, t)")
    target = next(value for node in model.graph for value in node.outputs if value.name == "t")
    halves = ["floor((B)/(2))", "floor((S)/(2))", "16"]
    found = Symbols(model.graph).numbers(target)
    assert (None if found is None else [str(number) for number in found]) == (halves if want == "halves" else want)


@pytest.mark.parametrize(
    ("long", "want"),
    [
        ("first, first, first, l, first, first", "B 4+-1*!mod(S,4)+S 32"),
        ("first, first, l, first, first, first", "B 4+-1*!mod(S,4)+S 32"),
        ("second, l, first, first, first, first", "B S 37+-1*!mod(S,4)"),
    ],
)
def test_pads_whose_order_the_graph_turns(long: str, want: str) -> None:
    """As TorchScript writes them: pairs from the last axis to the first, in a matrix that is turned."""
    body = (
        "s = Shape(x) n = Gather(s, second) m = Mod(n, four) l = Sub(four, m) "
        f"long = Concat <axis: int = 0> ({long}) pairs = Reshape(long, pair) "
        "up = Slice(pairs, minus, least, first, minus) turned = Transpose <perm: ints = [1, 0]> (up) "
        "pads = Reshape(turned, minus) y = Pad(x, pads)"
    )
    constants = CONSTANTS + ", int64[2] pair = {-1, 2}, int64[1] least = {-9223372036854775807}"
    model = model_of(f"(float[B, S, 32] x) => (float[a, b, c] y) <{constants}>", body)
    clear_inferred(model)
    found = Symbols(model.graph).dims(model.graph.outputs[0])
    assert [str(dim) for dim in found or ()] == want.split()


def test_a_rest_may_be_nothing() -> None:
    """Whether there is one is not known."""
    model = build("s = Shape(x) m = Mod(s, four) e = Equal(m, first) t = Cast <to: int = 7> (e) y = Reshape(x, t)")
    target = next(value for node in model.graph for value in node.outputs if value.name == "t")
    assert Symbols(model.graph).numbers(target) is None


def test_names_reach_shapes() -> None:
    model = build(HEADS)
    name_dims(model.graph)
    assert str(model.graph.outputs[0].shape) == "[B,4,S,8]"


def test_a_malformed_node_teaches_nothing() -> None:
    model = build(HEADS)
    node = next(node for node in model.graph if node.op_type == "Transpose")
    node.attributes["perm"] = ir.AttrInt64s("perm", [0, 7])
    assert Symbols(model.graph).dims(node.outputs[0]) is None


def test_shape_arithmetic_leaves_the_graph() -> None:
    model = build(HEADS)
    x = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
    want = onnxruntime.InferenceSession(to_bytes(model)).run(None, {"x": x})[0]
    dimensions.rewrite(model, CanonicalizeReport())
    assert [node.op_type for node in model.graph] == ["Reshape", "Transpose"]
    np.testing.assert_array_equal(onnxruntime.InferenceSession(to_bytes(model)).run(None, {"x": x})[0], want)


def test_a_dimension_is_read_off_an_input() -> None:
    body = (
        "m = Add(x, x) s = Shape(m) n = Gather(s, one) r = Range(zero, n, one) f = Cast <to: int = 1> (r) "
        "u = Unsqueeze(f, first) w = Unsqueeze(u, first) y = Unsqueeze(w, first)"
    )
    model = build(body)
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.INT64)
    dimensions.rewrite(model, CanonicalizeReport())
    shapes = [node for node in model.graph if node.op_type == "Shape"]
    assert len(shapes) == 1 and shapes[0].inputs[0] is model.graph.inputs[0]
    assert not any(node.op_type == "Add" for node in model.graph)


def test_parts_of_a_vector_are_numbers() -> None:
    """As onnxruntime writes a shape that it takes apart once for all its readers."""
    model = model_of(
        "(float[B, S, 4] x) => (float[a, b, c] y)",
        "s = Shape(x) k = Constant <value_ints: ints = [1, 2]> () p, q = Split (s, k) t = Concat <axis: int = 0> (q, p)"
        " y = Reshape(x, t)",
    )
    symbols = Symbols(model.graph)
    assert [str(dim) for dim in symbols.dims(model.graph.outputs[0]) or ()] == ["S", "4", "B"]
