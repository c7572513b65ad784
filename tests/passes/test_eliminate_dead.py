from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.passes.exact import check_laws, ops
from xopt.passes import EliminateDead


@pytest.mark.parametrize("kind", builders.ZOO)
def test_laws_on_each_kind_of_model(kind: str) -> None:
    check_laws(EliminateDead(), builders.ZOO[kind]())


def test_what_nothing_reads_goes_and_inputs_stay() -> None:
    model = builders.vit()
    clean = ops(model)
    tensor = ir.tensor(np.ones((10, 10), np.float32), name="unused")
    model.graph.register_initializer(
        ir.Value(name="unused", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape((10, 10)))
    )
    logits = model.graph.outputs[0]
    chain = ir.node("Relu", [logits])
    end = ir.node("Softmax", chain.outputs)
    model.graph.extend([chain, end])
    model.graph.inputs.append(
        ir.Value(name="spare", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 3]))
    )
    model.graph.opset_imports["com.example"] = 1
    report = check_laws(EliminateDead(), model)
    assert report.numbers == {"nodes": 2, "initializers": 1, "functions": 0, "bytes": 400}
    assert ops(model) == clean
    assert [value.name for value in model.graph.inputs] == ["pixel_values", "spare"]
    assert "com.example" not in model.graph.opset_imports


def test_minilm_without_its_pooler(minilm: ir.Model) -> None:
    before = ops(minilm)
    minilm.graph.outputs[:] = [value for value in minilm.graph.outputs if value.name == "last_hidden_state"]
    report = check_laws(EliminateDead(), minilm)
    assert before - ops(minilm) == {"Gather": 1, "MatMul": 1, "Tanh": 1}
    assert report.numbers["bytes"] >= 4 * 384 * 384
