"""Operators of ``com.microsoft`` around attention: norms of groups, regions, distances, Fourier transforms, biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ir.contrib import below, canonical, check, int32, int64, normal
from xopt.errors import InputError


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("GatedAdd", [normal(2, 3, 8), normal(2, 3, 8), normal(2, 3, 1)], {}),
        ("ScaledSiLU", [normal(2, 3, 8)], {"alpha": 0.7}),
        ("ScaledSiLU", [normal(2, 3, 8), normal(1).reshape(())], {}),
        ("GatedRMSNorm", [normal(2, 3, 16), normal(4), normal(2, 3, 16)], {"epsilon": 0.1}),
        ("GatedRMSNorm", [normal(2, 3, 16), normal(16), normal(2, 3, 16)], {"activation": "sigmoid"}),
        ("BranchwiseRMSNorm", [normal(2, 3, 4, 8), normal(8)], {"epsilon": 0.1}),
        ("BranchwiseRMSNorm", [normal(2, 3, 4, 8), normal(4, 8)], {}),
        ("BranchwiseRMSNorm", [normal(2, 3, 32), normal(32)], {"num_branches": 4}),
        ("BranchwiseRMSNorm", [normal(2, 3, 32)], {"num_branches": 4}),
        ("CDist", [normal(5, 8), normal(3, 8)], {}),
        ("CDist", [normal(5, 8), normal(3, 8)], {"metric": "euclidean"}),
        ("MatMulInteger16", [below(99, 3, 8, dtype=np.int16) - np.int16(50), below(99, 8, 4, dtype=np.int16)], {}),
    ],
)
def test_one_operator(op: str, inputs: Any, attributes: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, op, inputs, attributes)


@pytest.mark.parametrize("attributes", [{"size": 3, "dim": 1, "step": 2}, {"size": 2}, {"size": 4, "dim": 0}])
def test_windows(attributes: dict[str, int], tmp_path: Path) -> None:
    check(tmp_path, "UnfoldTensor", [normal(4, 7, 5)], attributes, fixed=(0,))


def test_counting(tmp_path: Path) -> None:
    check(tmp_path, "Range", [int64(2).reshape(()), int64(9).reshape(()), int64(3).reshape(())])
    check(tmp_path, "Range", [np.float32([0.5]), np.float32([4.0])], fixed=(0, 1))


REGIONS = np.float32([[0, 0, 1, 1], [0.2, 0.1, 0.7, 0.9], [-0.2, 0.3, 0.5, 1.3], [0.9, 0.8, 0.1, 0.2]])


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(3, 4), (1, 2)])
def test_regions(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    inputs = [normal(2, 3, 7, 6), REGIONS, below(2, 4), int32(*size)]
    attributes = {"mode": mode, "extrapolation_value": 0.25}
    check(tmp_path, "CropAndResize", inputs, attributes, constants=(3,), fixed=(0, 1), tolerance=1e-4)


# What onnxruntime has for other devices only


@pytest.mark.parametrize("last", [1, 0])
@pytest.mark.parametrize("activated", [0, 1])
def test_group_norm(last: int, activated: int, tmp_path: Path) -> None:
    x, gamma, beta = normal(2, 8, 5, 6), normal(8), normal(8)
    want = torch.nn.functional.group_norm(*map(torch.from_numpy, (x,)), 4, *map(torch.from_numpy, (gamma, beta)), 0.01)
    want = torch.nn.functional.silu(want) if activated else want
    attributes = {"groups": 4, "epsilon": 0.01, "activation": activated, "channels_last": last}
    got = canonical("GroupNorm", [x.transpose(0, 2, 3, 1) if last else x, gamma, beta], attributes, tmp_path)
    close(got.transpose(0, 3, 1, 2) if last else got, want.numpy())


@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (2, 1, 1, 8), (2, 8)])
def test_skip_group_norm(shape: tuple[int, ...], tmp_path: Path) -> None:
    x, gamma, beta, skip, bias = normal(2, 5, 6, 8), normal(8), normal(8), normal(*shape), normal(8)
    total = x + bias + (skip[:, None, None] if skip.ndim == 2 else skip)
    got = canonical("SkipGroupNorm", [x, gamma, beta, skip, bias], {"groups": 2, "activation": 0}, tmp_path)
    rows = torch.from_numpy(np.ascontiguousarray(total.transpose(0, 3, 1, 2)))
    want = torch.nn.functional.group_norm(rows, 2, torch.from_numpy(gamma), torch.from_numpy(beta), 1e-5)
    close(got.transpose(0, 3, 1, 2), want.numpy())


@pytest.mark.parametrize("op", ["NhwcConv", "NhwcFusedConv"])
def test_conv_with_channels_last(op: str, tmp_path: Path) -> None:
    """The weight of the first is turned, too: onnxruntime's tool writes it so."""
    x, w, b = normal(2, 6, 5, 4), normal(6, 2, 3, 2), normal(6)
    attributes: dict[str, Any] = {"group": 2, "pads": [1, 0, 1, 0], "strides": [2, 1], "kernel_shape": [3, 2]}
    attributes |= {"activation": "Relu"} if op == "NhwcFusedConv" else {}
    given = np.ascontiguousarray(w.transpose(0, 2, 3, 1)) if op == "NhwcConv" else w
    tensors = (torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), torch.from_numpy(w))
    want = torch.nn.functional.conv2d(*tensors, torch.from_numpy(b), (2, 1), (1, 0), groups=2).numpy()
    got = canonical(op, [x, given, b], attributes, tmp_path).transpose(0, 3, 1, 2)
    close(got, np.maximum(want, 0) if op == "NhwcFusedConv" else want)


