"""Which axes run over samples, decided from graphs of every kind and order."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir import builders
from tests.ir.net import Net
from xopt.ir.batch import batch_axes, follow
from xopt.ir.batch_rules import NotFollowedError, Place, reshaped
from xopt.ir.poly import Poly


@pytest.mark.parametrize("kind", builders.ZOO)
def test_batch_first_models_are_followed_to_every_output(kind: str) -> None:
    model = builders.ZOO[kind]()
    found = batch_axes(model)
    assert found.size is None
    for value in model.graph.inputs:
        batched = value.shape is not None and any(getattr(dim, "value", None) == "batch" for dim in value.shape)
        assert found.inputs.get(str(value.name)) == (0 if batched else None)
    walked = follow(model.graph, found.inputs, Poly.axis("batch"))
    assert not walked.meeting and not walked.lost
    assert all(walked.places[value] == Place(0) for value in model.graph.outputs)


def attention(shape: list[str | int], perm: list[int], *more: tuple[str, list[str | int]]) -> ir.Model:
    """Scores of x with itself, after a Transpose to [batch, token, width]; other inputs are added to the scores."""
    net = Net("attention")
    x = net.input("x", shape)
    rows = net.op("Transpose", x, perm=perm)
    scores = net.op("MatMul", rows, net.op("Transpose", rows, perm=[0, 2, 1]))
    for name, other in more:
        scores = net.op("Add", scores, net.input(name, other))
    mixed = net.op("MatMul", net.op("Softmax", scores), rows)
    net.output(net.op("Transpose", mixed, perm=perm), "y")
    return net.build()


@pytest.mark.parametrize(
    ("shape", "perm", "axis", "size"),
    [
        (["a", "b", 4], [0, 1, 2], 1, None),  # called like a batch, wherever it is
        (["batch", "seq", 4], [0, 1, 2], 0, None),
        (["u", "v", 4], [1, 0, 2], 1, None),  # by nothing but the graph
        (["u", "v", 4], [0, 1, 2], 0, None),
        ([5, 2, 4], [1, 0, 2], 1, 2),
        ([5, 2, 4], [0, 1, 2], 0, 5),
        (["u", 2, 4], [1, 0, 2], 1, 2),
        ([1, "v", 4], [0, 1, 2], 0, 1),
    ],
)
def test_the_axis_along_which_nothing_is_mixed_is_the_batch(
    shape: list[str | int], perm: list[int], axis: int, size: int | None
) -> None:
    if shape[:2] == ["a", "b"]:
        perm = [1, 0, 2]
    found = batch_axes(attention(shape, perm))
    assert (found.inputs, found.outputs, found.size) == ({"x": axis}, {"y": axis}, size)


@pytest.mark.parametrize(
    ("x", "mask", "axis"),
    [
        (["batch", "seq", 4], ["seq", "seq"], None),
        (["batch", "seq", 4], ["batch", 1, "seq"], 0),
        (["batch", "seq", 4], ["mask_0", 1, "mask_1"], 0),  # every input with names of its own
        ([5, 5, 4], [5, 5], None),
        ([2, 5, 4], [2, 1, 5], 0),
        ([2, 5, 4], [1, 5, 5], None),
        (["batch", 5, 4], [5, 5], None),
        (["batch", 5, 4], [1], None),
        (["batch", 5, 4], [], None),
        ([1, 5, 4], [5], None),
    ],
)
def test_masks_and_scalars_are_shared_where_they_do_not_run_over_samples(
    x: list[str | int], mask: list[str | int], axis: int | None
) -> None:
    assert batch_axes(attention(x, [0, 1, 2], ("mask", mask))).inputs == {"x": 0, "mask": axis}


def test_a_model_of_scalars_has_no_batch() -> None:
    net = Net("scalars")
    net.output(net.op("Add", net.input("a", []), net.input("b", [])), "y")
    found = batch_axes(net.build())
    assert (found.inputs, found.outputs, found.size) == ({"a": None, "b": None}, {"y": None}, None)


sizes = st.integers(1, 4)


@settings(max_examples=150, deadline=None)
@given(outer=st.lists(sizes, max_size=2), inner=st.lists(sizes, max_size=2), batch=sizes, data=st.data())
def test_a_reshape_leaves_every_sample_at_its_place(
    outer: list[int], inner: list[int], batch: int, data: st.DataObject
) -> None:
    """Numbers of their sample, reshaped: what ``reshaped`` says is where they are."""
    before = [*outer, batch, *inner]
    samples = np.arange(batch).reshape([-1, *[1] * len(inner)])
    values = np.broadcast_to(samples, before)
    count = data.draw(st.integers(0, len(before) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(before) - 1, 1)), max_size=count)))
    after = [int(np.prod(part)) for part in np.split(np.array(before), [c for c in cuts if c < len(before)])]
    try:
        place = reshaped(Place(len(outer)), *(tuple(map(Poly.of, shape)) for shape in (before, after)), Poly.of(batch))
    except NotFollowedError:
        return
    outside, inside = place.outer.constant, place.inner.constant
    assert outside is not None and inside is not None
    parts = np.moveaxis(values.reshape(after), place.axis, 0).reshape(outside, batch, inside, -1)
    assert (parts == np.arange(batch)[None, :, None, None]).all()


def test_merged_axes_are_followed_and_nodes_that_mix_samples_are_named() -> None:
    net = Net("merged")
    x = net.input("x", ["batch", 6, 4])
    windows = net.op("Reshape", x, net.ints(-1, 2, 4))
    back = net.op("Reshape", net.op("Relu", windows), net.ints(-1, 6, 4))
    total = net.op("ReduceMean", back, net.ints(0), keepdims=0, name="over_the_batch")
    net.output(back, "y")
    net.output(total, "z")
    found = follow(net.build().graph, {"x": 0}, Poly.axis("batch"))
    assert {value.name: place for value, place in found.places.items()}[windows.name] == Place(0, inner=Poly.of(3))
    assert {value.name: place for value, place in found.places.items()}["y"] == Place(0)
    assert [(node.name, reason) for node, reason in found.meeting.items()] == [("over_the_batch", "along-the-batch")]
