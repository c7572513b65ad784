"""Attention over cached keys and values: operands that stay [batch, heads, tokens, depth]."""

from __future__ import annotations

from tests.ir.canonical import check, model_of

SIGNATURE = (
    "(float[1, 2, 1, 4] q, float[1, 2, 5, 4] past, float[1, 2, 1, 4] new, float[1, 2, 6, 4] v) "
    "=> (float[1, 2, 1, 4] y) "
    "<float half = {0.5}, int64[3] flat = {2, -1, 4}, int64[4] apart = {1, 2, 4, -1}>"
)
# As torch's exporter writes scaled_dot_product_attention: keys turned in three axes, half of the scale on each side.
BODY = (
    "k = Concat <axis: int = 2> (past, new) rows = Reshape(k, flat) turned = Transpose <perm: ints = [0, 2, 1]> (rows) "
    "kt = Reshape(turned, apart) qs = Mul(q, half) ks = Mul(kt, half) s = MatMul(qs, ks) "
    "w = Softmax <axis: int = -1> (s) y = MatMul(w, v)"
)


def test_keys_are_read_where_they_were_put_together() -> None:
    model = check(model_of(SIGNATURE, BODY), {"Attention": 1, "Concat": 1})
    node = next(node for node in model.graph if node.op_type == "Attention")
    assert node.attributes["scale"].as_float() == 0.25
    assert [value.name for value in node.inputs] == ["q", "k", "v"]


def test_a_boolean_mask_of_unknown_sizes_beside_one_that_is_added() -> None:
    """No more is known of it than that it broadcasts."""
    signature = (
        "(float[B, 2, S, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v, float[B, 1, 1, S] bias, float[S] places) "
        "=> (float[] y) <int64[1] flat = {1}, int64[1] first = {0}, int64[1] last = {3}, float low = {-1e5}>"
    )
    body = (
        "wide = Constant <value = int64[4] {1, 1, 1, 8}> () no = Constant <value = bool {0}> () "
        "hidden = Expand(no, wide) t = Transpose <perm: ints = [0, 1, 3, 2]> (k) s = MatMul(q, t) "
        "length = Size(places) end = Reshape(length, flat) part = Slice(hidden, first, end, last) "
        "m = Where(part, low, s) b = Add(m, bias) w = Softmax <axis: int = -1> (b) y = MatMul(w, v)"
    )
    model = check(model_of(signature, body))
    assert "Attention" in {node.op_type for node in model.graph}
