from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.passes.exact import check_laws, ops, run
from xopt.passes import Deduplicate


@pytest.mark.parametrize("kind", builders.ZOO)
def test_laws_on_each_kind_of_model(kind: str) -> None:
    check_laws(Deduplicate(), builders.ZOO[kind]())


def add_branch(model: ir.Model, name: str, weight: np.ndarray) -> None:
    """Add ``name = Relu(MatMul(x, weight))`` as an output."""
    x = model.graph.inputs[0]
    tensor = ir.tensor(weight, name=f"{name}.weight")
    value = ir.Value(
        name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(weight.shape)
    )
    model.graph.register_initializer(value)
    product = ir.node("MatMul", [x, value])
    result = ir.node("Relu", product.outputs)
    for node, output in ((product, f"{name}.product"), (result, name)):
        node.outputs[0].name = output
        node.outputs[0].type = x.type
        node.outputs[0].shape = ir.Shape(["batch", weight.shape[1]])
        model.graph.append(node)
    model.graph.outputs.append(result.outputs[0])


def two_branches(first: np.ndarray, second: np.ndarray) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4]))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 24}, name="two"), ir_version=10)
    add_branch(model, "a", first)
    add_branch(model, "b", second)
    return model


def test_equal_weights_make_equal_nodes() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model = two_branches(weight, weight.copy())
    report = check_laws(Deduplicate(), model)
    assert ops(model) == {"MatMul": 1, "Relu": 2}
    assert report.numbers == {"initializers": 1, "bytes": weight.nbytes, "nodes": 1}
    assert report.reasons == {"graph-output": 1}


@pytest.mark.parametrize("other", [np.float32(-0.0), np.float32(1e-45), np.float64(0.0)])
def test_only_bitwise_equal_weights_are_shared(other: np.generic) -> None:
    weight = np.zeros((4, 3), np.float32)
    changed = weight.astype(other.dtype)
    changed[1, 1] = other
    model = two_branches(weight, weight.copy())
    model.graph.initializers["b.weight"].const_value = ir.tensor(changed, name="b.weight")
    found = Deduplicate().run(model, context=None)  # type: ignore[arg-type]
    assert found.rewritten == 0
    assert set(model.graph.initializers) == {"a.weight", "b.weight"}


def test_vectors_of_layers_stay_apart_unless_asked() -> None:
    model = builders.vit()
    for name in ("layers.0.norm1.weight", "layers.1.norm1.weight"):
        model.graph.initializers[name].const_value = ir.tensor(np.ones(32, np.float32), name=name)
    assert run(Deduplicate(), model.clone()).reasons.get("layer-parameter", 0) >= 1
    report = check_laws(Deduplicate(vectors=True), model)
    assert report.rewritten >= 1
    assert "layer-parameter" not in report.reasons


def test_random_nodes_and_subgraphs_are_not_shared() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 24]>
        g (float[2] x, bool c) => (float[2] y) {
            a = RandomNormalLike(x)
            b = RandomNormalLike(x)
            d = If(c) <
                then_branch = t () => (float[2] p) { p = Identity(x) },
                else_branch = e () => (float[2] q) { q = Neg(x) }>
            f = If(c) <
                then_branch = t2 () => (float[2] r) { r = Identity(x) },
                else_branch = e2 () => (float[2] s) { s = Neg(x) }>
            y = Sum(a, b, d, f)
        }"""
    )
    assert Deduplicate().run(model, context=None).rewritten == 0  # type: ignore[arg-type]


def test_minilm(minilm: ir.Model) -> None:
    report = check_laws(Deduplicate(), minilm)
    assert report.numbers["nodes"] == 0
    assert set(report.reasons) <= {"layer-parameter"}
