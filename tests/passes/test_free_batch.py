"""Models of a fixed batch, as a plain export makes them, take any number of samples; or what is in the way is named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.net import Net
from tests.passes.exact import fingerprint, run_unseen
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir.shapes import bind_dims
from xopt.passes import FoldConstants, FreeBatch
from xopt.pipeline import text
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach
from xopt.runtime.reference import ReferenceSession

CONSTANTS = np.arange(1, 13, dtype=np.float32)


def free(model: ir.Model) -> PassReport:
    """Under verification."""
    return PassManager([FoldConstants(), FreeBatch()], instruments=[VerifyEach()]).run(model, PassContext())[-1].report


def assert_same_by_sample(before: ir.Model, after: ir.Model, axis: int = 0, out: int = 0) -> None:
    """One to four samples in one run of ``after``, and each in a run of ``before`` with others."""
    data = Dataset.random(before, 5, 7)
    assert data.axes is not None and data.axes.size is not None
    original, freed = ReferenceSession(before), ReferenceSession(after)
    for count in (1, 2, 3, 4):
        rows = np.arange(count)
        outputs = freed.run(data.feeds(rows))
        for row in rows:
            alone = original.run(data.feeds((row + np.arange(data.axes.size)) % 5))
            for name, array in outputs.items():
                np.testing.assert_allclose(np.take(array, row, out), np.take(alone[name], 0, out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, *(pytest.param(other, marks=pytest.mark.slow) for other in (1, 3))])
@pytest.mark.parametrize("kind", builders.ZOO)
def test_every_kind_of_model_is_freed(kind: str, batch: int) -> None:
    fixed = bind_dims(builders.ZOO[kind](), {"batch": batch})
    freed = fixed.clone()
    report = free(freed)
    assert (report.rewritten, report.refused) == (1, [])
    assert all(str(value.shape[0]) == "batch" for value in freed.graph.outputs if value.shape is not None)
    assert_same_by_sample(fixed, freed)
    before = fingerprint(freed)
    assert run_unseen(FreeBatch(), freed).reasons == {"not-fixed": 1}
    assert fingerprint(freed) == before


def net(kind: str, batch: int = 2) -> ir.Model:
    """One way to write a batch into a graph, for x [batch, 4, 3]."""
    made = Net(kind)
    x = made.input("x", [batch, 4, 3])
    if kind == "reshape":
        y = made.op("Reshape", made.op("Reshape", x, made.ints(batch * 2, 2, 3)), made.ints(-1, 12))
    elif kind == "tokens of a constant":
        y = made.op(
            "Concat", made.constant("tokens", np.tile(CONSTANTS[:6].reshape(1, 2, 3), (batch, 1, 1))), x, axis=1
        )
    elif kind == "tokens that were expanded":
        y = made.op("Concat", made.op("Expand", made.input("token", [1, 1, 3]), made.ints(batch, 1, 3)), x, axis=1)
    elif kind == "one token":
        y = made.op("Concat", made.constant("token", CONSTANTS[:3].reshape(1, 1, 3)), x, axis=1) if batch == 1 else x
    elif kind == "repeated constant":
        y = made.op("Add", x, made.constant("c", np.tile(CONSTANTS[:4].reshape(1, 4, 1), (batch, 1, 1))))
    elif kind == "windows":
        windows = made.op("Reshape", x, made.ints(batch * 2, 2, 3))
        bias = made.constant("bias", np.tile(CONSTANTS.reshape(2, 2, 3), (batch, 1, 1)))
        y = made.op("Reshape", made.op("Add", windows, bias), made.ints(batch, 4, 3))
    elif kind == "slice":
        y = made.op("Slice", x, made.ints(0, 1), made.ints(batch, 3), made.ints(0, 1))
    elif kind == "sizes":
        image = made.op("Unsqueeze", x, made.ints(1))
        y = made.op("Resize", image, None, None, made.ints(batch, 1, 8, 6), mode="nearest")
    elif kind == "latents":
        q = made.constant("latents", np.tile(CONSTANTS[:6].reshape(1, 2, 3), (batch, 1, 1)))
        y = made.op("Attention", q, x, x, q_num_heads=1, kv_num_heads=1)
    elif kind == "shared input":
        y = made.op("Mul", x, made.input("t", [1]))
    else:
        first = made.op("Transpose", x, perm=[1, 0, 2])
        y = made.op("Transpose", made.op("Reshape", first, made.ints(4, batch, 1, 3)), perm=[1, 0, 2, 3])
    made.output(y, "y")
    return made.build()


WRITTEN = [
    "reshape",
    "tokens of a constant",
    "tokens that were expanded",
    "one token",
    "repeated constant",
    "windows",
    "slice",
    "sizes",
    "latents",
    "shared input",
    "sequence first inside",
]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", WRITTEN)
def test_every_way_to_write_a_batch_down(kind: str, batch: int) -> None:
    fixed = net(kind, batch)
    freed = fixed.clone()
    assert free(freed).refused == []
    assert_same_by_sample(fixed, freed)


def test_the_batch_of_a_sequence_first_model_is_its_second_axis() -> None:
    made = Net("recurrent")
    x = made.input("x", [5, 2, 3])
    state = made.constant("state", np.zeros((1, 2, 4), np.float32))
    y, _ = made.op(
        "GRU", x, made.weight("w", 1, 12, 3), made.weight("r", 1, 12, 4), None, None, state, n=2, hidden_size=4
    )
    made.output(made.op("Squeeze", y, made.ints(1)), "y")
    fixed = made.build()
    freed = fixed.clone()
    assert free(freed).rewritten == 1
    assert list(map(str, freed.graph.inputs[0].shape or ())) == ["5", "batch", "3"]
    assert_same_by_sample(fixed, freed, axis=1, out=1)


def refused(kind: str) -> ir.Model:
    made = Net(kind)
    x = made.op("Softmax", made.input("x", [2, 4, 3]), axis=1)  # so that no other axis could be the batch
    if kind == "sum":
        y = made.op("ReduceSum", x, made.ints(0), keepdims=1, name="culprit")
    elif kind == "flat":
        y = made.op("Reshape", x, made.ints(3, 8), name="culprit")
    elif kind == "constant":
        y = made.op("Add", x, made.constant("c", CONSTANTS[:2].reshape(2, 1, 1)), name="culprit")
    elif kind == "softmax":
        y = made.op("Softmax", x, axis=0, name="culprit")
    elif kind == "unknown":
        y = made.op("Unique", made.op("Relu", x), axis=0, name="culprit")
    else:
        y = made.op("Transpose", made.op("Reshape", x, made.ints(2, 12)), name="first")
        y = made.op("Reshape", y, made.ints(24), name="culprit")
    made.output(y, "y")
    return made.build()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sum", "along-the-batch"),
        ("flat", "reshape-splits-the-batch"),
        ("constant", "differs-between-samples"),
        ("softmax", "along-the-batch"),
        ("unknown", "not-followed-through-unique"),
        ("interleaved output", "output-without-batch"),
    ],
)
def test_what_is_in_the_way_is_named(kind: str, reason: str) -> None:
    model = refused(kind)
    before = fingerprint(model)
    report = run_unseen(FreeBatch(), model)
    assert report.rewritten == 0
    assert [(refusal.what, refusal.reason) for refusal in report.refused] == [("culprit", reason)]
    assert fingerprint(model) == before


def test_an_option_names_the_axis() -> None:
    model = net("reshape")
    run_unseen(FreeBatch(axis="n"), model)
    assert str((model.graph.inputs[0].shape or ())[0]) == "n"
    with pytest.raises(InputError, match="no name of an axis"):
        FreeBatch(axis="two words")
    assert text.parse(text.render([FreeBatch(axis="n")])) == [FreeBatch(axis="n")]
    assert text.from_yaml(text.to_yaml([FreeBatch()])) == [FreeBatch()]
