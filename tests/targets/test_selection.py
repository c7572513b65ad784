"""What is chosen by the data has the size that it has, and what is computed from it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.net import Net
from tests.targets.running import built, node_model, reference
from xopt import targets
from xopt.targets.lowering import lower

INT, BOOL = ir.DataType.INT64, ir.DataType.BOOL
CPU = targets.get("cpu")


def one(
    op: str, inputs: dict[str, Any], kinds: dict[str, ir.DataType], outputs: list[ir.DataType], **attributes: Any
) -> Any:
    model = node_model(op, inputs, outputs=len(outputs), dtypes=kinds, **attributes)
    for value, kind in zip(model.graph.outputs, outputs):
        value.type = ir.TensorType(kind)
    run = built(lower(model, CPU))

    def check(feeds: dict[str, np.ndarray]) -> None:
        for got, want in zip(run(feeds), reference(model, feeds), strict=True):
            assert got.shape == want.shape
            np.testing.assert_array_equal(got, want)

    return check


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT, INT, BOOL])
def test_places_of_what_is_not_zero(kind: ir.DataType) -> None:
    check = one("NonZero", {"x": [3, "n"]}, {"x": kind}, [INT])
    for density in (0.0, 0.3, 1.0):
        x = np.random.default_rng(0).random((3, 5)) < density
        check({"x": x.astype(kind.numpy())})


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_slices_by_their_condition(axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    check = one("Compress", {"x": [4, 5], "c": [4]}, {"c": BOOL}, [ir.DataType.FLOAT], **attributes)
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    for condition in ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]):
        check({"x": x, "c": np.asarray(condition, bool)})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 1))
def test_distinct_elements(numbers: list[int], ordered: int) -> None:
    DISTINCT[ordered]({"x": np.asarray(numbers, np.float32)})


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=12, max_size=12))
def test_distinct_slices(numbers: list[int]) -> None:
    x = np.asarray(numbers, np.float32)
    ROWS({"x": x.reshape(4, 3)})
    COLUMNS({"x": x.reshape(2, 2, 3)})


KINDS = [ir.DataType.FLOAT, INT, INT, INT]
DISTINCT = [one("Unique", {"x": ["n"]}, {}, KINDS, sorted=ordered) for ordered in (0, 1)]
ROWS = one("Unique", {"x": ["n", 3]}, {}, KINDS, axis=0)
COLUMNS = one("Unique", {"x": [2, 2, 3]}, {}, KINDS, axis=2)


def test_a_model_goes_on_with_what_was_chosen() -> None:
    net = Net("chosen")
    x = net.input("x", ["n", 4])
    means = net.op("ReduceMean", x, net.ints(1), keepdims=0)
    kept = net.op("Compress", x, net.op("Greater", means, net.constant("zero", np.float32(0))), axis=0)
    filled = net.op("Expand", net.weight("row", 1, 4), net.op("Shape", kept))
    net.output(net.op("Add", net.op("Relu", kept), filled), "y")
    model = net.build()
    run = built(lower(model, CPU))
    for rows in (1, 5):
        feeds = {"x": np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)}
        np.testing.assert_allclose(run(feeds)[0], reference(model, feeds)[0], rtol=1e-6)
