"""The pass: whole models against an implementation from the papers' descriptions, costs, schedules and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import xopt.ir
from tests.ir import builders
from tests.ir.net import Net
from tests.passes import merging
from tests.passes.exact import fingerprint, ops
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.ir.cost import cost
from xopt.passes import FuseQKV, MergeTokens
from xopt.pipeline import text
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach
from xopt.runtime.reference import ReferenceSession

ROUNDING = 1e-4
"""Float32 against float64 through three blocks of width 32, logits of magnitude 1."""
DEIT_S = {"layers": 12, "width": 384, "heads": 6, "image": 224, "patch": 16, "classes": 1000}


def merge(model: ir.Model, **options: Any) -> PassReport:
    context = PassContext(calibration=Dataset(builders.feeds(model, {"batch": 4})))
    (step,) = PassManager([MergeTokens(**options)], instruments=[VerifyEach()]).run(model, context)
    return step.report


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


def token_counts(model: ir.Model) -> list[Any]:
    """Tokens after each merge."""
    return [node.outputs[0].shape[1] for node in model.graph if node.domain == "xopt" and node.outputs[0].shape]


@pytest.mark.parametrize("score", ["tome", "mctf"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_vit_computes_what_the_paper_describes(score: str, class_token: bool, fused: bool) -> None:
    """Two merges: the second works on tokens of unequal size; with and without the mean over tokens."""
    model = builders.vit(layers=3, class_token=class_token, image=24)
    names = weights(model)
    feeds = builders.feeds(model, {"batch": 3})
    amounts = [9, 5, 0] if score == "tome" else [8, 6, 0]
    expected = merging.vit(names, feeds["pixel_values"], 4, amounts, score)
    if fused:
        FuseQKV().run(model, PassContext())
    report = merge(model, score=score, schedule=amounts)
    assert report.numbers["merged"] == " ".join(str(r) for r in amounts[:2])
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["logits"], expected, atol=ROUNDING)


def test_no_merge_is_the_identity() -> None:
    model = builders.vit()
    expected = merging.vit(weights(model), builders.feeds(model)["pixel_values"], 4, [0, 0], "tome")
    np.testing.assert_allclose(ReferenceSession(model).run(builders.feeds(model))["logits"], expected, atol=ROUNDING)
    before = fingerprint(model)
    for options in ({"schedule": [0]}, {"schedule": [0, 0]}, {"ratio": 0.0}):
        report = merge(model, **options)
        assert (report.matched, report.rewritten) == (0, 0)
        assert fingerprint(model) == before


def test_equal_tokens_are_merged_without_loss() -> None:
    """All patches alike and no positions: an image of one colour."""
    model = builders.vit(layers=3)
    model.graph.initializers["positions"].const_value = ir.tensor(np.zeros((1, 17, 32), np.float32), name="positions")
    feeds = {"pixel_values": np.full((2, 3, 16, 16), 0.7, np.float32)}
    expected = ReferenceSession(model).run(feeds)["logits"]
    assert merge(model, schedule=4).rewritten == 3
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["logits"], expected, atol=1e-5)


def test_deit_small_with_13_at_each_block() -> None:
    model = builders.vit(**DEIT_S)  # type: ignore[arg-type]
    assert round(cost(model).macs / 1e9, 3) == 4.599
    report = MergeTokens(schedule=(13,)).run(model, PassContext())
    assert token_counts(model) == list(range(184, 40, -13))
    assert round(cost(model).macs / 1e9, 3) == 2.703
    assert report.numbers["tokens-before"] == 197
    assert report.numbers["tokens-after"] == 41


def test_schedules() -> None:
    def amounts(layers: int, **options: Any) -> tuple[str, list[int]]:
        model = builders.vit(layers=layers, width=8, heads=2, image=56)  # 197 tokens
        report = MergeTokens(**options).run(model, PassContext())
        return str(report.numbers["merged"]), token_counts(model)

    assert amounts(12, ratio=0.35, blocks=3)[0] == "68 45 29"
    assert amounts(2, ratio=0.1, blocks=9)[0] == "19 17"
    assert amounts(2, schedule=1000) == ("98 49", [99, 50])
    assert amounts(3, schedule=16, score="mctf") == ("16 16", [181, 165])
    assert amounts(3, schedule=[0, 7, 0]) == ("7", [190])
    assert amounts(2, schedule=[90, 90], protected=21) == ("88 44", [109, 65])
    with pytest.raises(InputError, match="3 numbers for 2 blocks"):
        amounts(2, schedule=[1, 2, 3])
    few = MergeTokens(score="mctf", schedule=(8, 8)).run(builders.vit(), PassContext())
    assert (few.numbers["merged"], few.reasons) == ("7", {"too-few-tokens": 1})


def test_mctf_merges_at_the_third_sixth_and_ninth_block() -> None:
    model = builders.vit(layers=12, width=8, heads=2, image=56)
    report = MergeTokens(score="mctf", ratio=0.35).run(model, PassContext())
    assert report.accepted == ["block 3", "block 6", "block 9"]


def test_size_reaches_attention_only_when_proportional() -> None:
    for proportional, expected in ((True, [3, 4, 4]), (False, [3, 3, 3])):
        model = builders.vit(layers=3)
        merge(model, schedule=[2, 2, 0], proportional=proportional)
        masks = [len(node.inputs) for node in model.graph if node.op_type == "Attention"]
        assert masks == expected
    assert ops(model)["MergeTokens"] == 2


def test_same_input_same_graph() -> None:
    models = [builders.vit(), builders.vit()]
    for model in models:
        merge(model)
    assert fingerprint(models[0]) == fingerprint(models[1])


REASONS = {
    "bert": "padding-mask",
    "bert-cls": "padding-mask",
    "bert-float-mask": "padding-mask",
    "llama": "causal",
    "llama-qk-norm": "causal",
    "llama-softcap": "causal",
    "gpt": "causal",
    "gpt-parallel": "causal",
    "relative": "position-bias",
    "table": "position-bias",
    "alibi": "causal",
    "swin": "position-bias",
    "cross": "causal",
}


@pytest.mark.parametrize("kind", builders.ZOO)
@pytest.mark.parametrize("score", ["tome", "mctf"])
def test_each_kind_of_model_is_merged_or_refused_with_a_reason(kind: str, score: str) -> None:
    model = builders.ZOO[kind]()
    before = fingerprint(model)
    report = merge(model, score=score, schedule=2)
    if kind in REASONS:
        assert REASONS[kind] in report.reasons
        assert report.rewritten == 0
        assert fingerprint(model) == before
    else:
        assert report.rewritten == report.matched > 0


def encoder(tail: str, *, tokens: int | str = 12, rotary: bool = False) -> ir.Model:
    """One attention and a residual sum over ``x [batch, tokens, 8]``, then a tail that reads the tokens."""
    net = Net(tail, 0)
    x = net.input("x", ["batch", tokens, 8])
    y = net.add(x, net.self_attention(net.layer_norm(x, "norm1", 8), "attention", 8, 2))
    y = net.add(y, net.feed_forward(net.layer_norm(y, "norm2", 8), "ffn", 8, 16))
    tails = {
        "all": lambda: y,
        "mean": lambda: net.op("ReduceMean", y, net.ints(1), keepdims=1),
        "cls": lambda: net.op("Slice", y, net.ints(0), net.ints(1), net.ints(1)),
        "second": lambda: net.op("Gather", y, net.scalar(1), axis=1),
        "maximum": lambda: net.op("ReduceMax", y, net.ints(1), keepdims=0),
        "positions": lambda: net.op("ReduceMean", net.add(y, net.weight("late", 1, 12, 8)), net.ints(1)),
        "skip": lambda: net.op("ReduceMean", net.add(y, net.op("Relu", x)), net.ints(1)),
        "flat": lambda: net.op("ReduceMean", net.op("Reshape", y, net.ints(0, -1, 4)), net.ints(1)),
    }
    net.output(tails[tail](), "out")
    return net.build()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("all", "output-keeps-tokens"),
        ("second", "head-reads-tokens"),
        ("maximum", "head-reads-tokens"),
        ("positions", "position-dependent"),
        ("skip", "mixes-with-unmerged-tokens"),
        ("flat", "read-by-reshape"),
        ("mean", None),
        ("cls", None),
    ],
)
def test_what_reads_the_tokens_decides(tail: str, reason: str | None) -> None:
    report = merge(encoder(tail), schedule=2)
    assert (report.rewritten, report.reasons) == ((0, {reason: 1}) if reason else (1, {}))


def test_protecting_the_second_token_lets_a_head_read_it() -> None:
    assert merge(encoder("second"), schedule=2, protected=2).rewritten == 1


def test_a_symbolic_token_count_takes_a_schedule() -> None:
    assert merge(encoder("mean", tokens="seq"), ratio=0.3).reasons == {"symbolic-token-count": 1}
    model = encoder("mean", tokens="seq")
    assert merge(model, schedule=2).rewritten == 1
    for count in (9, 14):
        feeds = {"x": np.random.default_rng(0).standard_normal((2, count, 8)).astype(np.float32)}
        assert ReferenceSession(model).run(feeds)["out"].shape == (2, 1, 8)


def test_a_second_run_is_refused() -> None:
    model = builders.vit(layers=3)
    merge(model, schedule=[0, 2, 0])
    assert merge(model, schedule=[2, 0, 0]).reasons == {"already-merged": 1}


@pytest.mark.parametrize("options", [{"schedule": [13, 0]}, {"score": "mctf", "ratio": 0.25, "tau_info": float("inf")}])
def test_options_round_trip(options: dict[str, Any]) -> None:
    one = MergeTokens(**options)
    assert text.parse(text.render([one])) == [one]
    assert text.from_yaml(text.to_yaml([one])) == [one]


@pytest.mark.parametrize("score", ["tome", "mctf"])
def test_openvino_runs_the_exported_model(score: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = builders.vit(layers=3)
    merge(model, score=score, schedule=[0, 3, 2])
    xopt.ir.save(xopt.ir.export(model, inline=True), tmp_path / "vit.onnx")
    feeds = builders.feeds(model)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(tmp_path / "vit.onnx", "CPU", exact)(feeds)["logits"]
    np.testing.assert_allclose(found, ReferenceSession(model).run(feeds)["logits"], atol=ROUNDING)


def classifiers() -> dict[str, Any]:
    """Image classifiers of transformers with random weights: what reads their tokens differs."""
    import transformers as hf

    size = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 16, "patch_size": 4, "attn_implementation": "sdpa",
    }  # fmt: skip
    clip = {key: value for key, value in size.items() if key != "attn_implementation"} | {"projection_dim": 8}
    return {
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**size)),
        "distilled-deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**size)),
        "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**size)),
        "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**size, use_relative_position_bias=True)),
        "clip": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**clip)),
    }


@pytest.mark.parametrize(
    ("name", "protected", "reason"),
    [
        ("vit", 1, None),
        pytest.param("distilled-deit", 2, None, marks=pytest.mark.slow),
        pytest.param("dinov2", 1, None, marks=pytest.mark.slow),
        pytest.param("beit", 1, "position-bias", marks=pytest.mark.slow),
        pytest.param("clip", 1, None, marks=pytest.mark.slow),
    ],
)
def test_classifiers_of_transformers(name: str, protected: int, reason: str | None, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")

    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = classifiers()[name]().eval()
            for label, parameter in self.model.named_parameters():
                if "relative_position" in label:
                    torch.nn.init.normal_(parameter)  # a fresh bias is zero, and zeros are removed

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values)[0]

    torch.manual_seed(0)
    images, path = torch.randn(2, 3, 16, 16), tmp_path / "model.onnx"
    options = {"input_names": ["pixel_values"], "output_names": ["logits"], "dynamo": False}
    torch.onnx.export(Logits(), (images,), path, dynamic_axes={"pixel_values": {0: "batch"}}, **options)
    model = xopt.ir.load(path)
    xopt.ir.canonicalize(model)
    if reason:
        assert reason in merge(model, schedule=3).reasons
        return
    assert merge(model, schedule=3).numbers["merged"] == "3 3"
    (node, *_) = (node for node in model.graph if node.op_type == "MergeTokens")
    assert node.attributes["protected"].as_int() == protected


def test_a_mean_without_the_class_token_heeds_sizes() -> None:
    """Pooling of the patches alone, as DINOv2 and MAE do: equal to the mean that the description gives."""
    net = Net("patches", 0)
    x = net.input("x", ["batch", 9, 8])
    token = net.op(
        "Expand", net.weight("class_token", 1, 1, 8), net.op("Concat", net.dimension(x, 0), net.ints(1, 8), axis=0)
    )
    x = net.op("Concat", token, x, axis=1)
    y = net.add(x, net.self_attention(net.layer_norm(x, "norm1", 8), "attention", 8, 2))
    rest = net.op("Slice", y, net.ints(1), net.ints(2**31 - 1), net.ints(1))
    net.output(net.op("ReduceMean", rest, net.ints(1), keepdims=0), "pooled")
    model = net.build()
    feeds = builders.feeds(model)
    expected = ReferenceSession(model).run(feeds)["pooled"]
    assert merge(model, schedule=3).rewritten == 1
    np.testing.assert_allclose(ReferenceSession(model).run(feeds)["pooled"], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["tome", "mctf"])
def test_the_compiled_model_equals_the_exported_one(score: str, tmp_path: Path) -> None:
    from xopt import targets
    from xopt.runtime.session import Session

    model = builders.vit(layers=3)
    merge(model, score=score, schedule=[0, 3, 2])
    session = Session.load(targets.compile(model, "cpu", tmp_path / "model.so"))
    for batch in (1, 3):
        feeds = builders.feeds(model, {"batch": batch})
        expected = ReferenceSession(model).run(feeds)["logits"]
        np.testing.assert_allclose(session.run(feeds)["logits"], expected, atol=ROUNDING)


@pytest.mark.parametrize(
    ("options", "tokens"), [({"ratio": 0.3}, 7), ({"score": "mctf", "ratio": 0.3, "blocks": 1}, 12)]
)
def test_trained_digits_keep_their_classes(options: dict[str, Any], tokens: int) -> None:
    """The bundled model, 17 tokens before, recognizes 99.6 % of all digits; merging leaves nearly all of them alone."""
    datasets = pytest.importorskip("sklearn.datasets")
    model = xopt.ir.load(Path(__file__).parents[2] / "examples" / "digits" / "digits_vit.onnx")
    xopt.ir.canonicalize(model)
    name = model.graph.inputs[0].name
    assert name
    images = (datasets.load_digits().images[:256, None] / 8 - 1).astype(np.float32)
    (before,) = ReferenceSession(model).run({name: images}).values()
    context = PassContext(calibration=Dataset({name: images}))
    (step,) = PassManager([MergeTokens(**options)], instruments=[VerifyEach()]).run(model, context)
    assert (step.report.numbers["tokens-before"], step.report.numbers["tokens-after"]) == (17, tokens)
    (after,) = ReferenceSession(model).run({name: images}).values()
    assert np.mean(before.argmax(-1) == after.argmax(-1)) >= 0.98
