"""Whole graphs as torch modules: equal to onnxruntime, differentiable, open to hooks, weights written back."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.ir import builders
from tests.ir.net import Net
from xopt.errors import InputError
from xopt.ir.fx import as_tensors, run_with_values, to_fx, write_back
from xopt.runtime.reference import ReferenceSession

#: Two correct float32 evaluations of these small networks differ by some units in the last place of values near 1.
TOLERANCE = 2e-5


def assert_equals_onnxruntime(model: ir.Model, feeds: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    mine = run_with_values(to_fx(model), feeds)
    theirs = ReferenceSession(model).run(feeds)
    assert list(mine) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_allclose(mine[name].detach().numpy(), array, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", builders.ZOO)
def test_equals_onnxruntime_at_any_size(name: str) -> None:
    model = builders.ZOO[name]()
    assert_equals_onnxruntime(model, builders.feeds(model))
    assert_equals_onnxruntime(model, builders.feeds(model, {"batch": 3, "seq": 5, "source": 4}, seed=1))


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "table"])
def test_calling_the_module_is_running_it(name: str) -> None:
    model = builders.ZOO[name]()
    gm, feeds = to_fx(model), builders.feeds(model)
    for key, value in gm(*as_tensors(feeds).values()).items():
        assert torch.equal(value, run_with_values(gm, feeds)[key])


def test_a_copied_module_computes_the_same() -> None:
    model = builders.llama()
    gm, feeds = to_fx(model), builders.feeds(model)
    twin = copy.deepcopy(gm)
    assert torch.equal(run_with_values(twin, feeds)["logits"], run_with_values(gm, feeds)["logits"])


def test_parameters_are_the_floating_initializers_and_share_their_memory() -> None:
    model = builders.bert()
    gm = to_fx(model)
    floating = {n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    names = {attribute: name for name, attribute in gm.meta["weights"].items()}
    assert {names[attribute] for attribute, _ in gm.named_parameters()} == floating
    assert {names[attribute] for attribute, _ in gm.named_buffers()} == set(model.graph.initializers) - floating
    for attribute, parameter in gm.named_parameters():
        tensor = model.graph.initializers[names[attribute]].const_value
        assert tensor is not None
        assert np.shares_memory(parameter.detach().numpy(), tensor.numpy())
    assert not any(
        np.shares_memory(p.detach().numpy(), model.graph.initializers[names[a]].const_value.numpy())
        for a, p in to_fx(model, copy=True).named_parameters()
    )


def test_any_name_is_accepted() -> None:
    net = Net("names")
    x = net.input("x.1/y", ["batch", 2])
    total = x
    for name in ["a", "a.b", "a..c", "1 2", "forward", "weight.data", "onnx::MatMul_7", "class", "", "training"]:
        total = net.op("Add", total, net.constant(name or "_", np.ones(2, np.float32)), name=f"plus {name}")
    net.output(total, "sum/1")
    gm = to_fx(net.build())
    assert run_with_values(gm, {"x.1/y": np.zeros((1, 2), np.float32)})["sum/1"].tolist() == [[10.0, 10.0]]
    assert run_with_values(gm, {"x.1/y": np.zeros((1, 2), np.float32)}, ["a.b", "plus forward_out"])[
        "a.b"
    ].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["weight", "input", "computed value", "node", "attribute's tensor", "graph"])
@pytest.mark.parametrize("end", ["\n", "\r", "\f", "'", '"', "\\", "\0", "\u2028"])
def test_a_name_is_no_code(kind: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of which torch makes source that runs when the module is built or called, if it is given them."""
    monkeypatch.setattr(builtins, "XOPT_TEST_RAN", [], raising=False)
    hostile = f'training"){end}    XOPT_TEST_RAN[0:0]=[1]{end}    ("'

    def called(one: str) -> str:
        return hostile if one == kind else one.replace(" ", "")

    net = Net(called("graph"))
    x = net.input(called("input"), ["batch", 2])
    constant = net.op("Constant", value=ir.tensor(np.ones(2, np.float32)), name=called("attribute's tensor"))
    total = net.op("Add", x, net.constant(called("weight"), np.ones(2, np.float32)), name=called("node"))
    total.name = called("computed value")
    net.output(net.op("Add", total, constant), "y")
    gm = to_fx(net.build())
    (got,) = gm(torch.zeros(1, 2)).values()
    assert got.tolist() == [[2, 2]]
    assert builtins.XOPT_TEST_RAN == []  # type: ignore[attr-defined]
    assert all(node.name.isidentifier() and node.name.isascii() for node in gm.graph.nodes)
    assert all(name.isidentifier() and name.isascii() for name in gm.state_dict())


