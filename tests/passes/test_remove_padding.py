"""Remove padding: real tokens keep their values, padding becomes zeros, and every runtime agrees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import openvino
import pytest

from tests.ir import builders
from tests.ir.net import Net
from xopt import targets
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir import export, save
from xopt.passes import FuseQKV, Quantize, RemovePadding
from xopt.pipeline import text
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session

LENGTHS = (9, 3, 1, 6)


def padded_feeds(model: ir.Model, *, left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    feeds = builders.feeds(model, {"batch": len(LENGTHS), "seq": max(LENGTHS)}, seed)
    position = np.arange(max(LENGTHS))[:: -1 if left else 1]
    feeds["attention_mask"] = (position < np.array(LENGTHS)[:, None]).astype(np.int64)
    return feeds


def tokens_out(model: ir.Model) -> ir.Model:
    """The model with the tokens behind its last block as a second output."""
    last = [node for node in model.graph if node.op_type == "LayerNormalization"][-1].outputs[0]
    model.graph.outputs.append(last)
    return model


def packed(model: ir.Model, *others) -> ir.Model:
    steps = PassManager([*others, RemovePadding()], instruments=[VerifyEach()]).run(
        model, PassContext(calibration=None)
    )
    assert not steps[-1].report.refused
    return model


@pytest.mark.parametrize(
    ("fused", "left"),
    [(True, True), (False, False), *(pytest.param(one, not one, marks=pytest.mark.slow) for one in (True, False))],
)
def test_real_tokens_keep_their_values_and_padding_is_zero(left: bool, fused: bool, tmp_path: Path) -> None:
    model = tokens_out(builders.bert(layers=2))
    feeds = padded_feeds(model, left=left)
    before = ReferenceSession(model).run(feeds)
    packed(model, *([FuseQKV()] if fused else []))
    shown = feeds["attention_mask"] != 0
    session = Session.load(targets.compile(model, "cpu", tmp_path / "model.so"))
    for after in (ReferenceSession(model).run(feeds), session.run(feeds)):
        for name, values in before.items():
            if values.ndim == 3:
                # Two layers of float32 sums in another order.
                np.testing.assert_allclose(after[name][shown], values[shown], rtol=1e-4, atol=1e-5)
                assert not after[name][~shown].any()
            else:
                np.testing.assert_allclose(after[name], values, rtol=1e-4, atol=1e-5)


def test_one_artifact_takes_any_lengths(tmp_path: Path) -> None:
    model = builders.bert(layers=1)
    expected = ReferenceSession(model)
    session = Session.load(targets.compile(packed(model.clone()), "cpu", tmp_path / "model.so"))
    random = np.random.default_rng(0)
    for batch, length in ((1, 1), (2, 30), (5, 7)):
        feeds = builders.feeds(model, {"batch": batch, "seq": length})
        lengths = random.integers(1, length + 1, batch)
        feeds["attention_mask"] = (np.arange(length) < lengths[:, None]).astype(np.int64)
        for name, values in expected.run(feeds).items():
            np.testing.assert_allclose(session.run(feeds)[name], values, rtol=1e-4, atol=1e-5)


def test_golden_graph() -> None:
    model = packed(builders.bert(layers=2))
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)
    assert ops["xopt::PackTokens"] == ops["xopt::UnpackTokens"] == 1
    assert ops["xopt::PackedAttention"] == 2 and not ops["Attention"]
    assert ops["MatMul"] == 12 and ops["LayerNormalization"] == 5


def test_openvino_runs_the_exported_model(tmp_path: Path) -> None:
    model = builders.bert(layers=1)
    feeds = padded_feeds(model)
    expected = ReferenceSession(model).run(feeds)
    save(export(packed(model), inline=True), tmp_path / "model.onnx")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", exact)(feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)


def test_with_low_precision(tmp_path: Path) -> None:
    model = builders.bert(layers=2)
    feeds = padded_feeds(model)
    exact = ReferenceSession(model).run(feeds)["embedding"]
    packed(model)
    machine = targets.configured("cpu", False, precision="bf16")
    found = Session.load(targets.compile(model, machine, tmp_path / "model.so")).run(feeds)["embedding"]
    assert np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()) < 10 * 2.0**-9


@pytest.mark.slow
def test_quantized_layers_are_packed_too(tmp_path: Path) -> None:
    model = builders.bert(layers=2)
    feeds = padded_feeds(model)
    Quantize().run(model, PassContext(calibration=Dataset(feeds)))
    expected = Session.load(targets.compile(model, "cpu", tmp_path / "padded.so")).run(feeds)["embedding"]
    report = RemovePadding().run(model, PassContext())
    assert report.rewritten == 2
    found = Session.load(targets.compile(model, "cpu", tmp_path / "packed.so")).run(feeds)["embedding"]
    # The kernels are the same; a value on the border between two steps may fall to either side.
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: builders.vit(layers=1), "no-padding-mask"),
        (lambda: builders.gpt(layers=1), "no-padding-mask"),
        (lambda: builders.llama(layers=1), None),
    ],
)
def test_models_without_padding_are_refused(model, reason: str | None) -> None:
    graph = model()
    before = ir.to_proto(graph).SerializeToString()
    report = RemovePadding().run(graph, PassContext())
    assert report.rewritten == 0 and ir.to_proto(graph).SerializeToString() == before
    assert all(refusal.reason == reason for refusal in report.refused) if reason else report.refused


def test_a_mask_of_more_keys_than_an_input_has_positions_is_not_its_padding() -> None:
    """Keys of an image beside those of a text, say: the text's mask with ones behind it."""
    net = Net("towers")
    mask, pixels = net.input("mask", ["batch", "seq"], ir.DataType.INT64), net.input("x", ["batch", "all", 8])
    ones = net.op("Expand", net.constant("one", np.int64(1)), net.op("Concat", *_batch_and_four(net, mask), axis=0))
    shown = net.op("Cast", net.op("Concat", mask, ones, axis=1), to=ir.DataType.BOOL)
    bias = net.op("Unsqueeze", shown, net.ints(1, 2))
    net.output(net.op("Attention", pixels, pixels, pixels, bias, q_num_heads=2, kv_num_heads=2), "y")
    model = net.build()
    assert RemovePadding().run(model, PassContext()).rewritten == 0


def _batch_and_four(net: Net, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    return net.op("Shape", mask, start=0, end=1), net.ints(4)


def test_no_attention() -> None:
    model = builders.bert(layers=1)
    for node in list(model.graph):
        if node.op_type == "Attention":
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node)
    with pytest.raises(InputError, match="E-NO-ATTENTION"):
        PassManager([RemovePadding()], instruments=[]).run(model, PassContext())


def test_a_second_run_changes_nothing() -> None:
    model = packed(builders.bert(layers=1))
    before = ir.to_proto(model).SerializeToString()
    assert RemovePadding().run(model, PassContext()).rewritten == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_options_round_trip() -> None:
    assert text.parse(text.render([RemovePadding()])) == [RemovePadding()]
    assert text.from_yaml(text.to_yaml([RemovePadding()])) == [RemovePadding()]
