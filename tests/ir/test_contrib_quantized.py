"""Operators of ``com.microsoft`` on quantized tensors, and weights of few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ir.contrib import RANDOM, below, canonical, check, int32, loaded, model_of, normal, positive
from xopt.errors import InputError
from xopt.ir import canonicalize

U8, I8 = np.uint8, np.int8
KINDS = [pytest.param(U8, 120, id="uint8"), pytest.param(I8, -3, id="int8")]
EXACT = {"tolerance": 1e-3}
"""Products of integers have other orders of float operations around them."""


def whole(kind: Any, *shape: int) -> np.ndarray:
    info = np.iinfo(kind)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(kind)


def small(*shape: int) -> np.ndarray:
    """Weights of 7 bits: sums of products of more saturate in onnxruntime on CPUs without VNNI."""
    return RANDOM.integers(-32, 32, shape).astype(I8)


def one(number: float) -> np.ndarray:
    return np.asarray(number, np.float32)


def grid(kind: Any, scale: float, zero: int) -> list[np.ndarray]:
    return [one(scale), np.asarray(zero, kind)]


@pytest.mark.parametrize(("kind", "zero"), KINDS)
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("shape", [(2, 3, 8), (8,)])
def test_arithmetic(op: str, kind: Any, zero: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    inputs = [whole(kind, 2, 3, 8), *grid(kind, 0.05, zero), whole(kind, *shape), *grid(kind, 0.02, zero + 5)]
    check(tmp_path, op, [*inputs, *grid(kind, 0.1, zero)], constants=(1, 2, 4, 5, 6, 7), steps=1)


@pytest.mark.parametrize(("kind", "zero"), KINDS)
@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("QLinearSigmoid", (2, 3, 8), {}),
        ("QLinearLeakyRelu", (2, 3, 8), {"alpha": 0.2}),
        ("QLinearSoftmax", (2, 3, 8), {"axis": -1, "opset": 13}),
        ("QLinearSoftmax", (2, 3, 8), {"axis": 1, "opset": 13}),
        ("QLinearSoftmax", (2, 3, 8), {"axis": 1, "opset": 11}),
        ("QLinearAveragePool", (2, 3, 6, 6), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (
            "QLinearAveragePool",
            (2, 6, 6, 3),
            {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1, "channels_last": 1},
        ),
        ("QLinearGlobalAveragePool", (2, 3, 6, 6), {}),
        ("QLinearGlobalAveragePool", (2, 6, 6, 3), {"channels_last": 1}),
    ],
)
def test_of_one_tensor(
    op: str, shape: tuple[int, ...], attributes: dict[str, Any], kind: Any, zero: int, tmp_path: Path
) -> None:
    y = grid(kind, 1 / 256, np.iinfo(kind).min) if op in ("QLinearSigmoid", "QLinearSoftmax") else grid(kind, 0.04, 7)
    inputs = [whole(kind, *shape), *grid(kind, 0.05, zero), *y]
    check(tmp_path, op, inputs, attributes, constants=(1, 2, 3, 4), steps=1)


@pytest.mark.parametrize(("kind", "zero"), KINDS)
def test_parts_and_choices(kind: Any, zero: int, tmp_path: Path) -> None:
    a, b, y = grid(kind, 0.05, zero), grid(kind, 0.2, zero + 3), grid(kind, 0.1, zero)
    parts = [*y, whole(kind, 2, 3), *a, whole(kind, 2, 4), *b]
    check(tmp_path, "QLinearConcat", parts, {"axis": 1}, constants=(0, 1, 3, 4, 6, 7), steps=1)
    choice = below(2, 2, 3, 8).astype(bool)
    inputs = [choice, whole(kind, 2, 3, 8), *a, whole(kind, 8), *b, *y]
    check(tmp_path, "QLinearWhere", inputs, constants=(2, 3, 5, 6, 7, 8), steps=1)


@pytest.mark.parametrize("kind", [U8, I8])
def test_maxima_with_channels_last(kind: Any, tmp_path: Path) -> None:
    check(tmp_path, "NhwcMaxPool", [whole(kind, 2, 6, 6, 3)], {"kernel_shape": [3, 3], "strides": [2, 2]})


def test_means(tmp_path: Path) -> None:
    """onnxruntime has no kernel for these."""
    x, (scale, zero), (y_scale, y_zero) = whole(U8, 2, 3, 8), grid(U8, 0.05, 120), grid(U8, 0.01, 100)
    mean = ((x.astype(np.float32) - 120) * scale).mean((0, 2))
    want = np.clip(np.round(mean / y_scale) + 100, 0, 255).astype(U8)
    attributes = {"axes": [0, 2], "keepdims": 0}
    got = canonical("QLinearReduceMean", [x, scale, zero, y_scale, y_zero], attributes, tmp_path, U8)
    assert got.dtype == want.dtype
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize(("kind", "zero"), KINDS)
def test_gemm(kind: Any, zero: int, tmp_path: Path) -> None:
    bias = below(1000, 5)
    inputs = [whole(kind, 3, 8), *grid(kind, 0.05, zero), small(8, 5), *grid(I8, 0.02, 0)]
    check(tmp_path, "QGemm", inputs, constants=range(1, 6), **EXACT)
    y = grid(kind, 1.0, zero)
    check(tmp_path, "QGemm", [*inputs, bias, *y], {"alpha": 0.5}, constants=range(1, 9), steps=1)
    columns = [whole(kind, 3, 8), *grid(kind, 0.05, zero), small(5, 8), positive(5), np.zeros(5, I8), bias]
    check(tmp_path, "QGemm", columns, {"transB": 1}, constants=range(1, 7), **EXACT)


@pytest.mark.parametrize("last", [0, 1])
def test_conv(last: int, tmp_path: Path) -> None:
    shape = (2, 6, 6, 3) if last else (2, 3, 6, 6)
    weights = [small(4, 3, 3, 3), positive(4) * np.float32(0.05), np.zeros(4, I8)]
    inputs = [whole(U8, *shape), *grid(U8, 0.05, 120), *weights, *grid(U8, 0.3, 100), below(100, 4)]
    attributes = {"pads": [1, 1, 1, 1], "channels_last": last}
    check(tmp_path, "QLinearConv", inputs, attributes, constants=range(1, 9), steps=1)


@pytest.mark.parametrize("kind", [U8, I8, np.uint16, np.int16])
def test_to_integers_and_back(kind: Any, tmp_path: Path) -> None:
    scale = 0.05 if np.dtype(kind).itemsize == 1 else 0.001
    check(tmp_path, "QuantizeLinear", [normal(2, 3, 8), *grid(kind, scale, 7)], constants=(1, 2))
    check(tmp_path, "DequantizeLinear", [whole(kind, 2, 3, 8), *grid(kind, scale, 7)], constants=(1, 2))
    columns = [positive(3), np.full(3, 7, kind)]
    check(tmp_path, "QuantizeLinear", [normal(2, 3, 8), *columns], {"axis": 1}, constants=(1, 2))
    check(tmp_path, "DequantizeLinear", [whole(kind, 2, 3, 8), *columns], {"axis": 1}, constants=(1, 2))


@pytest.mark.parametrize(("kind", "zero"), KINDS)
def test_products_of_integers(kind: Any, zero: int, tmp_path: Path) -> None:
    a, b = whole(kind, 2, 3, 8), small(8, 5)
    inputs = [a, b, one(0.05), one(0.02), np.asarray(zero, kind), np.asarray(0, I8), normal(5)]
    check(tmp_path, "MatMulIntegerToFloat", inputs, constants=range(1, 7), **EXACT)
    columns = [a, b, positive(1), positive(5), np.asarray([zero], kind), np.zeros(5, I8)]
    check(tmp_path, "MatMulIntegerToFloat", columns, constants=range(1, 6), **EXACT)


@pytest.mark.parametrize(
    "weight",
    [
        [small(8, 5), one(0.02), np.asarray(0, I8), normal(5)],
        [small(8, 5), positive(5), np.zeros(5, I8)],
        [below(64, 8, 5, dtype=U8), positive(1)],
    ],
    ids=["tensor", "columns", "uint8"],
)
def test_products_of_what_is_quantized_as_it_comes(weight: Any, tmp_path: Path) -> None:
    check(tmp_path, "DynamicQuantizeMatMul", [normal(2, 3, 8), *weight], constants=range(1, 5), **EXACT)


SHOWN = int32([1, 1, 1, 0, 0], [1, 1, 1, 1, 1])


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("past", [False, True])
def test_attention(columns: bool, past: bool, tmp_path: Path) -> None:
    scale, zero = (positive(48) * np.float32(0.01), np.zeros(48, I8)) if columns else (one(0.01), np.asarray(0, I8))
    inputs = [whole(U8, 2, 5, 12), small(12, 48), normal(48), one(0.02), scale, None if past else SHOWN]
    inputs += [np.asarray(120, U8), zero, *([normal(2, 2, 2, 3, 8)] if past else [])]
    attributes = {"num_heads": 2, "unidirectional": 1, "scale": 0.2}
    outputs = ["y", "present"] if past else ["y"]
    check(tmp_path, "QAttention", inputs, attributes, constants=(1, 2, 3, 4, 6, 7), outputs=outputs, **EXACT)


@pytest.mark.parametrize("segments", [False, True])
def test_embed_layer_norm(segments: bool, tmp_path: Path) -> None:
    tables = [whole(U8, *shape) for shape in ((9, 8), (7, 8), (2, 8), (8,), (8,))]
    scales = [one(number) for number in (0.02, 0.03, 0.01, 0.01, 0.02)]
    zeros = [np.asarray(number, U8) for number in (120, 110, 100, 0, 128)]
    inputs: list[Any] = [below(9, 2, 5), below(2, 2, 5), *tables, SHOWN, *scales, *zeros]
    for place in () if segments else (1, 4, 10, 15):
        inputs[place] = None
    attributes = {"epsilon": 1e-4}
    check(tmp_path, "QEmbedLayerNormalization", inputs, attributes, outputs=["y", "counts"])


# Weights of few bits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "block"), [(64, 16), (40, 32), (128, 128)])
def test_weights_in_blocks(bits: int, rows: int, block: int, tmp_path: Path) -> None:
    columns, blocks = 6, -(-rows // block)
    packed = whole(U8, columns, blocks, block * bits // 8)
    scales = positive(columns * blocks) * np.float32(0.1)
    zeros = whole(U8, columns * -(-blocks * bits // 8))
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    x = normal(2, 3, rows)
    for operands in (
        [x, packed, scales],
        [x, packed, scales.reshape(columns, -1), zeros, None, normal(columns)],
        *([[x, packed, scales, normal(columns * blocks)]] if bits < 8 else []),
        *([[x, packed, scales, None, below(blocks, rows)]] if bits == 4 else []),
    ):
        check(tmp_path, "MatMulNBits", operands, attributes, constants=range(1, 6), tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "number"), [("bits", 3), ("block_size", 0), ("K", 10**6), ("N", -1), ("weight_prepacked", 1)]
)
def test_blocks_that_cannot_be(name: str, number: int, tmp_path: Path) -> None:
    from onnx import helper

    attributes = {"K": 64, "N": 6, "bits": 4, "block_size": 16}
    inputs = [normal(2, 64), whole(U8, 6, 4, 8), positive(24)]
    proto, _, _ = model_of("MatMulNBits", inputs, attributes, constants=(1, 2))
    node = proto.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, number)])
    with pytest.raises(InputError) as caught:
        canonicalize(loaded(proto, tmp_path))
    assert caught.value.code == "E-UNSUPPORTED-OP"


@pytest.mark.parametrize("scale", [np.zeros((0,), np.float32), np.ones((2, 2), np.float32), np.ones(3, np.float32)])
def test_scales_that_cannot_be(scale: np.ndarray, tmp_path: Path) -> None:
    from onnx import numpy_helper

    proto, _, _ = model_of("QuantizeLinear", [normal(2, 8), *grid(U8, 0.05, 7)], constants=(1, 2))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(scale, "i1"))
    with pytest.raises(InputError):
        canonicalize(loaded(proto, tmp_path))