def test_half_precision_weights_keep_their_type_and_are_written_back() -> None:
    net = Net("halves")
    x = net.input("x", [2])
    for dtype, name in ((ml_dtypes.bfloat16, "b"), (np.float16, "h")):
        weight = net.constant(name, np.array([1.5, -2.0], dtype))
        x = net.op("Add", x, net.op("Cast", weight, to=ir.DataType.FLOAT))
    net.output(x, "y")
    model = net.build()
    gm = to_fx(model, copy=True)
    weights = {name: gm.get_parameter(attribute) for name, attribute in gm.meta["weights"].items()}
    assert (weights["b"].dtype, weights["h"].dtype) == (torch.bfloat16, torch.float16)
    with torch.no_grad():
        weights["b"].mul_(2)
    write_back(gm, model)
    tensor = model.graph.initializers["b"].const_value
    assert tensor is not None
    assert tensor.dtype == ir.DataType.BFLOAT16
    assert tensor.numpy().astype(np.float32).tolist() == [3.0, -4.0]


def test_named_values_are_those_of_onnxruntime() -> None:
    model = builders.gpt()
    names = ["layers.0.attention.attend_out", "layers.1.ffn.act_out", "layers.0.attention.split_out_1"]
    feeds = builders.feeds(model)
    mine = run_with_values(to_fx(model), feeds, [*names, "input_ids", "embeddings.word"])
    for node in list(model.graph):
        model.graph.outputs.extend(value for value in node.outputs if value.name in names)
    theirs = ReferenceSession(model).run(feeds)
    for name in names:
        np.testing.assert_allclose(mine[name].detach().numpy(), theirs[name], rtol=TOLERANCE, atol=TOLERANCE)
    assert mine["input_ids"].tolist() == feeds["input_ids"].tolist()
    assert mine["embeddings.word"].shape == (97, 32)


def test_an_intercepted_value_is_replaced_for_all_its_readers() -> None:
    """A mask on neurons in the forward pass is the same as zero rows of the down projection."""
    model, feeds = builders.bert(), None
    feeds = builders.feeds(model)
    mask = torch.ones(128)
    mask[10:90] = 0
    name = "layers.0.ffn.act_out"
    masked = run_with_values(to_fx(model), feeds, intercept={name: lambda h: h * mask})
    untouched = run_with_values(to_fx(model), feeds)
    gm = to_fx(model, copy=True)
    with torch.no_grad():
        gm.get_parameter(gm.meta["weights"]["layers.0.ffn.down.weight"])[10:90] = 0
    zeroed = run_with_values(gm, feeds)
    assert torch.allclose(masked["embedding"], zeroed["embedding"], atol=TOLERANCE)
    assert not torch.allclose(masked["embedding"], untouched["embedding"], atol=1e-2)
    seen = run_with_values(to_fx(model), feeds, [name], intercept={name: lambda h: h * mask})[name]
    assert not seen[..., 10:90].any()


def test_inputs_weights_and_outputs_can_be_intercepted() -> None:
    model = builders.vit()
    feeds = builders.feeds(model)
    gm = to_fx(model)
    zero = {"pixel_values": torch.zeros_like, "head.bias": torch.zeros_like}
    empty = run_with_values(gm, {"pixel_values": np.zeros_like(feeds["pixel_values"])})["logits"]
    bias = gm.get_parameter(gm.meta["weights"]["head.bias"])
    result = run_with_values(gm, feeds, intercept={**zero, "logits": lambda y: y + bias})
    assert torch.allclose(result["logits"], empty, atol=TOLERANCE)


def test_only_what_is_asked_for_is_computed() -> None:
    model = builders.vit()
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda value: calls.append(name) or value

    intercept = {name: note(name) for name in ("layers.0.ffn.act_out", "layers.1.ffn.act_out", "logits")}
    run_with_values(to_fx(model), builders.feeds(model), ["layers.0.ffn.down.add_out"], intercept)
    assert calls == ["layers.0.ffn.act_out"]


@pytest.mark.parametrize("name", ["vit", "bert", "llama-qk-norm", "table", "cross"])
def test_gradients_of_masks_and_weights_are_right(name: str) -> None:
    """In float64 against central differences, whose error is of the order of step^2 = 1e-10."""
    model = builders.ZOO[name]()
    gm = to_fx(model).double()
    feeds = {n: t.double() if t.is_floating_point() else t for n, t in as_tensors(builders.feeds(model)).items()}
    casts = [node for node in gm.graph.nodes if node.kwargs.get("to") == int(ir.DataType.FLOAT)]
    for node in casts:
        node.kwargs = {**node.kwargs, "to": int(ir.DataType.DOUBLE)}
    gm.recompile()
    gate = torch.ones(1, dtype=torch.float64, requires_grad=True)
    hooked = "layers.0.ffn.act_out"

    def loss() -> torch.Tensor:
        outputs = run_with_values(gm, feeds, intercept={hooked: lambda h: h * gate})
        return sum(((y * torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)) ** 2).sum() for y in outputs.values())

    weights = gm.meta["weights"]
    weight = gm.get_parameter(next(weights[name] for name in weights if name.endswith("attention.k.weight")))
    loss().backward()
    for tensor in (gate, weight):
        direction = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64).reshape(tensor.shape) + 0.1
        assert tensor.grad is not None
        slope = (tensor.grad * direction).sum()
        step = 1e-5
        with torch.no_grad():
            tensor.add_(direction, alpha=step)
            above = loss()
            tensor.sub_(direction, alpha=2 * step)
            below = loss()
            tensor.add_(direction, alpha=step)
        assert slope.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5)


