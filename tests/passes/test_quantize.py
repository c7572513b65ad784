"""The pass: the form it writes, what it computes, what it refuses and leaves in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import xopt.ir
from tests.acceptance import digits
from tests.ir import builders
from tests.passes.exact import fingerprint, ops
from tests.passes.quantizing import close, linear, one_layer, products, run, samples
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir import edit
from xopt.passes import Quantize
from xopt.pipeline import text
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.runtime.reference import ReferenceSession
from xopt.search.strength import weaker
from xopt.targets.base import cpu_features

COARSE = 0.005
"""Half a percent of the largest output: a quarter of what quantization itself costs."""
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", builders.ZOO)
def test_each_kind_of_model(kind: str) -> None:
    """Every product with a constant is rewritten, in the form that was agreed; random weights keep their direction."""
    model = builders.ZOO[kind]()
    before = ops(model)
    data = samples(model)
    original = ReferenceSession(model).run(data.inputs)
    report = run(model, data)
    assert report.rewritten == report.matched == len(products(model)) > 0
    assert ops(model)["MatMul"] == before["MatMul"]
    assert ops(model)["QuantizeLinear"] == report.numbers["values"] <= report.rewritten
    for name, wanted in original.items():
        got = ReferenceSession(model).run(data.inputs)[name]
        assert np.vdot(got, wanted) / np.linalg.norm(got) / np.linalg.norm(wanted) > 0.995
    assert run(model, data).reasons == {"already-quantized": report.matched}


@pytest.mark.parametrize("between", [[], ["Abs"], ["Abs", "Neg"], ["Relu"]])
def test_one_layer_by_the_textbook(between: list[str]) -> None:
    """Both signs, positive only, negative only, and many zeros; also beyond the calibrated range."""
    weight, x = normal(24, 5), normal(200, 24)
    model = one_layer(weight, *between)
    functions = {"Abs": np.abs, "Neg": np.negative, "Relu": lambda v: np.maximum(v, 0)}
    y, wide = x, 3 * x
    for op_type in between:
        y, wide = functions[op_type](y), functions[op_type](wide)
    run(model, Dataset({"x": x}))
    for feed, value in ((x, y), (3 * x, wide)):
        expected = linear(value, weight, float(y.min()), float(y.max()))
        found = ReferenceSession(model).run({"x": feed})["y"]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_values_and_weights_are_shared() -> None:
    model = builders.bert(layers=1)
    report = run(model)
    q, k, v, *_ = products(model)
    assert q.inputs[0] is k.inputs[0] is v.inputs[0]
    assert report.numbers == {"values": 4, "weights": 6}
    stream = edit.operand(edit.operand(edit.producer(q.inputs[0], "DequantizeLinear"), 0).producer(), 0)
    assert "Add" in [reader.op_type for reader in edit.consumers(stream)], "the residual stream stays float"


def test_golden_graph() -> None:
    model = one_layer(np.array([[1, -2], [0.5, 0]], np.float32), "Relu")
    run(model, Dataset({"x": np.array([[-1, 51], [25.5, 0]], np.float32)}))
    lines = []
    for node in model.graph:
        inputs = [f"{v.name}={c.tolist()}" if (c := edit.constant(v)) is not None else v.name for v in node.inputs if v]
        lines.append(f"{node.op_type}({', '.join(map(str, inputs))}) -> {node.outputs[0].name} {node.outputs[0].dtype}")
    assert lines == [
        "Relu(x) -> Relu_0_out FLOAT",
        "QuantizeLinear(Relu_0_out, Relu_0_out.scale=0.20000000298023224, Relu_0_out.zero_point=0)"
        " -> Relu_0_out.quantized UINT8",
        "DequantizeLinear(Relu_0_out.quantized, Relu_0_out.scale=0.20000000298023224, Relu_0_out.zero_point=0)"
        " -> Relu_0_out.dequantized FLOAT",
        "DequantizeLinear(w.int8=[[127, -127], [64, 0]], w.scale=[0.007874015718698502, 0.015748031437397003])"
        " -> w.dequantized FLOAT",
        "MatMul(Relu_0_out.dequantized, w.dequantized) -> y FLOAT",
    ]


def test_padding_is_not_calibrated_on() -> None:
    """A word that stands nowhere but in padding, however large, changes nothing."""
    models = [builders.bert(), builders.bert()]
    data = samples(models[0])
    ids, mask = data.inputs["input_ids"].copy(), data.inputs["attention_mask"]
    assert (mask == 0).any()
    ids[ids == 7] = 8
    plain = Dataset({"input_ids": np.where(mask == 0, 8, ids), "attention_mask": mask})
    loud = Dataset({"input_ids": np.where(mask == 0, 7, ids), "attention_mask": mask})
    for model, data in zip(models, (plain, loud)):
        words = model.graph.initializers["embeddings.word"]
        table = np.array(words.const_value.numpy())
        table[7] *= 1000
        words.const_value = ir.tensor(table, name=words.name)
        run(model, data)
    assert fingerprint(models[0]) == fingerprint(models[1])


def test_reasons() -> None:
    broken = normal(8, 3)
    broken[2, 1] = np.nan
    x = Dataset({"x": normal(10, 8)})
    assert run(one_layer(broken), x).reasons == {"weight-not-finite": 1}
    assert run(one_layer(normal(8, 3), "Log"), x).reasons == {"input-not-finite": 1}
    model = one_layer(normal(8, 3))
    before = fingerprint(model)
    assert run(model, x, skip="product").reasons == {"skipped": 1}
    assert fingerprint(model) == before


def test_skip() -> None:
    def left(*skip: str) -> list[str]:
        return [refusal.what for refusal in run(builders.vit(), skip=skip).refused]

    everything = [node.name for node in builders.vit().graph if node.op_type == "MatMul"]
    assert left("first", "last") == [everything[0], everything[-1]]
    assert left("layers.1.*") == [name for name in everything if name and name.startswith("layers.1.")]
    assert left("head.weight") == [everything[-1]]
    assert left("nothing") == []


def test_without_data() -> None:
    with pytest.raises(InputError, match=r"calibrated on real samples.*--data"):
        PassManager([Quantize()], instruments=[]).run(builders.vit(), PassContext())


def test_options() -> None:
    one = Quantize(share=0.5, skip=("first", "layers.*"))
    assert text.parse(text.render([one])) == [one]
    assert text.from_yaml(text.to_yaml([one])) == [one]
    assert text.parse("quantize{bits=8}") == [Quantize()]
    with pytest.raises(InputError, match="8"):
        Quantize(bits=4)
    assert weaker(Quantize(), 0.5) == Quantize(share=0.5)
    assert weaker(Quantize(), 0.0) is None


def test_same_input_same_graph() -> None:
    models = [builders.vit(), builders.vit()]
    for model in models:
        run(model, share=0.6)
    assert fingerprint(models[0]) == fingerprint(models[1])


def test_the_most_sensitive_layers_stay_in_float() -> None:
    """One neuron that is a thousand times louder than the others and does not matter: its layer is rounded to noise."""
    model = builders.vit(layers=3)
    for name, factor in (("layers.1.ffn.up.bias", 1e3), ("layers.1.ffn.down.weight", 1e-3)):
        value = model.graph.initializers[name]
        array = np.array(value.const_value.numpy())
        array[0] = abs(array[0]) * factor if array.ndim == 1 else array[0] * factor
        value.const_value = ir.tensor(array, name=name)
    loud = model.clone()
    report = run(model, share=0.9)
    assert "layers.1.ffn.down.matmul" in [refusal.what for refusal in report.refused]
    sizes = {node.name: np.prod(node.inputs[1].shape.numpy()) for node in loud.graph if node.op_type == "MatMul"}
    assert sum(sizes[name] for name in report.accepted) <= 0.9 * sum(sizes.values())
    assert run(loud, share=0.0).reasons == {"sensitive": len(sizes)}


def test_shapes_stay_symbolic() -> None:
    model = builders.bert()
    before = {node.name: str(node.inputs[0].shape) for node in model.graph if node.op_type == "MatMul"}
    run(model)
    assert {node.name: str(node.inputs[0].shape) for node in products(model)} == before
    assert "batch" in next(iter(before.values()))


@pytest.fixture(scope="module")
def digits_model() -> ir.Model:
    model = xopt.ir.load(digits.MODEL)
    xopt.ir.canonicalize(model)
    run(model, digits.splits()[0].take(256))
    return model


def test_digits_in_each_of_our_runtimes(digits_model: ir.Model, tmp_path: Path) -> None:
    """The written file is smaller, keeps its accuracy, and computes the same wherever it runs."""
    from xopt import Session, targets
    from xopt.ir.fx import run_with_values, to_fx

    test = digits.splits()[1]
    path = tmp_path / "digits.onnx"
    xopt.ir.save(digits_model, path)
    assert path.stat().st_size < 0.35 * digits.MODEL.stat().st_size
    expected = ReferenceSession(digits_model).run(test.inputs)
    assert np.mean(expected["logits"].argmax(1) == test.labels) > 0.98
    view = run_with_values(to_fx(digits_model), test.inputs)
    close({name: tensor.detach().numpy() for name, tensor in view.items()}, expected)
    compiled = targets.compile(digits_model, targets.get("cpu"), tmp_path / "model.so")
    close(Session.load(compiled).run(test.inputs), expected, median=COARSE)


@pytest.mark.skipif(not any("vnni" in name for name in cpu_features()), reason="without VNNI, OpenVINO saturates sums")
def test_digits_in_openvino(digits_model: ir.Model, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    test = digits.splits()[1]
    xopt.ir.save(digits_model, tmp_path / "digits.onnx")
    network = openvino.Core().compile_model(str(tmp_path / "digits.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    close({"logits": network(test.inputs)["logits"]}, ReferenceSession(digits_model).run(test.inputs))
