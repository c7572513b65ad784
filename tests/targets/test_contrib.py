"""Operators of ``com.microsoft`` compiled: one form of each, many in one artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import compose, helper

import xopt
from tests.ir.contrib import DOMAIN, below, int32, int64, loaded, model_of, normal, positive
from xopt.ir import canonicalize
from xopt.runtime.reference import ReferenceSession

U8, I8 = np.uint8, np.int8


def bytes_of(kind: Any, *shape: int) -> np.ndarray:
    return below(256, *shape, dtype=np.uint8).view(kind)


def one(number: float) -> np.ndarray:
    return np.asarray(number, np.float32)


def grid(scale: float, zero: int) -> list[np.ndarray]:
    return [one(scale), np.asarray(zero, U8)]


A, Y, PROBABILITIES = grid(0.05, 120), grid(0.1, 100), grid(1 / 256, 0)
TABLES = [normal(12, 8), normal(12, 8)]
SHOWN = int32([1, 1, 1, 0, 0], [1, 1, 1, 1, 1])
PROJECTION = [normal(2, 5, 12), normal(12, 48) * one(0.3), normal(48)]
WEIGHTS = (below(64, 8, 5) - 32).astype(I8)
CACHE = [normal(2, 2, 8, 16), normal(2, 2, 8, 16)]
Case = tuple[str, list[Any], Mapping[str, Any], Mapping[str, Any]]

FLOATS: list[Case] = [
    ("Gelu", [normal(2, 3, 8)], {}, {}),
    ("FastGelu", [normal(2, 3, 8), normal(8)], {}, {}),
    ("BiasGelu", [normal(2, 3, 8), normal(8)], {}, {}),
    ("QuickGelu", [normal(2, 3, 8)], {"alpha": 0.5}, {}),
    ("FusedMatMul", [normal(4, 2, 3, 5), normal(2, 3, 6, 5)], {"transBatchA": 1, "transB": 1, "alpha": 0.5}, {}),
    ("TransposeMatMul", [normal(3, 5, 4), normal(3, 6, 5)], {"transA": 1, "transB": 1}, {}),
    ("FusedGemm", [normal(3, 4), normal(4, 5), normal(5)], {"activation": "Tanh"}, {"constants": (1, 2)}),
    ("FusedConv", [normal(2, 3, 6, 6), normal(4, 3, 3, 3)], {"activation": "Relu"}, {"constants": (1,)}),
    (
        "SkipLayerNormalization",
        [normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8), normal(8)],
        {},
        {"outputs": ["y", "", "", "sum"], "constants": (2, 3, 4)},
    ),
    ("SkipSimplifiedLayerNormalization", [normal(2, 3, 8), normal(2, 3, 8), normal(8)], {}, {"constants": (2,)}),
    (
        "EmbedLayerNormalization",
        [below(9, 2, 5), None, normal(9, 8), normal(7, 8), None, normal(8), normal(8), SHOWN],
        {"mask_index_type": 1},
        {"outputs": ["y", "counts"], "constants": (2, 3, 5, 6)},
    ),
    ("Trilu", [normal(4, 5)], {}, {}),
    ("ExpandDims", [normal(2, 3), np.asarray(-1, np.int32)], {}, {"constants": (1,)}),
    ("Pad", [normal(2, 3), int64(1, 0, 0, 2)], {}, {"constants": (1,)}),
    ("GatherND", [normal(2, 3, 4), int32([0, 1], [1, 2])], {}, {}),
    ("GridSample", [normal(1, 2, 4, 4), normal(1, 3, 3, 2)], {}, {}),
]
ATTENTION: list[Case] = [
    ("Attention", [*PROJECTION, SHOWN], {"num_heads": 2}, {"constants": (1, 2)}),
    (
        "Attention",
        [*PROJECTION, None, normal(2, 2, 2, 3, 8)],
        {"num_heads": 2, "unidirectional": 1},
        {"constants": (1, 2), "outputs": ["y", "present"]},
    ),
    (
        "MultiHeadAttention",
        [normal(2, 5, 16), normal(2, 7, 16), normal(2, 7, 16), normal(48), below(2, 2, 7)],
        {"num_heads": 2},
        {"constants": (3,)},
    ),
    ("RotaryEmbedding", [normal(2, 5, 64), int64(3), *TABLES], {}, {"constants": (2, 3)}),
    (
        "GroupQueryAttention",
        [normal(2, 1, 64), normal(2, 1, 32), normal(2, 1, 32), *CACHE, int32(3, 6), int32(7), *TABLES],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
        {"outputs": ["y", "keys", "values"], "constants": (6, 7, 8)},
    ),
]
INTEGERS: list[Case] = [
    ("QLinearAdd", [bytes_of(U8, 2, 8), *A, bytes_of(U8, 8), *A, *Y], {}, {"constants": (1, 2, 4, 5, 6, 7)}),
    ("QLinearMul", [bytes_of(U8, 2, 8), *A, bytes_of(U8, 8), *A, *Y], {}, {"constants": (1, 2, 4, 5, 6, 7)}),
    ("QLinearSigmoid", [bytes_of(U8, 2, 8), *A, *PROBABILITIES], {}, {"constants": range(1, 5)}),
    ("QLinearLeakyRelu", [bytes_of(U8, 2, 8), *A, *Y], {}, {"constants": range(1, 5)}),
    ("QLinearSoftmax", [bytes_of(U8, 2, 8), *A, *PROBABILITIES], {"opset": 13}, {"constants": range(1, 5)}),
    ("QLinearAveragePool", [bytes_of(U8, 2, 3, 6, 6), *A, *Y], {"kernel_shape": [3, 3]}, {"constants": range(1, 5)}),
    ("QLinearGlobalAveragePool", [bytes_of(U8, 2, 3, 6, 6), *A, *Y], {}, {"constants": range(1, 5)}),
    (
        "QLinearConcat",
        [*Y, bytes_of(U8, 2, 3), *A, bytes_of(U8, 2, 4), *A],
        {"axis": 1},
        {"constants": (0, 1, 3, 4, 6, 7)},
    ),
    ("NhwcMaxPool", [bytes_of(U8, 2, 6, 6, 3)], {"kernel_shape": [3, 3]}, {}),
    ("QGemm", [bytes_of(U8, 3, 8), *A, WEIGHTS, one(0.02), np.asarray(0, I8)], {}, {"constants": range(1, 6)}),
    ("QuantizeLinear", [normal(2, 8), one(0.001), np.asarray(7, np.int16)], {}, {"constants": (1, 2)}),
    ("DequantizeLinear", [bytes_of(U8, 2, 8), *A], {}, {"constants": (1, 2)}),
    ("MatMulIntegerToFloat", [bytes_of(U8, 3, 8), WEIGHTS, one(0.05), positive(5)], {}, {"constants": range(1, 4)}),
    ("DynamicQuantizeMatMul", [normal(3, 8), WEIGHTS, one(0.02)], {}, {"constants": (1, 2)}),
    (
        "QAttention",
        [bytes_of(U8, 2, 5, 12), (below(64, 12, 48) - 32).astype(I8), normal(48), one(0.02), one(0.01), SHOWN, A[1]],
        {"num_heads": 2},
        {"constants": (1, 2, 3, 4, 6)},
    ),
    *(
        (
            "MatMulNBits",
            [normal(3, 40), bytes_of(U8, 6, 2, 4 * bits), positive(12) * one(0.1)],
            {"K": 40, "N": 6, "bits": bits, "block_size": 32},
            {"constants": (1, 2)},
        )
        for bits in (2, 4, 8)
    ),
]

EXPERTS: list[Any] = [normal(6, 32), normal(6, 4), normal(4, 32, 32), normal(4, 32), normal(4, 32, 16), normal(4, 32)]
NUMBERS = [bytes_of(U8, 4, 32, 16), positive(4, 32) * one(0.02), None, bytes_of(U8, 4, 32, 8), positive(4, 32)]
MORE: list[Case] = [
    ("MoE", EXPERTS, {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1}, {"constants": range(2, 6)}),
    (
        "QMoE",
        [*EXPERTS[:2], *NUMBERS],
        {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1},
        {"constants": (2, 3, 5, 6)},
    ),
    (
        "GatherBlockQuantized",
        [bytes_of(U8, 12, 32), below(12, 2, 3, dtype=np.int64), positive(12, 2)],
        {"block_size": 32},
        {"constants": (0, 2)},
    ),
    (
        "MatMulBnb4",
        [normal(3, 32), bytes_of(U8, 128), positive(16)],
        {"N": 8, "K": 32, "block_size": 16, "quant_type": 1},
        {"constants": (1, 2)},
    ),
    ("GatedRMSNorm", [normal(2, 3, 16), normal(4), normal(2, 3, 16)], {}, {}),
    ("BranchwiseRMSNorm", [normal(2, 3, 4, 8), normal(4, 8)], {}, {}),
    ("GatedAdd", [normal(2, 3, 8), normal(2, 3, 8), normal(2, 3, 1)], {}, {}),
    ("ScaledSiLU", [normal(2, 3, 8)], {"alpha": 0.7}, {}),
    ("UnfoldTensor", [normal(4, 7, 5)], {"size": 3, "dim": 1, "step": 2}, {"fixed": (0,)}),
    ("CDist", [normal(5, 8), normal(3, 8)], {"metric": "euclidean"}, {"fixed": (0, 1)}),
    (
        "CropAndResize",
        [normal(2, 3, 7, 6), np.float32([[0, 0, 1, 1], [-0.2, 0.3, 0.5, 1.3]]), below(2, 2), int32(3, 4)],
        {},
        {"constants": (3,), "fixed": (0, 1)},
    ),
    (
        "DecoderMaskedMultiHeadAttention",
        [normal(2, 1, 24), normal(2, 3, 7, 8), normal(2, 3, 7, 8)],
        {"num_heads": 3},
        {},
    ),
]
RATES = 1 / (1 + np.exp(-normal(2, 5, 2)))
STREAMS: list[Case] = [
    *(
        (
            "LinearAttention",
            [normal(2, 5, 16), normal(2, 5, 8) * one(0.5), normal(2, 5, 12), *rest],
            {"update_rule": rule, "q_num_heads": 4, "kv_num_heads": 2},
            {"outputs": ("y", "state"), "fixed": range(6) if rest else ()},
        )
        for rule, rest in (
            ("linear", []),
            ("gated_delta", [normal(2, 2, 4, 6), -positive(2, 5, 2), RATES]),
        )
    ),
    (
        "CausalConvWithState",
        [normal(2, 6, 5), normal(6, 1, 4), normal(6), normal(2, 6, 3)],
        {"activation": "silu"},
        {"outputs": ("y", "state"), "fixed": (1, 2, 3)},
    ),
    ("LinearAttentionGate", [normal(2, 5, 3), normal(3), normal(3)], {}, {}),
    (
        "MRotaryEmbedding",
        [normal(2, 5, 32), below(9, 3, 2, 5, dtype=np.int64), normal(9, 8), normal(9, 8)],
        {"mrope_section": [4, 2, 2], "mrope_layout": 1, "num_heads": 2},
        {"constants": (2, 3), "fixed": (1,)},
    ),
]
ELSEWHERE = """
    <ir_version: 8, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (float[2, 5, 6, 8] x, float[8] c, float[6, 3, 2, 4] w, float[3, 8] t, float[3, 5, 2] s, float[4, 16] table,
       float[2, 5, 12] q, float[12] qb, float[1, 3, 5, 5] p, float[4, 8] u, float[8] d, float[1, 3, 1, 1] e)
    => (float[a, b, f, h] y0, float[i, j, k, l] y1, float[m, n, o, r] y2, float[aa, ab, ac] y3, float[ad, ae] y4,
        float[af, ag, ah] y5, float[ai, aj, ak, al] y6, float[am, an, ao, ap] y7)
    <int64 rows = {6}, int64 columns = {9}>
    {
        y0 = com.microsoft.GroupNorm <groups: int = 4, activation: int = 1> (x, c, c)
        y1 = com.microsoft.SkipGroupNorm <groups: int = 2, activation: int = 0> (x, c, c, x)
        z = Slice (x, st, en, ax)
        y2 = com.microsoft.NhwcConv <kernel_shape: ints = [3, 2]> (z, w)
        y3 = com.microsoft.Rfft (t)
        y4 = com.microsoft.Irfft <signal_ndim: int = 1> (s)
        y5 = com.microsoft.ComplexMulConj (s, s)
        y6 = com.microsoft.RelativePositionBias <max_distance: int = 20> (table, rows, columns)
        y7 = com.microsoft.GatedRelativePositionBias <num_heads: int = 3> (q, qb, p, u, d, e)
    }
