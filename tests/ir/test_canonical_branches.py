"""An If whose condition is known becomes the branch that it takes; branches that stay are computed as before."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from tests.ir.canonical import model_of
from xopt.ir import canonicalize
from xopt.ir.io import to_bytes
from xopt.ir.shapes import bind_dims
from xopt.runtime.reference import ReferenceSession

SQUEEZED = """
    one = Constant <value = int64 {1}> ()
    doubled = Add (x, x)
    shape = Shape (doubled)
    size = Gather (shape, one)
    alone = Equal (size, one)
    y = If (alone) <
        then_branch = then () => (float[B, 8] short) {
            axes = Constant <value = int64[1] {1}> ()
            short = Squeeze (doubled, axes)
        }, else_branch = otherwise () => (float[B, S, 8] whole) { whole = Identity (doubled) }>
"""
NESTED = """
    yes = Constant <value = bool {1}> ()
    no = Constant <value = bool {0}> ()
    y = If (yes) <
        then_branch = then () => (float[B, S, 8] chosen) {
            w = Constant <value_float = 2.0> ()
            chosen = If (no) <
                then_branch = a () => (float[B, S, 8] u) { u = Neg (x) },
                else_branch = b () => (float[B, S, 8] u) { half = Div (x, w) u = Exp (half) }>
        }, else_branch = otherwise () => (float[B, S, 8] u) { u = Identity (x) }>
    z = If (no) <
        then_branch = c () => (float[B, S, 8] u) { u = Identity (x) },
        else_branch = d () => (float[B, S, 8] half) { half = Div (x, x) }>
"""


@pytest.mark.parametrize("size", [1, 3])
def test_a_squeeze_that_a_size_decides(size: int) -> None:
    model = bind_dims(model_of("(float[B, S, 8] x) => (float[] y)", SQUEEZED), {"S": size})
    x = np.random.default_rng(0).standard_normal((2, size, 8)).astype(np.float32)
    canonicalize(model)
    assert "If" not in {node.op_type for node in model.graph}
    (got,) = ReferenceSession(model).run({"x": x}).values()
    np.testing.assert_array_equal(got, (2 * x)[:, 0] if size == 1 else 2 * x)


def test_a_size_that_is_not_known_leaves_both() -> None:
    model = model_of("(float[B, S, 8] x) => (float[] y)", SQUEEZED)
    canonicalize(model)
    assert "If" in {node.op_type for node in model.graph}
    for size in (1, 3):
        x = np.ones((2, size, 8), np.float32)
        session = onnxruntime.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": x})[0].shape == ((2, 8) if size == 1 else (2, 3, 8))


def test_branches_in_branches_with_names_that_occur_twice() -> None:
    model = model_of("(float[B, S, 8] x) => (float[B, S, 8] y, float[B, S, 8] z)", NESTED)
    canonicalize(model)
    assert [node.op_type for node in model.graph if node.op_type == "If"] == []
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    y, z = ReferenceSession(model).run({"x": x}).values()
    np.testing.assert_allclose(y, np.exp(x / 2), rtol=1e-6)
    np.testing.assert_array_equal(z, np.ones_like(x))


@pytest.mark.parametrize("kept", ["c = Identity (y)", "c = Tanh (y)"])
def test_the_branch_of_the_rank_that_a_reader_asks_for(kept: str) -> None:
    """Only one of them can be joined with a matrix: the axis that is squeezed is 1."""
    body = SQUEEZED + f"{kept} z = Concat <axis: int = 0> (other, c)"
    model = model_of("(float[B, S, 8] x, float[3, 8] other) => (float[] z)", body)
    want = onnxruntime.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
    canonicalize(model)
    assert "If" not in {node.op_type for node in model.graph}
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["B", "1", "8"]
    feeds = {"x": np.ones((2, 1, 8), np.float32), "other": np.ones((3, 8), np.float32)}
    np.testing.assert_array_equal(ReferenceSession(model).run(feeds)["z"], want.run(None, feeds)[0])


def test_a_reader_behind_very_many_nodes() -> None:
    chain = "".join(f"c{place + 1} = Tanh (c{place}) " for place in range(2000))
    body = SQUEEZED + f"c0 = Tanh (y) {chain} z = Concat <axis: int = 0> (other, c2000)"
    model = model_of("(float[B, S, 8] x, float[3, 8] other) => (float[] z)", body)
    canonicalize(model)
    assert "If" not in {node.op_type for node in model.graph}


def test_a_reader_that_may_not_run_asks_for_nothing() -> None:
    body = SQUEEZED + (
        "z = If (flag) <then_branch = joins () => (float[] j) { j = Concat <axis: int = 0> (other, y) }, "
        "else_branch = keeps () => (float[] k) { k = Identity (y) }>"
    )
    model = model_of("(float[B, S, 8] x, float[3, 8] other, bool flag) => (float[] z)", body)
    canonicalize(model)
    assert [node.op_type for node in model.graph].count("If") == 2


def test_readers_of_any_rank_leave_both() -> None:
    model = model_of("(float[B, S, 8] x) => (float[] z)", SQUEEZED + "z = Add (y, y)")
    canonicalize(model)
    assert "If" in {node.op_type for node in model.graph}


ONE_OR_NONE = """
    one = Constant <value = float {1}> ()
    y = If (flag) <
        then_branch = then () => (float[] s) { s = Neg (one) },
        else_branch = otherwise () => (float[1] v) { v = Neg (w) }>
"""


@pytest.mark.parametrize("flag", [True, False])
def test_a_scalar_beside_a_vector_of_one_number_where_both_broadcast_alike(flag: bool) -> None:
    model = model_of("(float[4] x, float[1] w, bool flag) => (float[4] z)", ONE_OR_NONE + "z = Mul (x, y)")
    want = onnxruntime.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
    canonicalize(model)
    (choice,) = (node for node in model.graph if node.op_type == "If")
    branches = [choice.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    assert [len(branch.outputs[0].shape or ()) for branch in branches] == [1, 1]
    feeds = {"x": np.arange(4, dtype=np.float32), "w": np.array([3], np.float32), "flag": np.array(flag)}
    np.testing.assert_array_equal(ReferenceSession(model).run(feeds)["z"], want.run(None, feeds)[0])


@pytest.mark.parametrize("read", ["z = Identity (y)", "z = Neg (y)", "z = Mul (y, one)"])
def test_a_scalar_that_can_be_told_from_a_vector_stays(read: str) -> None:
    model = model_of("(float[4] x, float[1] w, bool flag) => (float[] z)", ONE_OR_NONE + read)
    canonicalize(model)
    (choice,) = (node for node in model.graph if node.op_type == "If")
    ranks = {len(choice.attributes[name].as_graph().outputs[0].shape or ()) for name in ("then_branch", "else_branch")}
    assert ranks == {0, 1}