@pytest.mark.parametrize("n", [8, 12, 2])
def test_fourier_transforms(n: int, tmp_path: Path) -> None:
    x, rounding = normal(3, n), 1e-4  # onnxruntime's, of lengths that are no powers of two
    spectrum = np.fft.rfft(x)
    pairs = np.stack([spectrum.real, spectrum.imag], -1).astype(np.float32)
    close(canonical("Rfft", [x], {"signal_ndim": 1}, tmp_path), pairs, rounding)
    close(canonical("Irfft", [pairs], {"signal_ndim": 1}, tmp_path), x, rounding)


def test_products_of_complex_numbers(tmp_path: Path) -> None:
    a, b = normal(3, 4, 2), normal(3, 4, 2)
    left, right = (x[..., 0] + 1j * x[..., 1] for x in (a, b))
    for op, want in (("ComplexMul", left * right), ("ComplexMulConj", left * right.conj())):
        close(canonical(op, [a, b], {}, tmp_path), np.stack([want.real, want.imag], -1))


def test_sums_before_a_softmax_or_a_dropout(tmp_path: Path) -> None:
    x, bias, residual = normal(2, 3, 8), normal(8), normal(2, 3, 8)
    close(canonical("BiasDropout", [x, bias, residual], {}, tmp_path), x + bias + residual)
    want = torch.softmax(torch.from_numpy(x + bias), -1).numpy()
    close(canonical("BiasSoftmax", [x, bias], {"axis": 2, "is_inner_broadcast": 0}, tmp_path), want)


def test_activated_product(tmp_path: Path) -> None:
    a, b = normal(2, 4, 3), normal(2, 4, 5)
    product = 0.5 * a.transpose(0, 2, 1) @ b
    attributes = {"activation": "LeakyRelu", "activation_alpha": 0.2, "alpha": 0.5, "transA": 1}
    got = canonical("FusedMatMulActivation", [a, b], attributes, tmp_path)
    close(got, np.where(product < 0, product * np.float32(0.2), product))