"""
"""What onnxruntime has on other devices only."""


@pytest.mark.slow
def test_what_onnxruntime_has_elsewhere(tmp_path: Path) -> None:
    """Compiled, against the standard operators that stand for it."""
    text = ELSEWHERE.replace("{9}>", "{9}, int64[1] st = {0}, int64[1] en = {4}, int64[1] ax = {3}>")
    model = loaded(onnx.parser.parse_model(text), tmp_path)
    feeds = {value.name: normal(*value.shape) for value in model.graph.inputs if value.name and value.shape}
    library = xopt.compile(model, output=tmp_path / "model.so", threads=1)
    canonicalize(model)
    want = ReferenceSession(model).run(feeds)
    for name, array in xopt.Session.load(library).run(feeds).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-4, atol=1e-4, err_msg=name)


def together(cases: list[Case]) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[np.ndarray]]:
    """One model of all operators, its feeds, and its outputs in onnxruntime."""
    graph, feeds, want = onnx.GraphProto(name="all"), {}, []
    for number, (op, inputs, attributes, form) in enumerate(cases):
        proto, given, outputs = model_of(op, inputs, attributes, **form)
        part = compose.add_prefix(proto, f"c{number}.").graph
        for name in ("node", "input", "output", "initializer"):
            getattr(graph, name).extend(getattr(part, name))
        feeds |= {f"c{number}.{name}": array for name, array in given.items()}
        want += outputs
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds, want


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [FLOATS, ATTENTION, INTEGERS, MORE, STREAMS],
    ids=["floats", "attention", "integers", "more", "streams"],
)
def test_compiled(cases: list[Case], tmp_path: Path) -> None:
    proto, feeds, want = together(cases)
    library = xopt.compile(loaded(proto, tmp_path), output=tmp_path / "model.so", threads=1)
    got = xopt.Session.load(library).run(feeds)
    for (name, one_), other in zip(got.items(), want, strict=True):
        assert (one_.dtype, one_.shape) == (other.dtype, other.shape), name
        if other.dtype.kind == "f":  # products of integers have other orders of float operations around them
            np.testing.assert_allclose(one_, other, rtol=1e-4, atol=1e-4, err_msg=name)
        else:  # ties that are rounded the other way
            assert np.abs(one_.astype(np.int64) - other.astype(np.int64)).max() <= 1, name
