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
