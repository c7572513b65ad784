"""The parts of a projection are cut by one Split with its sizes written, however ``chunk`` was exported."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ir.canonical import check, model_of
from xopt.ir.edit import constant
from xopt.ir.structure import transformer_blocks
from xopt.ir.walk import shape_of


def _weights(rows: int, columns: int) -> str:
    values = np.random.default_rng(rows).standard_normal(rows * columns)
    return ", ".join(f"{value:.6f}" for value in values)


SIGNATURE = (
    f"(float[B, S, 4] x) => (float[B, S, 4] y) <float[4, 12] w = {{{_weights(4, 12)}}}, "
    f"float[6, 4] down = {{{_weights(6, 4)}}}, "
    "int64[1] zero = {0}, "
    "int64[1] six = {6}, int64[1] seven = {7}, int64[1] most = {9223372036854775807}, int64[1] last = {-1}, "
    "int64[1] two = {2}, int64[1] one = {1}, int64[1] twelve = {12}>"
)
GATED = "s = Sigmoid(g) t = Mul(g, s) h = Mul(t, u) d = MatMul(h, down) y = Add(x, d)"
CHUNKS = {
    "split": "g, u = Split<axis = -1, num_outputs = 2>(p)",
    "slices": "g = Slice(p, zero, six, last) u = Slice(p, six, most, last)",
    "later-first": "u = Slice(p, six, twelve, two) g = Slice(p, zero, six, two, one)",
}
OTHER = {
    "overlap": "g = Slice(p, zero, seven, last) u = Slice(p, six, most, last) v = Slice(g, one, seven, last)",
    "steps": "g = Slice(p, zero, most, last, two) u = Slice(p, one, most, last, two) v = Identity(g)",
}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gated_feed_forward_of_one_projection(chunk: str) -> None:
    model = check(model_of(SIGNATURE, f"p = MatMul(x, w) {CHUNKS[chunk]} {GATED}"))
    (block,) = transformer_blocks(model)
    assert block.ffn is not None and block.ffn.gated and block.ffn.width == 6
    assert (block.ffn.gate and block.ffn.gate.part, block.ffn.up.part) == (slice(0, 6), slice(6, 12))
    assert not any(node.op_type == "Slice" for node in model.graph)
    (split,) = (node for node in model.graph if node.op_type == "Split")
    assert list(constant(split.inputs[1])) == [6, 6] and all(shape_of(part)[-1] == 6 for part in split.outputs)


@pytest.mark.parametrize("slices", OTHER)
def test_slices_that_do_not_cover_once_stay(slices: str) -> None:
    body = f"p = MatMul(x, w) {OTHER[slices]} h = Mul(v, u) y = MatMul(h, down)"
    model = check(model_of(SIGNATURE, body))
    assert not any(node.op_type == "Split" for node in model.graph)