def test_trained_weights_come_back_into_the_model() -> None:
    model = builders.vit()
    feeds = builders.feeds(model)
    before = ReferenceSession(model).run(feeds)["logits"]
    gm = to_fx(model, copy=True).train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    run_with_values(gm, feeds)["logits"].square().sum().backward()
    optimizer.step()
    assert np.array_equal(ReferenceSession(model).run(feeds)["logits"], before)
    write_back(gm, model)
    after = ReferenceSession(model).run(feeds)["logits"]
    np.testing.assert_allclose(after, run_with_values(gm, feeds)["logits"].detach().numpy(), atol=TOLERANCE)
    assert np.abs(after - before).max() > 1e-3


def test_weights_of_another_model_are_refused() -> None:
    gm = to_fx(builders.vit())
    for other in (builders.vit(width=16), builders.bert()):
        with pytest.raises(InputError, match="E-FORMAT"):
            write_back(gm, other)


def test_missing_data_and_unknown_names_are_input_errors() -> None:
    model = builders.bert()
    gm, feeds = to_fx(model), builders.feeds(model)
    with pytest.raises(InputError, match=r"E-DATA.*attention_mask"):
        run_with_values(gm, {"input_ids": feeds["input_ids"]})
    with pytest.raises(InputError, match=r"E-OPTION.*nonsense"):
        run_with_values(gm, feeds, ["nonsense"])
    with pytest.raises(InputError, match=r"E-OPTION.*nonsense"):
        run_with_values(gm, feeds, intercept={"nonsense": torch.zeros_like})


def scaled_sum() -> dict[ir.OperatorIdentifier, ir.Function]:
    """xopt::Twice(a) = xopt::Scaled(a, by=2.0); xopt::Scaled(a, b?; by=1.0) = LeakyRelu(a, alpha=by)."""

    def value(name: str) -> ir.Value:
        return ir.Value(name=name)

    a, b = value("a"), value("b")
    inner = ir.Node("", "LeakyRelu", [a], [ir.RefAttr("alpha", "by", ir.AttributeType.FLOAT)], name="inner")
    default = ir.Attr("by", ir.AttributeType.FLOAT, 3.0)
    body = ir.Graph([a, b], inner.outputs, nodes=[inner], opset_imports={"": 24})
    scaled = ir.Function("xopt", "Scaled", graph=body, attributes=[default])
    x = value("x")
    call = ir.Node("xopt", "Scaled", [x, None], [ir.AttrFloat32("by", 2.0)], name="call")
    body = ir.Graph([x], call.outputs, nodes=[call], opset_imports={"": 24, "xopt": 1})
    twice = ir.Function("xopt", "Twice", graph=body, attributes=[])
    return {function.identifier(): function for function in (scaled, twice)}


def test_calls_of_functions_are_expanded_with_their_attributes() -> None:
    x = ir.Value(name="x", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.FLOAT))
    default = ir.Node("xopt", "Scaled", [x], name="default")
    nested = ir.Node("xopt", "Twice", [default.outputs[0]], name="nested")
    nested.outputs[0].name, default.outputs[0].name = "y", "middle"
    graph = ir.Graph([x], nested.outputs, nodes=[default, nested], opset_imports={"": 24, "xopt": 1}, name="calls")
    gm = to_fx(ir.Model(graph, ir_version=11, functions=list(scaled_sum().values())))
    result = run_with_values(gm, {"x": np.array([1, -1, -2], np.float32)}, ["middle", "y"])
    assert result["middle"].tolist() == [1, -3, -6]
    assert result["y"].tolist() == [1, -6, -12]


@pytest.mark.parametrize("score", ["tome", "mctf"])
def test_merged_tokens_equal_onnxruntime_and_pass_gradients(score: str) -> None:
    from xopt.passes.merge_tokens import MergeTokens
    from xopt.pipeline.context import PassContext

    model = builders.vit(image=32)
    report = MergeTokens(score=score, schedule=(5,)).run(model, PassContext())
    assert report.rewritten > 0
    assert_equals_onnxruntime(model, builders.feeds(model))
    gm = to_fx(model)
    run_with_values(gm, builders.feeds(model))["logits"].square().sum().backward()
    weights = [gm.get_parameter(target) for name, target in gm.meta["weights"].items() if "layers.0.ffn" in name]
    assert weights
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights)


@pytest.mark.parametrize("form", [pytest.param("exported", marks=pytest.mark.slow), "canonical"])
def test_minilm_equals_onnxruntime(form: str, minilm_folder: Path, minilm_file: Path, minilm: ir.Model) -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)
    sentences = ["The weather is fine today.", "It is raining.", "He plays the cello in a large orchestra, and well."]
    tokens = tokenizer(sentences, return_tensors="np", padding=True)
    feeds = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    assert feeds["attention_mask"].min() == 0
    assert_equals_onnxruntime(ir.load(minilm_file) if form == "exported" else minilm, feeds)
