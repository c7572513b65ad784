"""Matrix products, convolutions, pooling and their quantized kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xopt.ir.fx.layout import pad


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """``alpha * A' @ B' + beta * C``."""
    product = alpha * ((a.t() if transA else a) @ (b.t() if transB else b))
    return product if c is None else product + beta * c


def einsum(*operands: Tensor, equation: str) -> Tensor:
    """Sum of products by index names."""
    return torch.einsum(equation.replace(" ", ""), *operands)


def _window_pads(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[int]:
    """Padding [begins..., ends...] of the spatial axes."""
    if auto_pad in ("NOTSET", ""):
        return list(pads) if pads is not None else [0] * (2 * len(kernel))
    if auto_pad == "VALID":
        return [0] * (2 * len(kernel))
    totals = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return small + large if auto_pad == "SAME_UPPER" else large + small


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution of [N, C, ...] in 1 to 3 spatial axes, grouped, with any padding."""
    rank = x.ndim - 2
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    border = _window_pads(x, w.shape[2:], strides, dilations, pads, auto_pad)
    even = border[:rank] == border[rank:]
    if not even:
        x = pad(x, border, axes=list(range(2, x.ndim)))
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(x, w, b, strides, border[:rank] if even else 0, dilations, group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Transposed convolution of [N, C, ...] in 1 to 3 spatial axes, grouped; pads are cut off the result."""
    rank = x.ndim - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    whole = function(x, w, b, steps, 0, list(output_padding or [0] * rank), group, spread)
    border = list(pads or [0] * (2 * rank))
    return whole if not any(border) else pad(whole, [-n for n in border], axes=list(range(2, x.ndim)))


def conv_transpose_problem(
    *, auto_pad: str = "NOTSET", output_shape: Sequence[int] | None = None, **_: Any
) -> str | None:
    """Paddings that the sizes decide."""
    return "output_shape or auto_pad" if output_shape or auto_pad not in ("NOTSET", "") else None


def _windows(pooled: Tensor, x: Tensor, strides: Sequence[int], border: Sequence[int]) -> Tensor:
    """Without the windows of ``ceil_mode`` that start in the padding at the end."""
    for axis, (stride, before) in enumerate(zip(strides, border), start=2):
        pooled = pooled.narrow(axis, 0, min(pooled.shape[axis], -(-(x.shape[axis] + before) // stride)))
    return pooled


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    """Mean over windows; padding counts only with ``count_include_pad``."""
    rank = x.ndim - 2
    step, ones = list(strides or [1] * rank), [1] * rank
    border = _window_pads(x, kernel_shape, step, ones, pads, auto_pad)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    axes = list(range(2, x.ndim))
    total = pool(pad(x, border, axes=axes), list(kernel_shape), step, ceil_mode=bool(ceil_mode))
    inside = torch.ones_like(x[:1, :1])
    counted = pad(inside, border, 1.0 if count_include_pad else 0.0, axes=axes)
    mean = total / pool(counted, list(kernel_shape), step, ceil_mode=bool(ceil_mode))
    return _windows(mean, x, step, border)


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
) -> Tensor:
    """Maximum over windows."""
    rank = x.ndim - 2
    step, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    border = _window_pads(x, kernel_shape, step, spread, pads, auto_pad)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    padded = pad(x, border, float("-inf"), axes=list(range(2, x.ndim)))
    return _windows(pool(padded, list(kernel_shape), step, 0, spread, bool(ceil_mode)), x, step, border)


def global_average_pool(x: Tensor) -> Tensor:
    """Mean over all spatial axes, which are kept with size 1."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    """Maximum over all spatial axes, which are kept with size 1."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """A parameter per tensor or per channel, shaped to broadcast along ``axis``."""
    return (
        parameter
        if parameter.ndim != 1
        else parameter.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    )


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """``(x - zero) * scale`` per tensor or per channel."""
    shifted = x.to(scale.dtype) if zero is None else x.to(scale.dtype) - _along(zero, x, axis).to(scale.dtype)
    return shifted * _along(scale, x, axis)


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, saturate: int = 1) -> Tensor:
    """``saturate(round(x / scale) + zero)`` in the type of zero (uint8 without)."""
    target = torch.uint8 if zero is None else zero.dtype
    bounds = torch.iinfo(target)
    level = torch.round(x / _along(scale, x, axis))
    level = level if zero is None else level + _along(zero, x, axis).to(level.dtype)
    return level.clamp(bounds.min, bounds.max).to(target)


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Product of 8-bit integers in int32."""
    left = a.to(torch.int32) - (0 if a_zero is None else a_zero.to(torch.int32))
    right = b.to(torch.int32) - (0 if b_zero is None else b_zero.to(torch.int32))
    return left @ right


TABLE: dict[str, Callable[..., Any]] = {
    "AveragePool": average_pool,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DequantizeLinear": dequantize,
    "Einsum": einsum,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "MatMul": torch.matmul,
    "MatMulInteger": matmul_integer,
    "MaxPool": max_pool,
    "QuantizeLinear": quantize,
}
CHECKS: dict[str, Callable[..., str | None]] = {"ConvTranspose": conv_transpose_problem}
