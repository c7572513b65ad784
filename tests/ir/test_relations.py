"""Sizes of open axes that a graph demands: fixed, made equal, or drawn so that they fit."""

from __future__ import annotations

import pytest

from tests.ir.canonical import model_of
from xopt.data.dataset import Dataset
from xopt.ir import canonicalize, sized
from xopt.ir.canonical.relations import fitting_sizes
from xopt.runtime.reference import ReferenceSession

PAST = (
    "(float[batch, seq, 8] x, float[pasts, 2, past, 4] p, float[batch, total] mask) => (float[] y) "
    "<int64[4] apart = {0, 0, 2, 4}, int64[2] middle = {1, 2}>"
)
JOINED = (
    "h = Reshape(x, apart) q = Transpose <perm: ints = [0, 2, 1, 3]> (h) k = Concat <axis: int = 2> (p, q) "
    "t = Transpose <perm: ints = [0, 1, 3, 2]> (k) s = MatMul(q, t) m = Unsqueeze(mask, middle) "
)
ADDED = "b = Add(s, m) w = Softmax <axis: int = -1> (b) y = MatMul(w, k)"
EXPANDED = "size = Shape(s) e = Expand(m, size) b = Mul(s, e) y = Softmax <axis: int = -1> (b)"
CUT = (
    "zero = Constant <value = int64[1] {0}> () last = Constant <value = int64[1] {3}> () "
    "rows = Shape <start: int = 2, end: int = 3> (k) table = Constant <value_floats: floats = [1.0]> () "
    "wide = Constant <value = int64[4] {1, 1, 1, 64}> () long = Expand(table, wide) c = Slice(long, zero, rows, last) "
    "a = Add(m, c) b = Add(s, a) y = Softmax <axis: int = -1> (b)"
)
INDEXED = (
    "one = Constant <value = int64 {1}> () null = Constant <value = int64 {0}> () "
    "rows = Shape <start: int = 2, end: int = 3> (k) many = Squeeze(rows) r = Range(null, many, one) "
    "g = Gather <axis: int = 1> (mask, r) n = Unsqueeze(g, middle) b = Add(s, n) y = Softmax <axis: int = -1> (b)"
)


@pytest.mark.parametrize("body", [ADDED, EXPANDED, CUT, INDEXED])
def test_a_mask_is_as_long_as_past_and_tokens(body: str) -> None:
    model = model_of(PAST, JOINED + body)
    told = sized(model)
    assert fitting_sizes(told.graph, {"batch": 2}, 6) == {"batch": 2, "seq": 6, "past": 6, "total": 12}
    assert fitting_sizes(told.graph, {"total": 9, "past": 2}, 6)["seq"] == 7
    ReferenceSession(model).run(Dataset.random(told, 2, 0, {"seq": 3}).inputs)
    canonicalize(model)
    assert fitting_sizes(model.graph, {}, 5)["total"] == 10


def test_axes_that_must_be_equal_are_one() -> None:
    model = model_of(PAST, JOINED + ADDED)
    canonicalize(model)
    assert [str(dim) for dim in model.graph.inputs[1].shape or ()] == ["batch", "2", "past", "4"]
    assert "Attention" in {node.op_type for node in model.graph}


@pytest.mark.parametrize(
    ("signature", "body", "wanted"),
    [
        ("(float[n, 6] x) => (float[] y) <int64[2] to = {4, 6}>", "y = Reshape(x, to)", {"n": 4, "m": 6}),
        ("(float[n, m] x, float[3, 4] z) => (float[] y)", "y = Concat <axis: int = 0> (x, z)", {"m": 4}),
        ("(float[n, m] x, float[5, 4] z) => (float[] y)", "y = MatMul(x, z)", {"m": 5}),
        ("(float[n, m] x, float[4, 5] z) => (float[] y)", "y = Gemm <transB: int = 1> (x, z)", {"m": 5}),
        ("(float[n, m] x) => (float[] y, float[] z) <int64[2] to = {4, 3}>", "y, z = Split <axis: int = 1> (x, to)",
         {"m": 7}),
        ("(float[n, m] x, float[1, 4] z) => (float[] y)", "y = Add(x, z)", {}),
    ],
)  # fmt: skip
def test_an_axis_that_only_one_size_fits(signature: str, body: str, wanted: dict[str, int]) -> None:
    model = model_of(signature, body)
    canonicalize(model)
    shape = model.graph.inputs[0].shape or ()
    assert {name: dim for name, dim in zip("nm", shape) if isinstance(dim, int)} == wanted
