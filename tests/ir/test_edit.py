"""The graph edits that everything else is made of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import feeds_of, model_of
from xopt.errors import InternalError
from xopt.ir import edit
from xopt.runtime.reference import ReferenceSession

WEIGHT = "<float[4] w = {1, 2, 3, 4}, float two = {2.0}>"


@pytest.fixture
def model() -> ir.Model:
    return model_of(f"(float[B, 4] x) => (float[B, 4] y) {WEIGHT}", "a = Mul(x, w) b = Add(a, two) y = Relu(b)")


def run(model: ir.Model) -> np.ndarray:
    return ReferenceSession(model).run(feeds_of(model))["y"]


def test_looking(model: ir.Model) -> None:
    product, total, relu = model.graph
    assert edit.producer(relu.inputs[0], "Add") is total
    assert edit.producer(relu.inputs[0], "Mul") is None
    assert edit.producer(model.graph.inputs[0], "Mul") is None
    assert edit.consumers(product.outputs[0]) == [total]
    assert edit.scalar(total.inputs[1]) == 2.0
    assert edit.scalar(product.inputs[1]) is None
    assert edit.scalar(product.outputs[0]) is None
    assert edit.constant(product.inputs[1]).tolist() == [1, 2, 3, 4]
    assert edit.constant(model.graph.inputs[0]) is None
    assert edit.input_at(relu, 1) is None
    with pytest.raises(InternalError):
        edit.operand(relu, 1)


def test_inserted_names_are_unique(model: ir.Model) -> None:
    site = model.graph[2]
    values = [edit.insert(site, "Neg", [site.inputs[0]], name=name) for name in ("a", "a", "y", "w", None, None)]
    values += edit.insert_many(site, "Split", [site.inputs[0]], {"axis": -1, "num_outputs": 2}, 2)
    values += [edit.initializer(model.graph, "w", np.zeros(3, np.float32)), edit.initializer(model.graph, "b", [1])]
    names = [value.name for value in values] + ["x", "y", "a", "b", "w", "two"]
    assert len(set(names)) == len(names)
    nodes = [node.name for node in model.graph if node.name]
    assert len(nodes) == 7
    assert len(set(nodes)) == len(nodes)
    assert list(model.graph)[-1] is site


def test_replace_in_the_middle(model: ir.Model) -> None:
    want = np.maximum(2 * feeds_of(model)["x"] * [1, 2, 3, 4] + 2, 0)
    product = model.graph[0].outputs[0]
    doubled = edit.insert(model.graph[1], "Add", [product, product])
    model.graph[2].replace_input_with(0, doubled)
    np.testing.assert_allclose(run(model), want, rtol=1e-6)
    edit.replace_uses(doubled, product)
    assert edit.remove_dead(model) == 1
    np.testing.assert_allclose(run(model), np.maximum(feeds_of(model)["x"] * [1, 2, 3, 4] + 2, 0), rtol=1e-6)


@pytest.mark.parametrize("what", ["computed", "input", "initializer", "other output"])
def test_output_keeps_its_name(what: str) -> None:
    model = model_of(f"(float[4] x) => (float[4] y, float[4] z) {WEIGHT}", "r = Relu(x) y = Neg(r) z = Exp(x)")
    new = {
        "computed": model.graph[0].outputs[0],
        "input": model.graph.inputs[0],
        "initializer": model.graph.initializers["w"],
        "other output": model.graph.outputs[1],
    }[what]
    x = feeds_of(model)["x"]
    edit.replace_uses(model.graph.outputs[0], new)
    edit.remove_dead(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    want = {"computed": np.maximum(x, 0), "input": x, "initializer": [1, 2, 3, 4], "other output": np.exp(x)}[what]
    np.testing.assert_allclose(run(model), want, rtol=1e-6)


def test_an_input_cannot_be_replaced_as_an_output(model: ir.Model) -> None:
    model.graph.outputs[0] = model.graph.inputs[0]
    with pytest.raises(InternalError):
        edit.replace_uses(model.graph.inputs[0], model.graph[0].outputs[0])


def test_replace_initializer(model: ir.Model) -> None:
    want = run(model)
    old = model.graph.initializers["w"]
    new = edit.replace_initializer(model.graph, old, np.array([[1, 2, 3, 4]], np.float32))
    assert new.name == "w"
    assert not old.uses()
    assert str(new.shape) == "[1,4]"
    edit.replace_initializer(model.graph, new, np.array([1, 2, 3, 4], np.float32))
    np.testing.assert_array_equal(run(model), want)


def test_attributes(model: ir.Model) -> None:
    node = model.graph[2]
    assert edit.attribute(node, "alpha", 3.0) == 3.0
    edit.set_attributes(node, alpha=1.5, axes=[1, 2], mode="x")
    assert edit.attribute(node, "alpha") == 1.5
    assert node.attributes["axes"].value == (1, 2)


def test_sweep_skips_what_an_earlier_call_made_useless() -> None:
    model = model_of("(float[4] x) => (float[4] y)", "a = Neg(x) b = Neg(a) c = Neg(b) y = Relu(c)")
    seen: list[str] = []

    def skip_two(node: ir.Node) -> bool:
        seen.append(node.outputs[0].name)
        inner = edit.producer(node.inputs[0], "Neg")
        if inner is None:
            return False
        edit.replace_uses(node.outputs[0], inner.inputs[0])
        return True

    assert edit.sweep(model, ("Neg",), skip_two) == 1
    assert seen == ["a", "b", "c"]
    assert edit.remove_dead(model) == 2
