"""Shapes are inferred afresh, keep the model's names, and can be bound to numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.canonical import model_of
from xopt.errors import InputError
from xopt.ir import bind_dims, infer_shapes
from xopt.ir.shapes import equal_by_count, symbolic_dims
from xopt.runtime.reference import ReferenceSession


def shapes(model: ir.Model) -> dict[str, str]:
    return {value.name: str(value.shape) for node in model.graph for value in node.outputs}


def test_stale_shapes_are_replaced() -> None:
    model = builders.bert()
    infer_shapes(model)
    want = shapes(model)
    assert want["embeddings.norm_out"] == "[batch,seq,32]"
    for node in model.graph:
        for value in node.outputs:
            value.shape = ir.Shape([1, 2, 3, 4, 5])
            if not value.is_graph_output():
                value.type = ir.TensorType(ir.DataType.INT8)
    infer_shapes(model)
    assert shapes(model) == want


def test_names_of_dimensions_are_kept_through_shape_arithmetic() -> None:
    model = model_of(
        "(float[batch, tokens, 12] x) => (float[batch, tokens, 12] y) <int64[1] z = {0}, int64[1] u = {1}, "
        "int64[1] t = {2}, int64[1] h = {3}, int64[1] d = {4}, int64[1] w = {12}>",
        "s = Shape(x) a = Slice(s, z, t) c = Concat <axis: int = 0> (a, h, d) r = Reshape(x, c) "
        "p = Transpose <perm: ints = [0, 2, 1, 3]> (r) q = Transpose <perm: ints = [0, 2, 1, 3]> (p) "
        "e = Concat <axis: int = 0> (a, w) y = Reshape(q, e)",
    )
    infer_shapes(model)
    assert shapes(model)["p"] == "[batch,3,tokens,4]"
    assert shapes(model)["y"] == "[batch,tokens,12]"


def test_weights_are_untouched() -> None:
    model = builders.llama()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    inputs = list(model.graph.inputs)
    infer_shapes(model)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    assert list(model.graph.inputs) == inputs


def test_contradiction_is_refused_and_output_shapes_stay() -> None:
    model = model_of("(float[2, 3] x) => (float[2, 5] y) <float[4, 5] w>", "y = MatMul(x, w)")
    weight = model.graph.initializers.get("w") or model.graph.inputs[-1]
    weight.const_value = ir.tensor(np.zeros((4, 5), np.float32), name="w")
    with pytest.raises(InputError, match="E-FORMAT"):
        infer_shapes(model)
    assert str(model.graph.outputs[0].shape) == "[2,5]"


def test_bind() -> None:
    model = builders.bert()
    assert symbolic_dims(model) == ["batch", "seq"]
    bound = bind_dims(model, {"batch": 2, "seq": 9})
    assert symbolic_dims(bound) == []
    assert symbolic_dims(model) == ["batch", "seq"]
    assert all(value.shape.is_static() for node in bound.graph for value in node.outputs)
    feeds = builders.feeds(model)
    want = ReferenceSession(model).run(feeds)
    for name, array in ReferenceSession(bound).run(feeds).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6)


def test_bind_one_of_two() -> None:
    bound = bind_dims(builders.bert(), {"batch": 3})
    assert str(bound.graph.inputs[0].shape) == "[3,seq]"


@pytest.mark.parametrize("dims", [{"seqence": 3}, {"batch": 0}, {"batch": -1}])
def test_bind_refuses(dims: dict[str, int]) -> None:
    with pytest.raises(InputError, match="E-OPTION"):
        bind_dims(builders.bert(), dims)


def test_equal_by_count() -> None:
    n, m, unknown = ir.SymbolicDim("n"), ir.SymbolicDim("m"), ir.SymbolicDim(None)
    assert equal_by_count([n, 3, unknown], [n, 3, m])
    assert equal_by_count([n], [m])
    assert not equal_by_count([n, unknown], [m, unknown])
    assert not equal_by_count([n, 3], [n, 3, 1])
    assert not equal_by_count([2, 3], [3, 2])
