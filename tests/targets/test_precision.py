"""Whole models at bf16 and int8: close to their float reference, and no conversion between kernels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.ir import builders
from tests.targets.running import kernel_names
from xopt import targets
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir import export, save
from xopt.passes import Quantize
from xopt.pipeline.context import PassContext
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets.lowering import lower

MODELS = {
    "vit": lambda: builders.vit(layers=2, width=32, heads=4, fused=True),
    "bert": lambda: builders.bert(layers=2),
    "llama": lambda: builders.llama(layers=1),
    "gpt": lambda: builders.gpt(layers=2),
}


#: Vector units beside this machine's own are tried on one model; on the others when there is time.
CASES = [
    pytest.param(name, target, marks=() if name == "bert" or (target, name) == ("cpu", "gpt") else pytest.mark.slow)
    for name in MODELS
    for target in ("cpu", "cpu:avx2", "cpu:avx512")
]


def compiled(model: ir.Model, folder: Path, target: str = "cpu", precision: str = "fp32") -> Session:
    machine = targets.configured(target, database=False, precision=precision)
    return Session.load(targets.compile(model, machine, folder / "model.so"))


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest relative root mean square difference of an output."""
    return max(float(np.sqrt(((a[n] - b[n]) ** 2).mean() / (b[n] ** 2).mean())) for n in b)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_bf16_is_close_to_float32(name: str, target: str, tmp_path: Path) -> None:
    if not targets.get(target).can_run():
        pytest.skip(f"this machine cannot run {target}")
    model = MODELS[name]()
    session = compiled(model, tmp_path, target, "bf16")
    exact = ReferenceSession(model)
    for seed, dims in enumerate(({"batch": 2, "seq": 9}, {"batch": 3, "seq": 17})):
        feeds = builders.feeds(model, dims, seed)
        # Each of about ten roundings in a row has 2**-9 at most, of values that add up in no particular direction.
        assert distance(session.run(feeds), exact.run(feeds)) < 10 * 2.0**-9


def test_bf16_converts_only_what_no_kernel_computes() -> None:
    model = builders.bert(layers=2)
    names = kernel_names(lower(model, targets.configured("cpu", False, precision="bf16")))
    products = [name for name in names if name.startswith(("gemm", "attention"))]
    assert products and all("bfloat16" in name for name in products)
    assert not [name for name in names if name.startswith(("to_bfloat16", "from_bfloat16"))]


def test_precision_that_is_not_there() -> None:
    with pytest.raises(InputError, match="unknown precision 'fp4'"):
        targets.configured("cpu", precision="fp4")
    with pytest.raises(InputError, match="no kernels at bf16"):
        targets.configured("cuda", precision="bf16")


def quantized(model: ir.Model) -> tuple[ir.Model, dict[str, np.ndarray]]:
    feeds = builders.feeds(model, {"batch": 4, "seq": 9})
    Quantize().run(model, PassContext(calibration=Dataset(feeds)))
    return model, feeds


@pytest.mark.parametrize(("name", "target"), CASES)
def test_quantized_layers_give_what_onnxruntime_gives(name: str, target: str, tmp_path: Path) -> None:
    if not targets.get(target).can_run():
        pytest.skip(f"this machine cannot run {target}")
    float_model = MODELS[name]()
    reference = ReferenceSession(float_model)
    model, feeds = quantized(MODELS[name]())
    save(export(model), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    peer = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    theirs = dict(zip((o.name for o in peer.get_outputs()), peer.run(None, feeds)))
    ours = compiled(model, tmp_path, target).run(feeds)
    # A value on the border between two steps may fall to either side; the error of quantizing at all is the measure.
    error = distance(theirs, reference.run(feeds))
    assert distance(ours, theirs) < 0.5 * error < math.inf


def test_quantized_layers_are_multiplied_as_integers() -> None:
    model, _ = quantized(builders.vit(layers=2, width=32, heads=4, fused=True))
    names = kernel_names(lower(model, targets.get("cpu")))
    patches, *layers = [name for name in names if name.startswith("gemm")]
    assert "int8" not in patches and len(layers) == 2 * 4 + 1 and all("int8" in name for name in layers)
    # What the head reads was gathered: the one value that no kernel of ours computes.
    assert [name.split("_")[0] for name in names if "uint8" in name and name.startswith("to_")] == ["to"]
    assert not [name for name in names if "quantize" in name]


def test_weights_alone_in_eight_bits_become_float_once(tmp_path: Path) -> None:
    """Products whose activations are float read a matrix that is dequantized when the model is compiled."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["b", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    q = random.integers(-128, 128, (8, 12)).astype(np.int8)
    s = random.uniform(0.1, 1, 12).astype(np.float32)
    w, scale = (ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in (("w", q), ("s", s)))
    for value, array in ((w, q), (scale, s)):
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    dequantize = ir.node("DequantizeLinear", [w, scale], attributes={"axis": 1})
    product = ir.node("MatMul", [x, dequantize.outputs[0]])
    product.outputs[0].name = "y"
    for node in (dequantize, product):
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], product.outputs, nodes=[dequantize, product], initializers=[w, scale], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    assert [name.split("_")[0] for name in kernel_names(lower(model, targets.get("cpu")))] == ["gemm"]
    feeds = {"x": random.standard_normal((3, 8)).astype(np.float32)}
    found = compiled(model, tmp_path).run(feeds)["y"]
    np.testing.assert_allclose(found, feeds["x"] @ (q * s), rtol=1e-5, atol=1e-4)
