"""Models of old opsets mean the same after they were brought to the canonical one.

onnxruntime runs opset 7 and later as they are; what is older is compared with numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.runtime.reference import ReferenceSession

Array = np.ndarray
FLOAT = TensorProto.FLOAT


def numbers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def graph(nodes: list[onnx.NodeProto], feeds: dict[str, Array], weights: dict[str, Array]) -> onnx.GraphProto:
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for name, a in feeds.items()]  # fmt: skip
    inputs += [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
               for name, a in weights.items()]  # fmt: skip
    output = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(np.float32)), None)
    return helper.make_graph(nodes, "g", inputs, [output], [numpy_helper.from_array(a, n) for n, a in weights.items()])


def model_of(
    opset: int,
    op: str,
    feeds: dict[str, Array],
    weights: dict[str, Array] | None = None,
    outputs: int = 1,
    **attrs: Any,
) -> onnx.ModelProto:
    """One node over ``feeds`` and then ``weights`` (a missing input is called ``_``); "y" is its first output."""
    weights = weights or {}
    names = ["" if name.startswith("_") else name for name in (*feeds, *weights)]
    node = helper.make_node(op, names, ["y", *(f"y{place}" for place in range(1, outputs))], name="n", **attrs)
    given = {name: array for name, array in weights.items() if not name.startswith("_")}
    built = helper.make_model(graph([node], feeds, given), opset_imports=[helper.make_opsetid("", opset)])
    built.ir_version = 3 if opset < 9 else 4
    return built


def upgraded(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    model = ir.from_proto(proto)
    canonicalize(model)
    assert model.opset_imports[""] == 24
    return ReferenceSession(model).run(feeds)["y"]


X = numbers(2, 3, 4, 5)
ONES = np.array([1, 1, 2, 2], np.float32)
SINCE_7: dict[str, onnx.ModelProto] = {
    "upsample-7": model_of(7, "Upsample", {"x": X}, scales=[1.0, 1.0, 2.0, 3.0], mode="nearest"),
    "upsample-9-linear": model_of(9, "Upsample", {"x": X}, {"s": ONES}, mode="linear"),
    "resize-10-linear": model_of(10, "Resize", {"x": X}, {"s": np.array([1, 1, 1.5, 3], np.float32)}, mode="linear"),
    "resize-10-down": model_of(10, "Resize", {"x": X}, {"s": np.array([1, 1, 0.6, 0.6], np.float32)}),
    "resize-10-up": model_of(10, "Resize", {"x": X}, {"s": np.array([1, 1, 1.7, 2.3], np.float32)}),
    "resize-10-both": model_of(10, "Resize", {"x": X}, {"s": np.array([1, 1, 0.6, 1.7], np.float32)}),
    "resize-11": model_of(11, "Resize", {"x": X}, {"r": np.zeros(0, np.float32), "s": ONES}, mode="linear"),
    "resize-11-tf": model_of(
        11, "Resize", {"x": X}, {"r": np.zeros(0, np.float32), "s": np.array([1, 1, 0.6, 1.7], np.float32)},
        coordinate_transformation_mode="tf_half_pixel_for_nn", nearest_mode="floor"),
    "slice": model_of(9, "Slice", {"x": X}, axes=[1, 3], starts=[1, -3], ends=[3, 100]),
    "slice-no-axes": model_of(9, "Slice", {"x": X}, starts=[0, 1], ends=[1, 3]),
    "split": model_of(11, "Split", {"x": X}, outputs=2, axis=1, split=[1, 2]),
    "split-equal": model_of(11, "Split", {"x": X}, outputs=2, axis=2),
    "squeeze": model_of(11, "Squeeze", {"x": X[:1]}, axes=[0]),
    "squeeze-all": model_of(11, "Squeeze", {"x": X[:1, :, :1]}),
    "unsqueeze": model_of(11, "Unsqueeze", {"x": X}, axes=[0, 2]),
    "top-k": model_of(9, "TopK", {"x": X}, outputs=2, k=2, axis=1),
    "clip": model_of(10, "Clip", {"x": X}, min=-0.5, max=0.25),
    "clip-below": model_of(10, "Clip", {"x": X}, min=-0.5),
    "pad": model_of(10, "Pad", {"x": X}, pads=[0, 0, 1, 1, 0, 0, 2, 2], value=1.5),
    "softmax": model_of(11, "Softmax", {"x": X}),
    "softmax-axis": model_of(11, "Softmax", {"x": X}, axis=2),
    "softmax-last": model_of(11, "Softmax", {"x": X}, axis=-1),
    "log-softmax": model_of(11, "LogSoftmax", {"x": X}, axis=2),
    "hardmax": model_of(11, "Hardmax", {"x": X}, axis=2),
    "reduce-sum": model_of(11, "ReduceSum", {"x": X}, axes=[1, -1], keepdims=0),
    "reduce-mean": model_of(12, "ReduceMean", {"x": X}, axes=[1]),
    "reduce-max-13": model_of(13, "ReduceMax", {"x": X}, axes=[1]),
    "reduce-all": model_of(11, "ReduceL2", {"x": X}),
    "dropout": model_of(7, "Dropout", {"x": X}, ratio=0.3),
    "batch-norm": model_of(7, "BatchNormalization", {"x": X}, {n: abs(numbers(3)) for n in "sbmv"}),
    "gemm": model_of(7, "Gemm", {"x": X[0, 0]}, {"w": numbers(6, 5), "b": numbers(6)}, transB=1),
    "scatter": model_of(10, "Scatter", {"x": X[0, 0]}, {"i": np.array([[1, 2], [0, 4]]), "u": numbers(2, 2)}, axis=1),
    "prelu": model_of(7, "PRelu", {"x": X}, {"s": numbers(3, 1, 1)}),
    "one-hot": model_of(9, "OneHot", {"i": np.array([0, 2])}, {"d": np.array([4]), "v": np.array([0, 1], np.float32)}),
    "lstm": model_of(
        7, "LSTM", {"x": numbers(4, 2, 5)}, {"w": numbers(1, 12, 5), "r": numbers(1, 12, 3)}, hidden_size=3),
}  # fmt: skip


def fed(proto: onnx.ModelProto) -> dict[str, Array]:
    """The inputs of one of the models, as they were when it was made."""
    given = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for value in proto.graph.input:
        if value.name not in given:
            shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            whole = value.type.tensor_type.elem_type == TensorProto.INT64
            feeds[value.name] = np.arange(shape[0]) if whole else numbers(*shape)
    return feeds


@pytest.mark.parametrize("name", SINCE_7)
def test_node_means_what_it_meant(name: str) -> None:
    proto = SINCE_7[name]
    feeds = fed(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(["y"], feeds)[0]
    found = upgraded(proto, feeds)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


C, LAST = numbers(3), numbers(5)
BEFORE_7: dict[str, tuple[onnx.ModelProto, Callable[[Array], Array]]] = {
    "add-axis": (model_of(6, "Add", {"x": X}, {"c": C}, broadcast=1, axis=1), lambda x: x + C[:, None, None]),
    "mul-end": (model_of(6, "Mul", {"x": X}, {"c": LAST}, broadcast=1), lambda x: x * LAST),
    "sub-middle": (
        model_of(6, "Sub", {"x": X}, {"c": numbers(3, 4)}, broadcast=1, axis=1),
        lambda x: x - numbers(3, 4)[..., None],
    ),
    "batch-norm": (
        model_of(6, "BatchNormalization", {"x": X}, {n: abs(C) for n in "sbmv"}, is_test=1, epsilon=0.0),
        lambda x: (x - abs(C)[:, None, None]) * np.sqrt(abs(C))[:, None, None] + abs(C)[:, None, None],
    ),
    "dropout": (model_of(6, "Dropout", {"x": X}, is_test=1), lambda x: x),
    "prelu": (model_of(6, "PRelu", {"x": X}, {"c": C}), lambda x: np.where(x < 0, x * C[:, None, None], x)),
    "reshape": (model_of(1, "Reshape", {"x": X}, shape=[0, -1]), lambda x: x.reshape(2, -1)),
    "tile": (
        model_of(5, "Tile", {"x": X[0, 0]}, {"t": np.array([2], np.float32), "a": np.array([1], np.float32)}),
        lambda x: np.tile(x, (1, 2)),
    ),
    "cast": (model_of(5, "Cast", {"x": X}, to="FLOAT"), lambda x: x),
    "pad": (
        model_of(1, "Pad", {"x": X}, paddings=[0, 0, 1, 1, 0, 0, 2, 2]),
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2), (1, 2)]),
    ),
    "relu": (model_of(1, "Relu", {"x": X}, consumed_inputs=[0]), lambda x: np.maximum(x, 0)),
    "split": (model_of(1, "Split", {"x": X}, outputs=2, axis=1, split=[1, 2]), lambda x: x[:, :1]),
    "upsample": (
        model_of(1, "Upsample", {"x": X}, width_scale=2.0, height_scale=3.0),
        lambda x: x.repeat(3, 2).repeat(2, 3),
    ),
    "selu": (
        model_of(5, "Selu", {"x": X}),
        lambda x: 1.0507 * np.where(x < 0, np.float32(1.6732) * np.expm1(x), x),
    ),
}


@pytest.mark.parametrize("name", BEFORE_7)
def test_node_of_the_first_opsets(name: str) -> None:
    proto, expected = BEFORE_7[name]
    feeds = fed(proto)
    np.testing.assert_allclose(upgraded(proto, feeds), expected(feeds["x"]), rtol=2e-6, atol=1e-6)


def test_concat_of_the_first_opsets_joins_channels() -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"])
    proto = helper.make_model(graph([node], {"x": X}, {}), opset_imports=[helper.make_opsetid("", 3)])
    np.testing.assert_array_equal(upgraded(proto, {"x": X}), np.concatenate([X, X], 1))


def test_branches_are_brought_along() -> None:
    """Softmax over two axes and Unsqueeze with attributes, inside of If."""

    def branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(list(nodes), "b", [], [helper.make_tensor_value_info("o", FLOAT, None)])

    then = branch(
        helper.make_node("Softmax", ["x"], ["s"], axis=1),
        helper.make_node("Unsqueeze", ["s"], ["u"], axes=[0]),
        helper.make_node("Squeeze", ["u"], ["o"], axes=[0]),
    )
    other = branch(helper.make_node("Clip", ["x"], ["o"], min=-0.125, max=0.125))
    proto = model_of(10, "If", {"c": np.array(True)}, then_branch=then, else_branch=other)
    proto.graph.input.append(helper.make_tensor_value_info("x", FLOAT, X.shape))
    for condition in (True, False):
        feeds = {"c": np.array(condition), "x": X}
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(upgraded(proto, feeds), session.run(["y"], feeds)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("proto", "word"),
    [
        (model_of(7, "BatchNormalization", {"x": X}, {n: numbers(3, 4, 5) for n in "sbmv"}, spatial=0), "spatial"),
        (model_of(7, "BatchNormalization", {"x": X}, dict.fromkeys("sbmv", C), outputs=5), "training"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(proto: onnx.ModelProto, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        canonicalize(ir.from_proto(proto))
    assert caught.value.code == "E-UNSUPPORTED-OP" and caught.value.where == "node 'n'"


def test_newest_opsets_stay_what_they_are() -> None:
    for opset in (25, onnx.defs.onnx_opset_version()):
        model = ir.from_proto(model_of(opset, "Relu", {"x": X}))
        canonicalize(model)
        assert model.opset_imports[""] == opset and [node.op_type for node in model.graph] == ["Relu"]


@pytest.mark.parametrize("channels", [4, "C"])
def test_scales_of_groups_become_scales_of_channels(channels: int | str) -> None:
    """Or are refused by name where the number of channels is not known."""
    text = (
        '<ir_version: 8, opset_import: ["" : 18]> '
        f"g (float[2, {channels}, 3] x) => (float[2, {channels}, 3] y) <float[2] s = {{1, 2}}, float[2] b = {{3, 4}}> "
        "{ y = GroupNormalization<num_groups = 2>(x, s, b) }"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    if channels == "C":
        with pytest.raises(InputError, match="channels of a GroupNormalization"):
            canonicalize(model)
        return
    canonicalize(model)
    x = numbers(2, 4, 3)
    groups = x.reshape(2, 2, 6)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    expected = normal * np.array([1, 2])[:, None] + np.array([3, 4])[:, None]
    np.testing.assert_allclose(ReferenceSession(model).run({"x": x})["y"], expected.reshape(x.shape), rtol=1e-4)


def test_softmax_whose_rank_is_computed_stays_one_node() -> None:
    """Exporters reshape to a list that they put together; the last axis is then known to be the last."""
    text = """<ir_version: 4, opset_import: ["" : 11]> g (float[2, 6] x) => (float y) {
        two = Constant<value = int64 {2}>()
        three = Constant<value = int64 {3}>()
        a = Unsqueeze<axes = [0]>(two)
        b = Unsqueeze<axes = [0]>(three)
        shape = Concat<axis = 0>(a, a, b)
        parts = Reshape(x, shape)
        y = Softmax<axis = 2>(parts)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    canonicalize(model)
    assert [node.op_type for node in model.graph] == ["Reshape", "Softmax"]
