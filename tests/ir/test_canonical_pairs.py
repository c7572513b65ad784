"""Quantizers that round again what is rounded already, and attention between quantizers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import check, feeds_of, model_of
from tests.ir.test_canonical_attention import INPUTS, OUTPUT, WEIGHTS, attention
from xopt.ir import canonicalize
from xopt.ir.structure import explain
from xopt.runtime.reference import ReferenceSession
from xopt.targets.integer_attention import parts

GRID = ", float sc = {0.05}, uint8 zp = {120}"


def pair(source: str, name: str, grid: str = "sc, zp") -> str:
    return f"{name}_q = QuantizeLinear({source}, {grid}) {name} = DequantizeLinear({name}_q, {grid}) "


def model(body: str, inputs: str = "float[B, S, 8] x", constants: str = GRID) -> ir.Model:
    return model_of(f"({inputs}) => (float[B, L, M, N] y) <{WEIGHTS}{constants}>", body)


TURNED = "c = Transpose <perm: ints = [0, 2, 1, 3]> (b) "
MOVED = pair("x", "a") + "b0 = Reshape(a, split) " + pair("b0", "b") + TURNED + pair("c", "y")


def test_what_is_moved_is_rounded_once() -> None:
    """To the bit: by the last pair."""
    given = model(MOVED)
    want = ReferenceSession(given).run(feeds_of(given))["y"]
    canonicalize(given)
    found = Counter(node.op_type for node in given.graph)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)
    assert given.graph.outputs[0].producer().op_type == "DequantizeLinear"
    np.testing.assert_array_equal(ReferenceSession(given).run(feeds_of(given))["y"], want)


@pytest.mark.parametrize(
    ("grids", "extra", "constants"),
    [
        (("sc, zp", "sc, other"), "", ", uint8 other = {121}"),
        (("sc, zp", "more, zp"), "", ", float more = {0.06}"),
        (("sc, zp", "sc, sign"), "", ", int8 sign = {120}"),
        (("huge, zp", "huge, zp"), "", ", float huge = {1e38}"),
        (("sc, zp", "sc, zp"), "n = Neg(a) ", ""),
    ],
    ids=["zero", "scale", "type", "overflow", "reader"],
)
def test_another_grid_or_reader_needs_each_pair(grids: tuple[str, str], extra: str, constants: str) -> None:
    first, second = grids
    body = pair("x", "a", first) + extra + "b = Reshape(a, split) " + TURNED + pair("c", "d", second)
    body += "y = Add(d, n2) " if extra else "y = Identity(d)"
    body = body.replace("y = Add", "nr = Reshape(n, split) n2 = Transpose <perm: ints = [0, 2, 1, 3]> (nr) y = Add")
    given = model(body, constants=GRID + constants)
    canonicalize(given)
    assert sum(node.op_type == "QuantizeLinear" for node in given.graph) == 2


HEADS = (
    pair("q", "qd") + "qr = Reshape(qd, split) qt = Transpose <perm: ints = [0, 2, 1, 3]> (qr) "
    "kr = Reshape(k, split) kt0 = Transpose <perm: ints = [0, 2, 3, 1]> (kr) " + pair("kt0", "kt")
    + "vr = Reshape(v, split) vt0 = Transpose <perm: ints = [0, 2, 1, 3]> (vr) " + pair("vt0", "vt", "fine, zp")
)  # fmt: skip
FINE = GRID + ", float scs = {0.01}, float fine = {0.02}, float tiny = {0.004}, uint8 none = {0}"


def attending(scores: str = "", weights: str = "") -> ir.Model:
    body = HEADS + "p = MatMul(qt, kt) s = Mul(p, scale) " + (scores or "t = Identity(s) ")
    body += "w0 = Softmax <axis: int = -1> (t) " + (weights or "w = Identity(w0) ")
    body += "o0 = MatMul(w, vt) " + pair("o0", "o") + OUTPUT
    return model_of(f"({INPUTS}) => (float[B, L, 8] y) <{WEIGHTS}{FINE}>", body)


@pytest.mark.parametrize("middle", [120, 128])
def test_attention_of_quantized_operands(middle: int) -> None:
    """Queries, keys, values and the result are rounded: the pairs stand where heads lie side by side."""
    given = attending()
    given.graph.initializers["zp"].const_value = ir.tensor(np.array(middle, np.uint8), name="zp")
    check(given, {"Attention": 1, "QuantizeLinear": 4, "DequantizeLinear": 4})
    assert parts(attention(given)) is None  # attention on integers would round its weights
    for operand in attention(given).inputs[:3]:
        assert operand is not None
        assert operand.producer().op_type == "DequantizeLinear"
        assert len(operand.shape) == 3


@pytest.mark.parametrize(
    ("scores", "weights", "reason"),
    [
        (pair("s", "t", "scs, zp"), "", "scores-quantized"),
        ("", pair("w0", "w", "tiny, none"), "weights-quantized"),
        (pair("s", "u", "scs, zp") + "t = Add(u, mask) ", "", "scores-quantized"),
    ],
)
def test_attention_whose_inside_is_rounded_is_named(scores: str, weights: str, reason: str) -> None:
    """``Attention`` has no rounding inside."""
    given = attending(scores.replace("mask", "fine"), weights)
    want = ReferenceSession(given).run(feeds_of(given))["y"]
    report = canonicalize(given)
    assert [refused.reason for refused in report.refused if refused.what == "attention"] == [reason]
    np.testing.assert_allclose(ReferenceSession(given).run(feeds_of(given))["y"], want, atol=1e-6)


def test_rounded_logits_are_no_attention() -> None:
    body = pair("x", "a") + "m = MatMul(a, w) " + pair("m", "b") + "y = Softmax <axis: int = -1> (b)"
    given = model_of(
        f"(float[B, S, 8] x) => (float[B, S, 4] y) <float[8, 4] w = {{{', '.join(['0.5'] * 32)}}}{GRID}>", body
    )
    report = canonicalize(given)
    assert not [refused for refused in report.refused if refused.what == "attention"]
    assert not explain(given)
