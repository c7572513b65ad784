"""The exported graph computes what the canonical one means, in onnxruntime and in OpenVINO, in a lean form."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from tests.ir import builders
from tests.ir.net import Net
from xopt.ir import export, ops, save
from xopt.ir.io import to_bytes
from xopt.runtime.reference import ReferenceSession

FLOAT32 = {"rtol": 1e-4, "atol": 2e-6}
"""Sums of at most a few hundred products of numbers near 1, in another order: a few 2**-23 of the largest."""


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True, initial=-1e300))
    total = e.sum(-1, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total > 0)


def attention(q, k, v, mask=None, *, causal=False, scale=1.0, softcap=0.0) -> np.ndarray:
    """Float64 attention over [B,H,S,d], one query head at a time, straight from the definition."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    repeat = q.shape[1] // k.shape[1]
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        scores = scale * q[b, h].astype(np.float64) @ k[b, h // repeat].astype(np.float64).T
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if mask is not None:
            full = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))[b, h]
            scores = np.where(full, scores, -np.inf) if mask.dtype == bool else scores + full
        if causal:
            scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
        blocked = np.all(scores == -np.inf, axis=-1, keepdims=True)
        out[b, h] = softmax(np.where(blocked, -np.inf, scores)) @ v[b, h // repeat]
        out[b, h][blocked[:, 0]] = 0
    return out


def flat(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def write(model: ir.Model, folder: Path) -> Path:
    path = folder / "model.onnx"
    save(model, path)
    return path


def _padded(random: np.random.Generator, hidden: float) -> np.ndarray:
    """Numbers for keys, some of them hidden; of the first sample the first two keys, of the last all."""
    mask = np.where(random.random((2, 1, 5, 7)) < 0.7, random.standard_normal((2, 1, 5, 7)), hidden).astype(np.float32)
    mask[0, ..., :2], mask[1, 0, 3] = hidden, hidden
    return mask


MASKS = {
    "none": None,
    "padding": lambda r: r.random((2, 1, 1, 7)) < 0.6,
    "rows": lambda r: r.random((2, 1, 5, 7)) < 0.5,
    "heads": lambda r: r.random((2, 4, 5, 7)) < 0.5,
    "bias": lambda r: r.standard_normal((1, 4, 5, 7)).astype(np.float32),
    "float": lambda r: np.where((r.random((5, 7)) < 0.5) | (np.arange(7) == 0), 0, -1e9).astype(np.float32),
    "infinite": lambda r: _padded(r, -np.inf),
    "lowest": lambda r: _padded(r, float(np.finfo(np.float32).min)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("groups", "dims"), [(4, 3), (2, 3), (1, 3), (4, 4), (2, 4)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", MASKS)
def test_attention(kind: str, causal: bool, groups: int, dims: int, dynamic: bool) -> None:
    random = np.random.default_rng(3)
    B, H, S, T, d, dv = 2, 4, 5, 7, 8, 6
    q, k, v = (
        random.standard_normal(s).astype(np.float32) for s in ((B, H, S, d), (B, groups, T, d), (B, groups, T, dv))
    )
    mask = MASKS[kind](random) if MASKS[kind] else None
    if mask is not None and mask.dtype == bool:
        mask[0] = False  # a sample that attends nothing at all
        mask[0, ..., -1 if not causal else 0] = random.random(mask.shape[1:-1]) < 0.5
    softcap = 3.0 if kind == "bias" else 0.0
    feeds = {"q": q, "k": k, "v": v} if dims == 4 else {"q": flat(q), "k": flat(k), "v": flat(v)}
    net = Net("attention")
    symbols = {"q": "S", "k": "T", "v": "T"}
    values = []
    for name, x in feeds.items():
        shape = list(x.shape)
        if dynamic:
            shape[0], shape[dims - 2] = "B", symbols[name]
        values.append(net.input(name, shape))
    if mask is not None:
        feeds["mask"] = mask
        shape = [
            (f"m{i}" if dynamic and (n != 1 and i != len(mask.shape) - 3) else n) for i, n in enumerate(mask.shape)
        ]
        values.append(net.input("mask", shape, ir.DataType.BOOL if mask.dtype == bool else ir.DataType.FLOAT))
    heads = {"q_num_heads": H, "kv_num_heads": groups} if dims == 3 else {}
    y = net.op("Attention", *values, scale=0.4, is_causal=int(causal), softcap=softcap, **heads)
    net.output(y, "y")
    got = ReferenceSession(net.build()).run(feeds)["y"]
    want = attention(q, k, v, mask, causal=causal, scale=0.4, softcap=softcap)
    np.testing.assert_allclose(got, flat(want) if dims == 3 else want, **FLOAT32)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("dims", [3, 4])
def test_rotary(dims: int, rotated: int, positions: bool, interleaved: int) -> None:
    random = np.random.default_rng(5)
    B, H, S, d = 2, 3, 5, 8
    x = random.standard_normal((B, S, H, d)).astype(np.float32)
    angle = random.standard_normal((11, rotated // 2) if positions else (B, S, rotated // 2))
    at = random.integers(0, 11, (B, S))
    feeds = {"x": x.reshape(B, S, H * d) if dims == 3 else x.transpose(0, 2, 1, 3)}
    feeds |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    net = Net("rotary")
    values = [net.input(name, array.shape) for name, array in feeds.items()]
    if positions:
        feeds["at"] = at
        values.append(net.input("at", at.shape, ir.DataType.INT64))
    options = {"num_heads": H} if dims == 3 else {}
    partial = rotated if rotated < d else 0
    y = net.op("RotaryEmbedding", *values, interleaved=interleaved, rotary_embedding_dim=partial, **options)
    net.output(y, "y")
    got = ReferenceSession(net.build()).run(feeds)["y"]

    turn = np.exp(1j * (angle[at] if positions else angle))[:, :, None]
    part = x[..., :rotated].astype(np.float64)
    real, imaginary = (part[..., 0::2], part[..., 1::2]) if interleaved else np.split(part, 2, axis=-1)
    turned = (real + 1j * imaginary) * turn
    want = x.astype(np.float64)
    if interleaved:
        want[..., 0:rotated:2], want[..., 1:rotated:2] = turned.real, turned.imag
    else:
        want[..., :rotated] = np.concatenate([turned.real, turned.imag], axis=-1)
    want = want.reshape(B, S, H * d) if dims == 3 else want.transpose(0, 2, 1, 3)
    np.testing.assert_allclose(got, want, **FLOAT32)


MODELS = {
    "vit": builders.vit,
    "bert": builders.bert,
    "llama": builders.llama,
    "gpt": builders.gpt,
    "alibi": partial(builders.biased, "alibi"),
    "swin": builders.swin,
    "cross": builders.cross,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_mean_the_same(name: str) -> None:
    """Against onnx's own reference evaluator, which knows every canonical op."""
    model = MODELS[name]()
    feeds = builders.feeds(model)
    want = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    got = ReferenceSession(model).run(feeds)
    for value, array in zip(got.values(), want):
        np.testing.assert_allclose(value, array, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_runs_in_openvino(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = MODELS[name]()
    feeds = builders.feeds(model)
    compiled = openvino.Core().compile_model(write(export(model), tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = compiled(feeds)
    for name_, array in ReferenceSession(model).run(feeds).items():
        np.testing.assert_allclose(got[name_], array, rtol=1e-3, atol=1e-4)


def test_model_is_left_alone() -> None:
    model = builders.llama()
    before = to_bytes(model)
    export(model)
    assert to_bytes(model) == before


def test_lean() -> None:
    """Four transposes a layer (queries, keys, values, result); what layers can share is there once."""
    one, three = (Counter(n.op_type for n in export(builders.gpt(layers=n)).graph) for n in (1, 3))
    assert (three - one)["Transpose"] == 2 * 4
    for shared in ("Where", "GreaterOrEqual", "Range", "And", "ReduceMax", "Shape", "Cast", "Unsqueeze"):
        assert three[shared] == one[shared], shared


def test_key_value_cache_is_written_as_what_it_means() -> None:
    net = Net("cache")
    q = net.input("q", [1, 2, 8])
    past = net.input("past", [1, 2, 3, 4])
    y = net.op("Attention", q, q, q, None, past, past, n=3, q_num_heads=2, kv_num_heads=2)
    net.output(y[0], "y")
    net.output(y[1], "present")
    model = net.build()
    written = export(model)
    assert "Attention" not in {node.op_type for node in written.graph}
    random = np.random.default_rng(0)
    shapes = {"q": (1, 2, 8), "past": (1, 2, 3, 4)}
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    want, got = (ReferenceEvaluator(ir.to_proto(m)).run(None, feeds) for m in (model, written))
    for mine, its in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)  # sums of at most five float32 numbers


@pytest.fixture
def swish_op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An xopt op for this test, whose body uses an op that runtimes lack."""
    body = onnx.parser.parse_function(
        '<domain: "xopt", opset_import: ["" : 24]> Scaled <factor: float>(x) => (y)'
        "{ s = Swish <alpha = 1.5> (x)  f = Constant <value_float: float = @factor> ()  y = Mul(s, f) }"
    )
    monkeypatch.setattr(ops, "FUNCTIONS", {"Scaled": ir.from_proto(body)})
    return "Scaled"


@pytest.mark.parametrize("inline", [False, True])
def test_xopt_ops(swish_op: str, inline: bool, tmp_path: Path) -> None:
    net = Net("op")
    x = net.input("x", ["N", 4])
    y = net.op("Identity", x)
    net.output(y, "y")
    model = net.build()
    node = y.producer()
    node.domain, node.op_type = "xopt", swish_op
    node.attributes["factor"] = ir.AttrFloat32("factor", 2.0)
    assert ops.add_function(model, swish_op) is ops.add_function(model, swish_op)
    exported = export(model, inline=inline)
    assert bool(exported.functions) is not inline
    data = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    session = onnxruntime.InferenceSession(to_bytes(exported), providers=["CPUExecutionProvider"])
    want = 2 * data / (1 + np.exp(-1.5 * data.astype(np.float64)))
    np.testing.assert_allclose(session.run(None, {"x": data})[0], want, **FLOAT32)
    if not inline:  # OpenVINO 2026.4 has no model-local functions
        return
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(write(exported, tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled({"x": data})["y"], want, **FLOAT32)


def test_integers_through_relu(tmp_path: Path) -> None:
    """onnxruntime runs it by its function body, but only at the opset of that body."""
    net = Net("integers")
    net.output(net.op("Relu", net.input("x", [3], ir.DataType.INT64)), "y")
    path = tmp_path / "relu.onnx"
    save(export(net.build()), path)
    (result,) = onnxruntime.InferenceSession(path).run(None, {"x": np.array([-2, 0, 3])})
    np.testing.assert_array_equal(result, [0, 0, 3])
