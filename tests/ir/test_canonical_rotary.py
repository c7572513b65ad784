"""Rotations by position in every spelling become ``RotaryEmbedding`` with the same outputs; lookalikes stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import check, model_of
from xopt.ir import canonicalize

ANGLES = np.arange(3)[:, None] * np.asarray([1.0, 0.1], np.float32)
LAST = "<axis: int = -1>"


def numbers(array: np.ndarray) -> str:
    return "{" + ", ".join(str(float(np.float32(x))) for x in array.reshape(-1)) + "}"


def build(body: str, cos: np.ndarray, sin: np.ndarray, heads_first: bool = True) -> ir.Model:
    """x [B,2,3,4] (or [B,3,2,4]) turned by ``body`` with constants cos and sin."""
    shape = ", ".join(map(str, cos.shape))
    constants = (
        f"float[{shape}] cos = {numbers(cos)}, float[{shape}] sin = {numbers(sin)}, int64[1] zero = {{0}}, "
        "int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4}, int64[1] last = {-1}, "
        "int64[1] end = {9223372036854775807}, "
        "int64[5] pairs = {0, 0, 0, 2, 2}, int64[4] whole = {0, 0, 0, 4}, float minus = {-1.0}"
    )
    dims = "B, 2, 3, 4" if heads_first else "B, 3, 2, 4"
    return model_of(f"(float[{dims}] x) => (float[{dims}] y) <{constants}>", body)


def tables(repeat: str) -> tuple[np.ndarray, np.ndarray]:
    angles = {
        "none": ANGLES, "halves": np.concatenate([ANGLES, ANGLES], -1), "neighbours": np.repeat(ANGLES, 2, -1),
    }[repeat]  # fmt: skip
    return np.cos(angles), np.sin(angles)


HALVES = {
    "slices": "a = Slice(x, zero, two, three) b = Slice(x, two, end, three)",
    "negative": "a = Slice(x, zero, two, last) b = Slice(x, two, four, last)",
    "split": "a, b = Split <axis: int = -1, num_outputs: int = 2> (x)",
}
NEGATIONS = {"neg": "n = Neg(b)", "mul": "n = Mul(b, minus)"}


@pytest.mark.parametrize("negation", NEGATIONS)
@pytest.mark.parametrize("halves", HALVES)
def test_by_halves_with_repeated_tables(halves: str, negation: str) -> None:
    body = (
        f"{HALVES[halves]} {NEGATIONS[negation]} t = Concat {LAST} (n, a) u = Mul(x, cos) v = Mul(t, sin) y = Add(v, u)"
    )
    model = check(build(body, *tables("halves")), {"RotaryEmbedding": 1})
    node = model.graph[0]
    assert node.attributes["interleaved"].as_int() == 0
    assert [str(value.shape) for value in node.inputs[1:] if value is not None] == ["[1,3,2]"] * 2


@pytest.mark.parametrize("halves", HALVES)
def test_by_halves_with_plain_tables(halves: str) -> None:
    body = (
        f"{HALVES[halves]} p = Mul(a, cos) q = Mul(b, sin) r = Mul(b, cos) s = Mul(sin, a) "
        f"f = Sub(p, q) g = Add(s, r) y = Concat {LAST} (f, g)"
    )
    check(build(body, *tables("none")), {"RotaryEmbedding": 1})


PAIRS = {
    "strided": "a = Slice(x, zero, four, three, two) b = Slice(x, one, four, three, two)",
    "reshaped": "h = Reshape(x, pairs) c = Slice(h, zero, one, last) d = Slice(h, one, two, last) "
    "a = Squeeze(c, last) b = Squeeze(d, last)",
}


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("pairs", PAIRS)
def test_interleaved(pairs: str, heads_first: bool) -> None:
    cos, sin = tables("none")
    if not heads_first:
        cos, sin = cos[:, None], sin[:, None]
    body = (
        f"{PAIRS[pairs]} p = Mul(a, cos) q = Mul(b, sin) r = Mul(b, cos) s = Mul(a, sin) f = Sub(p, q) g = Add(r, s) "
        f"i = Unsqueeze(f, last) j = Unsqueeze(g, last) k = Concat {LAST} (i, j) y = Reshape(k, whole)"
    )
    ops = {"RotaryEmbedding": 1} if heads_first else {"RotaryEmbedding": 1, "Reshape": 2}
    model = check(build(body, cos, sin, heads_first), ops)
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert node.attributes["interleaved"].as_int() == 1


def test_part_of_the_head() -> None:
    cos, sin = (table[:, :1] for table in tables("none"))
    body = (
        "first = Slice(x, zero, two, three) rest = Slice(x, two, end, three) "
        "a = Slice(first, zero, one, three) b = Slice(first, one, end, three) p = Mul(a, cos) "
        "q = Mul(b, sin) r = Mul(b, cos) s = Mul(a, sin) "
        f"f = Sub(p, q) g = Add(r, s) t = Concat {LAST} (f, g) y = Concat {LAST} (t, rest)"
    )
    model = check(build(body, cos, sin), {"RotaryEmbedding": 1})
    assert model.graph[0].attributes["rotary_embedding_dim"].as_int() == 2


def test_halves_of_a_table_must_be_equal() -> None:
    body = f"{HALVES['slices']} n = Neg(b) t = Concat {LAST} (n, a) u = Mul(x, cos) v = Mul(t, sin) y = Add(u, v)"
    cos, sin = tables("neighbours")  # the wrong kind of repetition for a rotation by halves
    report = canonicalize(check(build(body, cos, sin)))
    assert [refused.reason for refused in report.refused if refused.what == "rotary"] == ["cos-repeats"]


@pytest.mark.parametrize(
    "turned",
    [
        f"t = Concat {LAST} (a, n)",  # halves not exchanged
        f"m = Neg(a) t = Concat {LAST} (b, m)",  # the other half negated: a rotation backwards
    ],
)
def test_lookalikes_stay(turned: str) -> None:
    body = f"{HALVES['slices']} n = Neg(b) {turned} u = Mul(x, cos) v = Mul(t, sin) y = Add(u, v)"
    model = check(build(body, *tables("halves")))
    assert not any(node.op_type == "RotaryEmbedding" for node in model.graph)


@pytest.mark.parametrize(
    "rows",
    [
        "c = Gather(cos, places) s = Gather(sin, places)",
        "i = Unsqueeze(places, last) j = Tile(i, wide) c = GatherElements <axis: int = 0> (cos, j) "
        "s = GatherElements <axis: int = 0> (sin, j)",
    ],
)
def test_rows_of_repeated_tables_at_computed_positions(rows: str) -> None:
    """Positions behind a past are computed: numbers that are no axes."""
    positions = (
        "first = Constant <value = int64 {0}> () up = Constant <value = int64 {1}> () "
        "many = Constant <value = int64 {3}> () "
        "wide = Constant <value = int64[2] {1, 4}> () n = Size(x) few = Min(n, many) places = Range(first, few, up) "
    )
    turned = "a = Slice(x, zero, two, three) b = Slice(x, two, end, three) n2 = Neg(b)"
    body = f"{positions} {rows} {turned} t = Concat {LAST} (n2, a) u = Mul(x, c) v = Mul(t, s) y = Add(v, u)"
    model = check(build(body, *tables("halves")))
    assert "RotaryEmbedding" in {node.op_type for node in model.graph}
