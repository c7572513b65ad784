"""Sizes that the model or the inputs decide: as onnxruntime where they make sense, an error where they do not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.targets.running import built, node_model, onnxruntime
from xopt import targets
from xopt.errors import InputError
from xopt.targets.lowering import lower

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
LAST, FIRST = 2**63 - 1, -(2**63)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float, kind: type = np.int64) -> np.ndarray:
    return np.array(value, kind)


def case(op: str, inputs: dict[str, Any], *sizes: dict[str, int], **rest: Any) -> Any:
    return pytest.param(op, inputs, sizes or ({},), rest, id=f"{op}-{rest.pop('id', '')}")


def feeds_of(model: ir.Model, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes.get(str(dim.value), 3) for dim in value.shape or ()]
        feeds[str(value.name)] = np.arange(math.prod(shape)).astype(value.dtype.numpy()).reshape(shape)
    return feeds


def model_of(op: str, inputs: dict[str, Any], rest: dict[str, Any]) -> ir.Model:
    model = node_model(op, inputs, **rest)
    if op == "TopK":
        model.graph.outputs[1].type = ir.TensorType(INT64)
    return model


X = ["b", 4, 6]
VALID = [
    case("Reshape", {"x": X, "s": ints(0, 3, 8)}, {"b": 1}, {"b": 5}),
    case("Reshape", {"x": X, "s": ints(-1, 8)}, {"b": 1}, {"b": 5}),
    case("Reshape", {"x": ["b", 6], "s": ints(3, -1)}, {"b": 1}, {"b": 5}),
    case("Slice", {"x": X, "s": ints(FIRST), "e": ints(LAST), "a": ints(-1), "t": ints(LAST)}, {"b": 3}),
    case("Slice", {"x": X, "s": ints(LAST), "e": ints(FIRST), "a": ints(-1), "t": ints(FIRST)}, {"b": 3}),
    case("Slice", {"x": X, "s": ints(-2), "e": ints(LAST), "a": ints(0)}, {"b": 1}, {"b": 2}, {"b": 7}),
    case("Slice", {"x": X, "s": ints(LAST), "e": ints(FIRST), "a": ints(0), "t": ints(-2)}, {"b": 1}, {"b": 4}),
    case("Slice", {"x": X, "s": ints(-1), "e": ints(-3), "a": ints(0), "t": ints(-1)}, {"b": 3}, {"b": 4}),
    case("Slice", {"x": X, "s": ints(1, 9), "e": ints(2, -9), "a": ints(1, 2), "t": ints(1, -4)}, {"b": 2}),
    case("Slice", {"x": ["b", 4], "s": ints(3), "e": ints(-1), "a": ints(0)}, {"b": 2}, {"b": 3}, {"b": 4}, {"b": 5}),
    case("Split", {"x": X, "s": ints(3, 0, 1)}, {"b": 2}, axis=1, outputs=3),
    case("Expand", {"x": ["b", 1], "s": ints(3, 1, 6)}, {"b": 1}, {"b": 1}),
    case("Expand", {"x": [1, 4], "s": ints(2, 1)}),
    case("Tile", {"x": X, "r": ints(2, 1, 0)}, {"b": 2}),
    case("Pad", {"x": X, "p": ints(0, -1, 2, 0, -2, -3)}, {"b": 2}),
    case("Pad", {"x": X, "p": ints(0, 3, 5, 0, 3, 5)}, {"b": 2}, mode="reflect"),
    case("Pad", {"x": X, "p": ints(0, 9, 0, 0, 9, 9)}, {"b": 2}, mode="edge"),
    case("ConstantOfShape", {"s": ints(2, 0, 3)}),
    case("Range", {"a": scalar(5), "b": scalar(-6), "c": scalar(-2)}, output_type=INT64),
    case("Range", {"a": scalar(0.5, np.float32), "b": scalar(3, np.float32), "c": scalar(0.5, np.float32)}),
    case("Range", {"a": scalar(5), "b": scalar(2), "c": scalar(1)}, output_type=INT64),
    case("Trilu", {"x": X, "k": scalar(LAST)}, {"b": 2}), case("Trilu", {"x": X, "k": scalar(FIRST)}, {"b": 2}),
    case("Trilu", {"x": X, "k": scalar(-2)}, {"b": 2}, upper=0), case("EyeLike", {"x": [4, 6]}, k=2**40),
    case("TopK", {"x": X, "k": ints(1)}, {"b": 1}, {"b": 5}, axis=0, outputs=2),
    case("Squeeze", {"x": ["b", 4], "a": ints(0)}, {"b": 1}),
    case("Gather", {"x": ["b", 4], "i": scalar(2)}, {"b": 3}, {"b": 9}),
    case("Gather", {"x": ["b", 4], "i": ints(-3, 1)}, {"b": 3}, {"b": 9}),
    case("OneHot", {"x": [3, 2], "d": ints(4), "v": np.float32([0, 1])}, dtypes={"x": INT64}),
    case("CumSum", {"x": X, "a": scalar(-1)}, {"b": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "sizes", "rest"), VALID)
def test_sizes_that_make_sense(op: str, inputs: dict[str, Any], sizes: Any, rest: dict[str, Any]) -> None:
    model = model_of(op, inputs, rest)
    ours, theirs = built(lower(model, targets.get("cpu"))), onnxruntime(model)
    for size in sizes:
        feeds = feeds_of(model, size)
        for mine, wanted in zip(ours(feeds), theirs(feeds), strict=True):
            assert mine.dtype == wanted.dtype
            np.testing.assert_array_equal(mine, wanted)


INVALID_MODELS = [
    case("Reshape", {"x": [4, 6], "s": ints(5, 5)}), case("Reshape", {"x": [4, 6], "s": ints(5, -1)}),
    case("Reshape", {"x": [4, 6], "s": ints(-1, -1)}), case("Reshape", {"x": [4, 6], "s": ints(-2, -12)}),
    case("Reshape", {"x": [4, 6], "s": ints(4, 6, 0)}), case("Reshape", {"x": [4, 6], "s": ints(0, -1)}, allowzero=1),
    case("Reshape", {"x": X, "s": ints(0, 5, -1)}), case("Reshape", {"x": [4, 6], "s": ints(2**62, 2**62)}),
    case("Flatten", {"x": [4, 6]}, axis=3), case("Squeeze", {"x": [4, 6], "a": ints(0)}),
    case("Squeeze", {"x": [1, 6], "a": ints(2)}), case("Unsqueeze", {"x": [4, 6], "a": ints(4)}),
    case("Unsqueeze", {"x": [4, 6], "a": ints(0, 0)}), case("Unsqueeze", {"x": [4, 6], "a": ints(-5)}),
    case("Slice", {"x": X, "s": ints(0), "e": ints(2), "a": ints(1), "t": ints(0)}),
    case("Slice", {"x": X, "s": ints(0), "e": ints(2), "a": ints(3)}),
    case("Slice", {"x": X, "s": ints(0, 0), "e": ints(2, 2), "a": ints(1, 1)}),
    case("Slice", {"x": X, "s": ints(0, 0), "e": ints(2)}),
    case("Split", {"x": X, "s": ints(1, 2)}, axis=1, outputs=2),
    case("Split", {"x": X, "s": ints(3, 3)}, axis=1, outputs=2),
    case("Split", {"x": X, "s": ints(5, -1)}, axis=1, outputs=2),
    case("Split", {"x": X, "s": ints(2, 2)}, axis=3, outputs=2),
    case("Split", {"x": X, "s": ints(2, 2)}, axis=1, outputs=3),
    case("Expand", {"x": [3, 4], "s": ints(2, 1)}), case("Expand", {"x": [3, 4], "s": ints(3, -4)}),
    case("Tile", {"x": X, "r": ints(1, -1, 1)}), case("Tile", {"x": X, "r": ints(1, 1)}),
    case("Pad", {"x": X, "p": ints(0, -3, 0, 0, -2, 0)}), case("Pad", {"x": X, "p": ints(0, 1, 0, 0)}),
    case("Pad", {"x": X, "p": ints(1, 1), "v": scalar(0, np.float32), "a": ints(3)}),
    case("Pad", {"x": X, "p": ints(0, 4, 0, 0, 0, 0)}, mode="reflect"),
    case("ConstantOfShape", {"s": ints(2, -1)}),
    case("Range", {"a": scalar(0), "b": scalar(5), "c": scalar(0)}, output_type=INT64),
    *(case("Range", {"a": scalar(0, np.float32), "b": scalar(b, np.float32), "c": scalar(c, np.float32)})
      for b, c in ((np.nan, 1), (np.inf, 1), (1, np.nan), (5, 0))),
    case("TopK", {"x": X, "k": ints(5)}, axis=1, outputs=2), case("TopK", {"x": X, "k": ints(-1)}, axis=1, outputs=2),
    case("TopK", {"x": X, "k": ints(LAST)}, axis=1, outputs=2), case("TopK", {"x": X, "k": ints(1)}, axis=3, outputs=2),
    case("CumSum", {"x": X, "a": scalar(3)}), case("CumSum", {"x": X, "a": scalar(-4)}),
    case("OneHot", {"x": [3, 2], "d": ints(-4), "v": np.float32([0, 1])}),
    case("OneHot", {"x": [3, 2], "d": ints(4), "v": np.float32([0, 1, 2])}),
    case("Gather", {"x": X, "i": ints(4, 0)}, axis=1), case("Gather", {"x": X, "i": scalar(-5)}, axis=1),
    case("Gather", {"x": X, "i": ints(0)}, axis=3), case("Gather", {"x": X, "i": np.arange(300) % 7}, axis=2),
    case("GatherElements", {"x": X, "i": np.full((1, 1, 1), 6)}, axis=2),
    case("GatherElements", {"x": [3, 4], "i": np.zeros((4, 1), np.int64)}, axis=1),
    case("GatherND", {"x": X, "i": np.array([[0, 4]])}),
    case("GatherND", {"x": [3, 4], "i": np.zeros((2, 3), np.int64)}),
    case("ScatterND", {"x": X, "i": np.array([[0, -5]]), "u": [1, 6]}),
    case("ScatterND", {"x": [3, 4], "i": np.array([[0], [1]]), "u": [3, 4]}),
    case("ScatterND", {"x": [3, 4], "i": np.array([[0], [1]]), "u": [2, 3]}),
    case("ScatterElements", {"x": [3, 4], "i": np.array([[3, 0]]), "u": [1, 2]}),
    case("ScatterElements", {"x": [3, 4], "i": np.array([[0, 0]]), "u": [2, 1]}),
    case("Concat", {"x": [3, 4], "y": [2, 5]}, axis=0), case("Concat", {"x": [3, 4], "y": [3, 4]}, axis=2),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "sizes", "rest"), INVALID_MODELS)
def test_sizes_that_never_make_sense_are_refused(
    op: str, inputs: dict[str, Any], sizes: Any, rest: dict[str, Any]
) -> None:
    model = model_of(op, inputs, rest)
    with pytest.raises(InputError, match="E-UNSUPPORTED-OP"):
        lower(model, targets.get("cpu"))
    with pytest.raises(Exception, match=r"\w"):
        onnxruntime(model)(feeds_of(model, {}))


DEPENDS = [
    case("Reshape", {"x": ["b", 5], "s": ints(3, -1)}, {"b": 1}, {"b": 4}),
    case("Reshape", {"x": ["b", 6], "s": ints(6, 4)}, {"b": 3}, {"b": 5}),
    case("Squeeze", {"x": ["b", 4], "a": ints(0)}, {"b": 2}),
    case("Split", {"x": ["b", 4], "s": ints(3, 2)}, {"b": 4}, {"b": 6}, outputs=2),
    case("Expand", {"x": ["b", 4], "s": ints(3, 4)}, {"b": 2}),
    case("Pad", {"x": ["b", 4], "p": ints(2, 0, 0, 0)}, {"b": 2}, mode="reflect"),
    case("Pad", {"x": ["b", 4], "p": ints(-2, 0, -1, 0)}, {"b": 2}),
    case("TopK", {"x": ["b", 4], "k": ints(3)}, {"b": 2}, axis=0, outputs=2),
    case("Gather", {"x": ["b", 4], "i": scalar(3)}, {"b": 3}),
    case("Gather", {"x": ["b", 4], "i": ints(0, -3)}, {"b": 2}),
    case("ScatterND", {"x": ["b", 4], "i": np.array([[2]]), "u": [1, 4]}, {"b": 2}),
    case("Add", {"x": ["b", 4], "y": ["c", 4]}, {"b": 2, "c": 3}, {"b": 3, "c": 2}),
    case("Where", {"c": np.ones((3, 1), bool), "x": ["b", 4], "y": ["c", 4]}, {"b": 2, "c": 3}),
    case("Concat", {"x": ["b", 4], "y": ["c", 4]}, {"b": 2, "c": 3}, axis=1),
    case("MatMul", {"x": [3, "k"], "y": ["l", 4]}, {"k": 3, "l": 4}, {"k": 4, "l": 3}),
    case("GatherElements", {"x": ["b", 4], "i": np.zeros((3, 4), np.int64)}, {"b": 2}, axis=1),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "sizes", "rest"), DEPENDS)
def test_inputs_that_do_not_fit_are_refused(op: str, inputs: dict[str, Any], sizes: Any, rest: dict[str, Any]) -> None:
    model = model_of(op, inputs, rest)
    ours, theirs = built(lower(model, targets.get("cpu"))), onnxruntime(model)
    for size in sizes:
        feeds = feeds_of(model, size)
        with pytest.raises(Exception, match=r"\w"):
            theirs(feeds)
        with pytest.raises((ValueError, RuntimeError), match=r"\w"):
            ours(feeds)
