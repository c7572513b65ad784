"""A function body computes what its operator does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from xopt.ir.bodies import body, has_body

X = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
SCALE = np.asarray([0.5, 2, 1, -1], np.float32)
CALLS: list[tuple[str, list[np.ndarray], dict[str, Any]]] = [
    ("Celu", [X], {"alpha": 0.5}),
    ("Elu", [X], {}),
    ("GroupNormalization", [X, SCALE, SCALE], {"num_groups": 2}),
    ("HardSigmoid", [X], {"alpha": 0.3}),
    ("LayerNormalization", [X, X[1]], {"axis": 1}),
    ("MeanVarianceNormalization", [X[None]], {"axes": [0, 2]}),
    ("RMSNormalization", [X, X[0, 0]], {}),
    ("Shrink", [X], {"bias": 0.2}),
    ("Softmax", [X], {"axis": 1}),
    ("Swish", [X], {"alpha": 0.7}),
]


def call(operator: str, inputs: list[np.ndarray], attributes: dict[str, Any], opset: int) -> onnx.ModelProto:
    """A model of one operator."""
    names = [f"x{place}" for place in range(len(inputs))]
    node = onnx.helper.make_node(operator, names, ["y"], name="it", **attributes)
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, x.shape) for n, x in zip(names, inputs)]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, inputs[0].shape)
    graph = onnx.helper.make_graph([node], "one", values, [output])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize(("operator", "inputs", "attributes"), CALLS, ids=[operator for operator, _, _ in CALLS])
def test_the_body_computes_the_operator(operator: str, inputs: list[np.ndarray], attributes: dict[str, Any]) -> None:
    proto = call(operator, inputs, attributes, 24)
    node = next(iter(ir.from_proto(proto).graph))
    assert has_body(node)
    simpler = body(node, 24)
    assert simpler is not None
    assert simpler.opset_imports[""] == 24
    assert operator not in {inner.op_type for inner in simpler.graph}
    feeds = {f"x{place}": array for place, array in enumerate(inputs)}
    (want,) = ReferenceEvaluator(proto).run(None, feeds)
    (got,) = ReferenceEvaluator(ir.to_proto(simpler)).run(None, feeds)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # a few sums of float32, in another order


def test_small_constants_stay_known() -> None:
    model = ir.from_proto(call("GroupNormalization", [X, SCALE, SCALE], {"num_groups": 2}, 24))
    node = next(iter(model.graph))
    node.inputs[1].const_value = ir.tensor(SCALE, name="x1")
    simpler = body(node, 24)
    assert simpler is not None
    assert [value.name for value in simpler.graph.inputs] == ["x0", "x2"]
    np.testing.assert_array_equal(simpler.graph.initializers["x1"].const_value.numpy(), SCALE)


def test_an_optional_output_that_the_body_leaves_out_is_left_out() -> None:
    values = {"q": (1, 2, 3, 4), "k": (1, 2, 5, 4), "v": (1, 2, 5, 4)}
    node = onnx.helper.make_node("Attention", list(values), ["y", "present_key"])
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in values.items()]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "one", inputs, [output])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)]))
    simpler = body(next(iter(model.graph)), 24)
    assert simpler is not None
    assert "y" in [value.name for value in simpler.graph.outputs]


def test_an_operator_without_a_body_has_none() -> None:
    node = next(iter(ir.from_proto(call("MatMul", [X, X], {}, 24)).graph))
    assert not has_body(node)
    assert body(node, 24) is None
