"""Graphs that are in 8 bits already, ours and other tools': exact passes and analyses see through, and keep them so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import xopt.ir
from tests.ir import builders
from tests.passes import quantizing
from tests.passes.exact import check_laws, ops
from tests.passes.exact import run as run_exact
from tests.passes.quantizing import close, products, samples
from tests.targets.running import execute
from xopt import targets
from xopt.data.dataset import Dataset
from xopt.ir import edit
from xopt.ir.cost import cost
from xopt.ir.dependency import channel_groups, uncuttable
from xopt.ir.structure import token_layout, transformer_blocks
from xopt.passes import Canonicalize, Deduplicate, EliminateDead, FoldConstants, FuseQKV, MergeTokens, PruneHeads
from xopt.pipeline.base import Pass
from xopt.pipeline.context import PassContext
from xopt.pipeline.verify import QUANTIZED_COSINE, least_cosine
from xopt.runtime.reference import ReferenceSession
from xopt.targets.lowering import lower

EXACT = [Canonicalize(), FoldConstants(), Deduplicate(), Deduplicate(vectors=True), FuseQKV(), EliminateDead()]


def quantized(kind: str = "bert") -> ir.Model:
    model = builders.ZOO[kind]()
    quantizing.run(model)
    return model


def stored_types(model: ir.Model) -> list[Any]:
    """Types of the matrices that products read, sorted."""
    found = []
    for node in model.graph:
        if edit.is_op(node, "MatMul") and (weight := edit.producer(node.inputs[1], "DequantizeLinear")) is not None:
            found.append(weight.inputs[0].dtype)
    return found


@pytest.mark.parametrize("one", EXACT, ids=str)
@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "gpt", "cross"])
def test_exact_passes_keep_8_bits(one: Pass, kind: str) -> None:
    """Weights are small enough for constant folding here; float copies of them must not come back."""
    model = quantized(kind)
    before = cost(model)
    check_laws(one, model)
    after = cost(model)
    assert len(products(model)) == ops(model)["MatMul"]
    assert (after.macs, after.parameters) == (before.macs, before.parameters)
    assert after.bytes < 1.01 * before.bytes  # sizes of a Split may come, no float copy of a weight


def test_what_is_expected_of_two_runtimes() -> None:
    assert least_cosine(builders.bert()) is None
    assert least_cosine(quantized()) == QUANTIZED_COSINE


def test_qkv_is_fused_as_integers() -> None:
    model = quantized()
    feeds = samples(model).inputs
    expected = ReferenceSession(model).run(feeds)
    assert run_exact(FuseQKV(), model).rewritten == 2
    assert len(products(model)) == ops(model)["MatMul"] == 8
    close(ReferenceSession(model).run(feeds), expected, step=1e-5)


def test_qkv_in_several_forms_is_not_fused() -> None:
    left = builders.bert()
    quantizing.run(left, skip="layers.0.attention.k*")
    assert run_exact(FuseQKV(), left).reasons == {"nothing-to-fuse": 1}
    model = quantized()
    _, key, *_ = products(model)
    floating = np.zeros(key.inputs[1].shape.numpy(), np.float32)
    key.replace_input_with(1, edit.initializer(model.graph, "floating", floating))
    assert run_exact(FuseQKV(), model).reasons == {"quantized-differently": 1}


@pytest.mark.parametrize("kind", builders.ZOO)
def test_analyses(kind: str) -> None:
    plain, model = builders.ZOO[kind](), quantized(kind)
    assert token_layout(model) == token_layout(plain) or token_layout(model).padding_mask is not None
    names = [(b.attention and b.attention.node.name, b.ffn and b.ffn.width) for b in transformer_blocks(plain)]
    assert [(b.attention and b.attention.node.name, b.ffn and b.ffn.width) for b in transformer_blocks(model)] == names
    before, after = cost(plain), cost(model)
    assert (after.macs, after.per_block, after.parameters) == (before.macs, before.per_block, before.parameters)
    assert after.bytes < before.bytes
    assert channel_groups(model) == []
    assert {left.reason for left in uncuttable(model)} - {left.reason for left in uncuttable(plain)} >= {"quantized"}


def test_pruning_refuses_and_merging_works() -> None:
    model = quantized("vit")
    context = PassContext(calibration=samples(model))
    assert PruneHeads(ffn=True).run(model, context).reasons == {"quantized": 4}
    twin = builders.vit()
    assert str(MergeTokens().run(model, context)) == str(MergeTokens().run(twin, context))
    assert ReferenceSession(model).run(context.samples.inputs)["logits"].shape == (8, 10)


class Feeds:
    """Calibration data as onnxruntime's tools read it."""

    def __init__(self, data: Dataset) -> None:
        self.batches = data.batches(4)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def by_onnxruntime(
    model: ir.Model,
    data: Dataset,
    folder: Path,
    activations: str = "QUInt8",
    weights: str = "QInt8",
    per_channel: bool = True,
    linear_only: bool = False,
) -> ir.Model:
    """The model through ``quantize_static``, as loaded from the file that it writes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    source, path = folder / "float.onnx", folder / "int8.onnx"
    xopt.ir.save(xopt.ir.export(model), source)
    written = onnx.load(source)
    weighted = {tensor.name for tensor in written.graph.initializer}
    others = [node.name for node in written.graph.node if node.op_type != "MatMul" or node.input[1] not in weighted]
    CalibrationDataReader.register(Feeds)
    quantize_static(
        source,
        path,
        Feeds(data),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
        nodes_to_exclude=others if linear_only else [],
    )
    return xopt.ir.load(path)


@pytest.mark.slow
def test_everything_in_8_bits_by_onnxruntime(tmp_path: Path) -> None:
    """All that quantize_static can quantize, by its defaults: attention stays in parts, and all of it still runs.

    The tolerance is loose: onnxruntime computes fused parts of such a graph in another way than node by node.
    """
    model = builders.vit()
    data = samples(model)
    read = by_onnxruntime(model, data, tmp_path)
    expected = ReferenceSession(read).run(data.inputs)
    xopt.ir.canonicalize(read)
    close(ReferenceSession(read).run(data.inputs), expected, step=0.1, median=0.03)
    ours = execute(lower(read, targets.get("cpu")), data.inputs)
    close(dict(zip(expected, ours)), expected, step=0.1, median=0.03)


@pytest.mark.parametrize(
    ("kind", "activations", "weights", "per_channel"),
    [
        ("vit", "QUInt8", "QInt8", True),
        pytest.param("vit", "QInt8", "QInt8", True, marks=pytest.mark.slow),
        pytest.param("vit", "QUInt8", "QUInt8", False, marks=pytest.mark.slow),
        ("bert", "QUInt8", "QInt8", False),
    ],
)
def test_files_of_onnxruntime(kind: str, activations: str, weights: str, per_channel: bool, tmp_path: Path) -> None:
    """quantize_static on linear layers alone: canonical, compiled, and as accurate as onnxruntime runs it."""
    model = builders.ZOO[kind]()
    data = samples(model)
    read = by_onnxruntime(model, data, tmp_path, activations, weights, per_channel, linear_only=True)
    expected = ReferenceSession(read).run(data.inputs)
    xopt.ir.canonicalize(read)
    assert set(stored_types(read)) == {ir.DataType.INT8 if weights == "QInt8" else ir.DataType.UINT8}
    close(ReferenceSession(read).run(data.inputs), expected)
    names = list(expected)
    close(dict(zip(names, execute(lower(read, targets.get("cpu")), data.inputs))), expected, median=0.005)
    assert len(transformer_blocks(read)) == len(transformer_blocks(model))


def test_gemm_with_a_transposed_weight() -> None:
    """``Gemm(DQ(x), DQ(W [N, K]), DQ(bias int32), transB=1)``: the integers are transposed, the bias becomes float."""
    from tests.ir.net import Net

    random = np.random.default_rng(0)
    net = Net("gemm")
    x = net.input("x", ["batch", 6])
    step, zero = net.constant("step", np.float32(0.02)), net.constant("zero", np.uint8(128))
    rounded = net.op("DequantizeLinear", net.op("QuantizeLinear", x, step, zero), step, zero)
    scales = net.constant("scales", random.uniform(0.01, 0.02, 4).astype(np.float32))
    weight = net.op("DequantizeLinear", net.constant("w", random.integers(-127, 127, (4, 6)).astype(np.int8)), scales)
    weight.producer().attributes["axis"] = ir.AttrInt64("axis", 0)
    fine = net.constant("fine", np.float32(1e-3))
    bias = net.op("DequantizeLinear", net.constant("b", np.array([5, -3000, 7, 100000], np.int32)), fine)
    net.output(net.op("Gemm", rounded, weight, bias, transB=1), "y")
    model = net.build()
    feeds = {"x": random.standard_normal((5, 6)).astype(np.float32)}
    expected = ReferenceSession(model).run(feeds)["y"]
    xopt.ir.canonicalize(model)
    assert ops(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
    (node,) = (node for node in model.graph if node.op_type == "MatMul")
    dequantize = edit.producer(node.inputs[1], "DequantizeLinear")
    assert dequantize is not None
    assert edit.constant(dequantize.inputs[0]).shape == (6, 4)
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["y"], expected, rtol=1e-5, atol=1e-5)
