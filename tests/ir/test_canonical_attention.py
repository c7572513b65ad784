"""Attention written by hand: what becomes an ``Attention`` of which kind, what stays, and that outputs stay equal."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import check, model_of
from xopt.ir import canonicalize
from xopt.ir.canonical.elements import Reader
from xopt.ir.poly import Poly
from xopt.ir.symbolic import Symbols
from xopt.runtime.reference import ReferenceSession

WEIGHTS = "int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float scale = {0.5}"
HEADS = (
    "qr = Reshape(q, split) qt = Transpose <perm: ints = [0, 2, 1, 3]> (qr) "
    "kr = Reshape(k, split) kt = Transpose <perm: ints = [0, 2, 3, 1]> (kr) "
    "vr = Reshape(v, split) vt = Transpose <perm: ints = [0, 2, 1, 3]> (vr) "
)
SCORES = "p = MatMul(qt, kt) s = Mul(p, scale) "
VALUES = "w = Softmax <axis: int = -1> ({}) o = MatMul(w, vt) "
OUTPUT = "ot = Transpose <perm: ints = [0, 2, 1, 3]> (o) y = Reshape(ot, join)"
INPUTS = "float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v"


def build(middle: str, last: str = "s", constants: str = "", output: str = OUTPUT, inputs: str = INPUTS) -> ir.Model:
    body = HEADS + SCORES + middle + " " + VALUES.format(last) + output
    return model_of(f"({inputs}) => (float[B, L, 8] y) <{WEIGHTS}{constants}>", body)


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Attention")


def mask_shape(model: ir.Model) -> str:
    node = attention(model)
    return str(node.inputs[3].shape) if len(node.inputs) > 3 and node.inputs[3] is not None else ""


def test_plain() -> None:
    node = attention(check(build(""), {"Attention": 1}))
    assert {name: attr.value for name, attr in node.attributes.items()} == {
        "q_num_heads": 2, "kv_num_heads": 2, "scale": 0.5, "is_causal": 0, "softcap": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("perm", ["0, 1, 3, 2", "1, 0, 2, 3"])
def test_turned_scores_are_no_attention_of_these_operands(perm: str) -> None:
    """Keys would ask queries, or one sample another: where the sizes are equal, only the labels of axes tell."""
    inputs = "float[2, 3, 8] q, float[2, 3, 8] k, float[2, 3, 8] v"
    check(build(f"u = Transpose <perm: ints = [{perm}]> (s)", "u", inputs=inputs))


@pytest.mark.parametrize("number", ["0", "-0.7", "1e30", "1e-30", "inf"])
@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_scales_of_any_size(op: str, number: str) -> None:
    """A scale of 0 would be taken for a missing one, and what is divided by 0 has none."""
    model = build(f"m = {op}(s, factor)", "m", constants=", float factor = {1}")
    tensor = np.array(number, np.float32)
    model.graph.initializers["factor"].const_value = ir.tensor(tensor, name="factor")
    if not (op == "Div" and number in ("0", "1e-30")) and number not in ("1e30", "inf"):  # these give NaN
        check(model)
    else:
        canonicalize(model)


RANGE = "sh = Shape <start: int = 1, end: int = 2> (q) n = Squeeze(sh) r = Range(zero, n, one) "
ROW_COLUMN = RANGE + "row = Unsqueeze(r, last) column = Unsqueeze(r, first) "
NUMBERS = ", int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] last = {1}, float low = {-10000000.0}"
CAUSAL = {
    "greater-or-equal": "c = GreaterOrEqual(row, column) m = Where(c, s, low)",
    "less": "c = Less(row, column) m = Where(c, low, s)",
    "not-greater": "g = Greater(column, row) c = Not(g) m = Where(c, s, low)",
    "shifted": "d = Add(row, one) c = Less(column, d) m = Where(c, s, low)",
    "twice": "c = LessOrEqual(column, row) e = And(c, c) m = Where(e, s, low)",
    "product": "c = Greater(column, row) f = Cast <to: int = 1> (c) a = Mul(f, low) m = Add(s, a)",
}


@pytest.mark.parametrize("form", CAUSAL)
def test_causal_in_every_spelling(form: str) -> None:
    model = check(build(ROW_COLUMN + CAUSAL[form], "m", NUMBERS))
    assert attention(model).attributes["is_causal"].as_int() == 1
    assert mask_shape(model) == ""
    assert not any(node.op_type == "Range" for node in model.graph)


@pytest.mark.parametrize(
    "condition",
    [
        "c = Greater(row, column)",  # without the diagonal
        "d = Add(row, one) c = LessOrEqual(column, d)",  # one to the right
        "c = LessOrEqual(row, column)",  # the other triangle
        "d = Sub(row, column) t = Add(one, one) e = Less(d, t) f = LessOrEqual(column, row) c = And(e, f)",  # a window
    ],
)
def test_almost_causal_is_a_mask(condition: str) -> None:
    model = build(ROW_COLUMN + condition + " m = Where(c, s, low)", "m", NUMBERS.replace("-10000000.0", "-20000.0"))
    canonicalize(model)
    assert attention(model).attributes["is_causal"].as_int() == 0
    assert mask_shape(model) == "[1,1,S,S]"


def test_window_is_equal() -> None:
    window = "d = Sub(row, column) t = Add(one, one) e = Less(d, t) f = LessOrEqual(column, row) c = And(e, f)"
    check(build(ROW_COLUMN + window + " m = Where(c, s, low)", "m", NUMBERS))


MASKED = INPUTS + ", int64[B, S] attended"
PADDING = "p4 = Unsqueeze(attended, axes) on = Cast <to: int = 9> (p4) "
FILLS = {
    "added": ("add = Where({}, nothing, low) m = Add(s, add)", "[B,1,{},S]"),
    "put in place": ("m = Where({}, s, low)", "[B,1,{},S]"),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("low", [-3.4028234663852886e38, -10000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_keys_are_what_the_fill_makes_them(causal: bool, low: float, fill: str) -> None:
    """A finite fill: the mean over all keys, later ones and padding too. Padding on the left, and a sample of it."""
    middle, shape = FILLS[fill]
    condition = ROW_COLUMN + "c = GreaterOrEqual(row, column) both = And(c, on) " if causal else ""
    constants = NUMBERS.replace("-10000000.0", str(low)) + ", int64[2] axes = {1, 2}, float nothing = {0.0}"
    body = PADDING + condition + middle.format("both" if causal else "on")
    model = build(body, "m", constants, inputs=MASKED)
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((3, 5, 8)).astype(np.float32) for name in "qkv"}
    feeds["attended"] = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    before = ReferenceSession(model).run(feeds)["y"]
    canonicalize(model)
    assert mask_shape(model) == shape.format("S" if causal else 1)
    # Scores of size 1 that -10000 was added to are rounded to 1e-3.
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["y"], before, atol=2e-6 if low < -1e5 else 1e-3)


GUARDED = "w0 = Softmax <axis: int = -1> (m) bad = IsNaN(w0) w = Where(bad, nothing, w0) o = MatMul(w, vt) " + OUTPUT
MORE = "more = Greater(attended, whole) on = Unsqueeze(more, axes) "
LATER = ROW_COLUMN + "far = Add(row, shift) c = GreaterOrEqual(far, column) both = And(c, on) "
GUARDS = {
    "a comparison of numbers, added": (
        MORE.replace(" on ", " on2 ") + "add = Where(on2, nothing, low) m = Add(s, add)",
        "-inf",
        True,
    ),
    "keys behind a past": (LATER + "add = Where(both, nothing, low) m = Add(s, add)", "-inf", True),
    "keys behind a past, dropped": (LATER + "not = Not(both) m = Where(not, low, s)", "-inf", True),
    "boolean": ("m = Where(on, s, low)", "-inf", True),
    "boolean, added": ("add = Where(on, nothing, low) m = Add(s, add)", "-inf", True),
    "hidden by plus infinity": ("add = Where(on, nothing, low) m = Add(s, add)", "inf", False),
    "a fill that is no number": ("add = Where(on, nothing, low) m = Add(s, add)", "nan", False),
    "a finite fill": ("add = Where(on, nothing, low) m = Add(s, add)", "-30000.0", True),
    "a bias beside": ("t = Add(s, bias) m = Where(on, t, low)", "-inf", False),
    "an unknown mask": ("m = Add(s, bias)", "-inf", False),
}


@pytest.mark.parametrize("form", GUARDS)
def test_rows_of_nan_become_zeros_where_the_model_says_so(form: str) -> None:
    """A sample without any key, and one whose bias hides a row: what a guard makes zero is zero afterwards."""
    middle, low, fused = GUARDS[form]
    inputs = MASKED + ", float[B, 1, S, S] bias, float low"
    constants = NUMBERS.replace("float low = {-10000000.0}", "float nothing = {0.0}") + ", int64[2] axes = {1, 2}"
    constants += ", int64 whole = {0}, int64 shift = {1}"
    model = model_of(
        f"({inputs}) => (float[B, L, 8] y) <{WEIGHTS}{constants}>",
        HEADS + SCORES + PADDING + middle + " " + GUARDED,
    )
    fill = model.graph.inputs.pop()
    fill.const_value = ir.tensor(np.array(float(low), np.float32), name="low")
    model.graph.register_initializer(fill)
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((3, 5, 8)).astype(np.float32) for name in "qkv"}
    feeds["attended"] = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    feeds["bias"] = random.standard_normal((3, 1, 5, 5)).astype(np.float32)
    feeds["bias"][1, 0, 2] = -np.inf
    before = ReferenceSession(model).run(feeds)["y"]
    assert np.isfinite(before).all()
    report = canonicalize(model)
    assert bool(report.attention) == fused
    assert fused or [refused.reason for refused in report.refused] == ["nan-guard"]
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["y"], before, atol=2e-6)


def test_a_guard_stays_where_keys_are_infinite() -> None:
    """The scores are infinities of both signs, whatever the masks."""
    constants = ", float huge = {1}, float nothing = {0}"
    scores = "far = Sub(kt, huge) " + SCORES.replace("kt", "far")
    model = model_of(
        f"({INPUTS}) => (float[B, L, 8] y) <{WEIGHTS}{constants}>", HEADS + scores + GUARDED.replace("(m)", "(s)")
    )
    model.graph.initializers["huge"].const_value = ir.tensor(np.array(np.inf, np.float32), name="huge")
    check(model)


def test_bias_keeps_its_heads() -> None:
    constants = ", float[2, 3, 3] table = {" + ", ".join(str(0.1 * i) for i in range(18)) + "}"
    model = check(build("m = Add(s, table)", "m", constants, inputs=INPUTS.replace("S", "3")))
    assert mask_shape(model) == "[1,2,3,3]"


def test_soft_cap() -> None:
    body = "a = Div(s, cap) t = Tanh(a) m = Mul(t, cap)"
    node = attention(check(build(body, "m", ", float cap = {3.0}"), {"Attention": 1}))
    assert node.attributes["softcap"].as_float() == 3.0
    assert node.attributes["scale"].as_float() == 0.5


@pytest.mark.parametrize(
    ("middle", "last", "constants", "reason"),
    [
        ("t = Tanh(s) m = Mul(t, cap) a = Mul(m, scale)", "a", ", float cap = {3.0}", "scaled-softcap"),
        ("b = Add(s, s) t = Tanh(b) m = Mul(t, cap)", "m", ", float cap = {3.0}", "mask-inside-softcap"),
        ("m = Sigmoid(s)", "m", "", "scores-sigmoid"),
    ],
)
def test_refused_with_a_reason(middle: str, last: str, constants: str, reason: str) -> None:
    model = build(middle, last, constants)
    report = canonicalize(model)
    assert [refused.reason for refused in report.refused if refused.what == "attention"] == [reason]
    assert not report.attention


@pytest.mark.parametrize(("entries", "causal"), [(4, True), (1, False)])
def test_a_table_that_is_cut_to_the_length_is_as_long(entries: int, causal: bool) -> None:
    """``min(4, S)`` columns beside S are S of them; a table of one row and column is broadcast."""
    table = np.tril(np.ones((entries, entries), bool))
    body = (
        "sh = Shape <start: int = 1, end: int = 2> (q) rows = Slice(table, from, sh, first) "
        "c = Slice(rows, from, sh, last) m = Where(c, s, low)"
    )
    zeros = ", ".join("0" * table.size)
    constants = f"{NUMBERS}, int64[1] from = {{0}}, bool[{entries}, {entries}] table = {{{zeros}}}"
    model = build(body, "m", constants)
    model.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    assert attention(check(model)).attributes["is_causal"].as_int() == causal


@pytest.mark.parametrize("rows", ["Div(b, two)", "Sub(b, one)", "Identity(b)"])
def test_rows_of_a_mask_that_may_be_one_when_the_model_runs(rows: str) -> None:
    """Which row a sample takes is known only where there are as many rows as samples."""
    body = (
        f"sb = Shape <start: int = 0, end: int = 1> (q) b = Squeeze(sb) n = {rows} half = Range(zero, n, one) "
        "g = Gather(given, half) t = Unsqueeze(g, middle) c = Cast <to: int = 9> (t) m = Where(c, s, low)"
    )
    constants = NUMBERS + ", int64 two = {2}, int64[2] middle = {1, 2}"
    model = build(body, "m", constants, inputs=INPUTS + ", float[B, S] given")
    symbols, t = Symbols(model.graph), next(v for node in model.graph for v in node.outputs if v.name == "t")
    ranges = dict(zip("bhqk", map(Poly.of, ("B", 2, "S", "S"))))
    element = Reader(symbols, ranges).broadcast(t, tuple(map(Poly.of, "bhqk")))
    assert (element is not None) == (rows == "Identity(b)")
    check(model)


def test_keys_of_another_batch_are_no_attention() -> None:
    """They broadcast where one of the batches is 1 when the model runs; ``Attention`` has one batch."""
    inputs = "float[B, 2, S, 4] qt, float[C, 2, S, 4] k4, float[C, 2, S, 4] vt"
    body = "kt = Transpose <perm: ints = [0, 1, 3, 2]> (k4) " + SCORES + VALUES.format("s") + "y = Identity(o)"
    model = model_of(f"({inputs}) => (float[D, 2, S, 4] y) <float scale = {{0.5}}>", body)
    report = canonicalize(model)
    assert [refused.reason for refused in report.refused if refused.what == "attention"] == ["batch-sizes"]
    assert not report.attention


def test_weights_that_are_read_stay_beside_the_attention() -> None:
    model = build("", output="e = ReduceMax <keepdims: int = 1> (w) f = Add(o, e) " + OUTPUT.replace("(o)", "(f)"))
    report = canonicalize(check(model))
    assert len(report.attention) == 1
    assert sum(node.op_type == "Softmax" for node in model.graph) == 1
    assert not [refused for refused in report.refused if refused.what == "attention"]


def test_weights_of_two_products_stay() -> None:
    """Values of another kind are weighed with the same weights: to compute these twice would be no gain."""
    model = build("", output="e = MatMul(w, o) f = Add(o, e) " + OUTPUT.replace("(o)", "(f)"))
    report = canonicalize(check(model))
    assert not report.attention
    assert [refused.reason for refused in report.refused if refused.what == "attention"] == ["weights-read-elsewhere"]


def test_four_dimensional_by_nature() -> None:
    """Operands that are inputs of the graph, [B,H,S,d]: nothing to peel off."""
    inputs = "float[B, 2, S, 4] qt, float[B, 2, S, 4] k4, float[B, 2, S, 4] vt"
    body = "kt = Transpose <perm: ints = [0, 1, 3, 2]> (k4) " + SCORES + VALUES.format("s") + "y = Identity(o)"
    model = model_of(f"({inputs}) => (float[B, 2, S, 4] y) <float scale = {{0.5}}>", body)
    report = canonicalize(check(model, {"Attention": 1}))
    assert [len(value.shape or ()) for value in attention(model).inputs if value is not None] == [4, 4, 4]
    assert report.attention


@pytest.mark.parametrize(
    "inputs", ["float[B, 1, 8] q, float[B, 1, 8] k, float[B, 1, 8] v", INPUTS.replace("S", "1", 1)]
)
def test_one_query_or_one_key(inputs: str) -> None:
    """Axes of one element are in no layout: which of them is the query's and which the keys' makes no difference."""
    model = build("", inputs=inputs)
    assert canonicalize(check(model, {"Attention": 1})).attention
    assert all(len(value.shape or ()) == 3 for value in attention(model).inputs[:3] if value is not None)


def test_readers_of_the_four_dimensional_output() -> None:
    model = build("", output="y4 = Relu(o) ot = Transpose <perm: ints = [0, 2, 1, 3]> (y4) y = Reshape(ot, join)")
    node = attention(check(model))
    assert node.inputs[0] is not None and len(node.inputs[0].shape or ()) == 3


def test_columns_are_put_in_order() -> None:
    """[B,S,H,3,d]: each head's query, key and value side by side; the weight's columns are permuted, once."""
    weight = ", ".join(str(round(float(x), 3)) for x in np.random.default_rng(0).standard_normal(8 * 24))
    body = (
        "f = MatMul(x, weight) r = Reshape(f, split) "
        "a, b, c = Split <axis: int = 3, num_outputs: int = 3> (r) qs = Squeeze(a, third) ks = Squeeze(b, third) "
        "vs = Squeeze(c, third) qt = Transpose <perm: ints = [0, 2, 1, 3]> (qs) "
        "kt = Transpose <perm: ints = [0, 2, 3, 1]> (ks) "
        "vt = Transpose <perm: ints = [0, 2, 1, 3]> (vs) " + SCORES + VALUES.format("s") + OUTPUT
    )
    constants = f"float[8, 24] weight = {{{weight}}}, int64[5] split = {{0, 0, 2, 3, 4}}, int64[1] third = {{3}}, "
    constants += "int64[3] join = {0, 0, 8}, float scale = {0.5}"
    model = check(model_of(f"(float[B, S, 8] x) => (float[B, S, 8] y) <{constants}>", body))
    assert sorted(node.op_type for node in model.graph) == ["Attention", "MatMul", "Split"]
    assert [attention(model).inputs[i].index() for i in range(3)] == [0, 1, 2]  # type: ignore[union-attr]


def test_the_gate_of_experts_is_no_attention() -> None:
    weights = ", ".join(["0.5", "-0.5"] * 16)
    signature = f"(float[B, S, 8] x) => (float[] y) <int64[2] rows = {{-1, 8}}, float[8, 4] w = {{{weights}}}>"
    model = model_of(signature, "r = Reshape(x, rows) g = MatMul(r, w) y = Softmax <axis: int = -1> (g)")
    assert canonicalize(model).refused == []
