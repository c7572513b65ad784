"""Normalizations and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalize the axes from ``axis`` on to mean 0 and variance 1, then scale and shift."""
    extent = x.shape[axis:]
    if scale.shape == extent and (bias is None or bias.shape == extent):
        return F.layer_norm(x, extent, scale, bias, epsilon)
    normal = F.layer_norm(x, extent, None, None, epsilon) * scale
    return normal if bias is None else normal + bias


def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """Divide the axes from ``axis`` on by their root mean square, then scale."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """Affine map per channel (axis 1) by stored statistics."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    wide = torch.promote_types(x.dtype, variance.dtype)
    factor = scale.to(wide) * torch.rsqrt(variance.to(wide) + epsilon)
    shift = bias.to(wide) - mean.to(wide) * factor
    return (x.to(wide) * factor.reshape(shape) + shift.reshape(shape)).to(x.dtype)


def batch_norm_problem(*, training_mode: int = 0, **_: Any) -> str | None:
    """Statistics of the batch at hand make samples depend on each other."""
    return "training_mode" if training_mode else None


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalize each channel of each sample."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalize groups of channels of each sample."""
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the Lp norm along an axis; zeros stay."""
    norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def mean_variance_norm(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Normalize along axes to mean 0 and variance 1."""
    centred = x - x.mean(list(axes), keepdim=True)
    return centred / (centred.square().mean(list(axes), keepdim=True).sqrt() + 1e-9)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first largest element along an axis, else 0."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


TABLE: dict[str, Callable[..., Any]] = {
    "BatchNormalization": batch_norm,
    "GroupNormalization": group_norm,
    "Hardmax": hardmax,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "LogSoftmax": lambda x, *, axis=-1: torch.log_softmax(x, axis),
    "LpNormalization": lp_norm,
    "MeanVarianceNormalization": mean_variance_norm,
    "RMSNormalization": rms_norm,
    "Softmax": lambda x, *, axis=-1: torch.softmax(x, axis),
}
CHECKS: dict[str, Callable[..., str | None]] = {"BatchNormalization": batch_norm_problem}
