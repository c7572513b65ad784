"""Valid ONNX that exporters seldom write means after canonicalization what it meant before, at every size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.ir.canonical import model_of
from xopt.errors import InputError
from xopt.ir import canonicalize, load
from xopt.ir.io import to_bytes
from xopt.runtime.reference import ReferenceSession

RANDOM = np.random.default_rng(0)
CONSTANTS = (
    "int64[1] first = {0}, int64[1] second = {1}, int64[1] three = {3}, int64[1] back = {-3}, int64[1] far = {-100}, "
    "int64[1] whole = {7}, int64[1] end = {9223372036854775807}, int64[1] before = {-4}, int64[1] minus = {-1}"
)
PAIR, FIXED = "float[a] x, float[b] z", "float[7, 5] x, int64[1] i"


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def pairs(*sizes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    return [{"x": floats(a), "z": floats(b)} for a, b in sizes]


def chosen(number: int) -> list[dict[str, np.ndarray]]:
    return [{"x": floats(7, 5), "i": np.array([number])}]


SIZES = pairs((3, 3), (1, 3), (3, 1), (1, 1))
CASES = {
    "broadcast": (PAIR, "q = Add(x, z) s = Shape(q) y = Expand(x, s)", SIZES),
    "broadcast of three": (PAIR, "p = Add(x, z) q = Add(z, p) s = Shape(q) y = Expand(x, s)", SIZES),
    "expand to another": (PAIR, "s = Shape(z) y = Expand(x, s)", SIZES),
    "expand twice": (PAIR, "s = Shape(z) e = Expand(x, s) t = Shape(e) y = Expand(z, t)", SIZES),
    "the last three": (
        "float[a] x",
        "q = Slice(x, back, end) s = Shape(q) y = Expand(q, three)",
        [{"x": floats(size)} for size in (1, 3, 7)],
    ),
    "from before the first": ("float[7] x", "q = Slice(x, far, three) y = Shape(q)", [{"x": floats(7)}]),
    "an empty slice": ("float[7] x", "q = Slice(x, three, first) y = Shape(q)", [{"x": floats(7)}]),
    "a shape backwards": (
        "float[2, 3, a] x",
        "s = Shape(x) y = Slice(s, far, before, first, minus)",
        [{"x": floats(2, 3, 4)}],
    ),
    "steps of the data": (FIXED, "q = Slice(x, first, whole, first, i) y = Shape(q)", chosen(2)),
    "axes of the data": (FIXED, "q = Slice(x, second, three, i) y = Shape(q)", chosen(1)),
    "reduced axes of the data": (FIXED, "q = ReduceSum(x, i) s = Shape(q) y = Expand(q, s)", chosen(0)),
    "squeezed axes of the data": ("float[1, 1, 5] x, int64[1] i", "q = Squeeze(x, i) y = Shape(q)",
                                  [{"x": floats(1, 1, 5), "i": np.array([0])}]),
    "nothing is reduced": ("float[7, 5] x", "q = ReduceSum <noop_with_empty_axes: int = 1> (x) y = Shape(q)",
                           [{"x": floats(7, 5)}]),
    "no size is multiplied": (
        "float[a, 5] x",
        "s = Shape(x) p = ReduceProd <noop_with_empty_axes: int = 1> (s) q = Identity(p) y = Reshape(x, q)",
        [{"x": floats(7, 5)}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_means_what_it_meant(name: str) -> None:
    inputs, body, feeds = CASES[name]
    kind = "int64" if "y = Shape" in body or "y = Slice(s" in body else "float"
    model = model_of(f"({inputs}) => ({kind} y) <{CONSTANTS}>", body)
    want = [run(model, given) for given in feeds]
    canonicalize(model)
    once = to_bytes(model)
    canonicalize(model)
    assert to_bytes(model) == once
    for given, expected in zip(feeds, want):
        np.testing.assert_array_equal(run(model, given), expected)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    return ReferenceSession(ir.from_proto(onnx.load_model_from_string(to_bytes(model)))).run(dict(feeds))["y"]


def test_text_is_refused_in_a_word(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (string[2] y, float[2] z) { z = Relu(x) }'
    )
    words = onnx.numpy_helper.from_array(np.array(["a", "b"], object))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["y"], value=words))
    onnx.save_model(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="tensor of texts, value 'y'") as caught:
        load(tmp_path / "model.onnx")
    assert caught.value.code == "E-UNSUPPORTED-OP"