def test_products_of_integers(tmp_path: Path) -> None:
    a, b = below(256, 3, 8, dtype=np.uint8), below(256, 8, dtype=np.uint8)
    zeros = np.uint8(7), np.uint8(100)
    got = canonical("MulInteger", [a, np.asarray(zeros[0]), b, np.asarray(zeros[1])], {}, tmp_path, np.int32)
    np.testing.assert_array_equal(got, (a.astype(np.int32) - 7) * (b.astype(np.int32) - 100))


@pytest.mark.parametrize("both", [0, 1])
def test_relative_positions(both: int, tmp_path: Path) -> None:
    """As T5 of transformers."""
    from transformers.models.t5.modeling_t5 import T5Attention

    table, rows, columns = normal(4, 16), 40, 40 if both else 50
    distance = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    buckets = T5Attention._relative_position_bucket(distance, bidirectional=bool(both), num_buckets=16, max_distance=20)
    lengths = [np.asarray(size, np.int64) for size in (rows, columns)]
    attributes = {"is_bidirectional": both, "max_distance": 20}
    got = canonical("RelativePositionBias", [table, *lengths], attributes, tmp_path)
    close(got, table[:, buckets.numpy()][None])


def test_gated_relative_positions(tmp_path: Path) -> None:
    x, x_bias, positions = normal(2, 5, 12), normal(12), normal(1, 3, 5, 5)
    weight, bias, factor = normal(4, 8), normal(8), normal(1, 3, 1, 1)
    queries = (x + x_bias).reshape(2, 5, 3, 4).transpose(0, 2, 1, 3)
    gates = 1 / (1 + np.exp(-(queries @ weight + bias).reshape(2, 3, 5, 2, 4).sum(-1)))
    want = (gates[..., :1] * (gates[..., 1:] * factor - 1) + 2) * positions
    inputs = [x, x_bias, positions, weight, bias, factor]
    close(canonical("GatedRelativePositionBias", inputs, {"num_heads": 3}, tmp_path), want)


def test_rows_of_a_table(tmp_path: Path) -> None:
    table, rows = normal(9, 4), below(9, 2, 3, dtype=np.int64)
    close(canonical("TorchEmbedding", [table, rows], {}, tmp_path), table[rows])


def test_sums_of_bytes(tmp_path: Path) -> None:
    x = below(256, 2, 3, 8, dtype=np.uint8)
    got = canonical("ReduceSumInteger", [x], {"axes": [0, 2], "keepdims": 0}, tmp_path, np.int32)
    np.testing.assert_array_equal(got, x.astype(np.int32).sum((0, 2)))


def test_rotary_of_gemma(tmp_path: Path) -> None:
    angles, q, turned, k, k_turned = normal(2, 5, 8), *(normal(2, 3, 5, 8) for _ in range(4))
    got = canonical("GemmaRotaryEmbedding", [angles, q, turned, k, k_turned], {}, tmp_path)
    close(got, q * np.cos(angles)[:, None] + turned * np.sin(angles)[:, None])


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "word"),
    [
        ("UnfoldTensor", [normal(2, 90000)], {"size": 45000}, "a table of"),
        ("CropAndResize", [normal(1, 1, 4, 4), REGIONS, below(1, 4), int32(1 << 30, 1 << 30)], {}, "a table of"),
        ("CDist", [normal(3, 4), normal(3, 4)], {"metric": "cosine"}, "metric is 'cosine'"),
        ("Rfft", [normal(2, 2, 8)], {"signal_ndim": 2}, "signal_ndim is 2"),
        ("GroupNorm", [normal(1, 2, 2, 4), normal(4), normal(4)], {"groups": 2, "activation": 3}, "activation is 3"),
    ],
)
def test_what_is_refused(op: str, inputs: Any, attributes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=word) as caught:
        canonical(op, inputs, attributes, tmp_path, constants=(3,) if op == "CropAndResize" else ())
    assert caught.value.code == "E-UNSUPPORTED-OP"
