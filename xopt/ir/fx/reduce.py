"""Reductions, searches and running sums along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xopt.ir.fx.layout import Ints, integers


def reduction(compute: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """An ONNX Reduce op: ``axes`` as input or attribute, all axes when absent."""

    def op(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        along = integers(axes)
        if not along:
            if noop_with_empty_axes:
                return x
            along = list(range(x.ndim))
        return compute(x, along, bool(keepdims)) if along else x

    return op


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def arg(select: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """ArgMax or ArgMin."""

    def op(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return select(x, dim=axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - select(x.flip(axis), dim=axis, keepdim=bool(keepdims))

    return op


def top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest (smallest) along an axis and their indices; equal values in the order of their indices."""
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = int(k.item())
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


def cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sum along an axis, forward or backward, with or without the element itself."""
    along = int(axis.item())
    source = x.flip(along) if reverse else x
    total = torch.cumsum(source, along, dtype=x.dtype)
    total = total - source if exclusive else total
    return total.flip(along) if reverse else total


def cumulative_product(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running product along an axis, forward or backward, with or without the element itself."""
    along = int(axis.item()) % x.ndim
    source = x.flip(along) if reverse else x
    if exclusive:
        source = torch.cat(
            [torch.ones_like(source.narrow(along, 0, 1)), source.narrow(along, 0, x.shape[along] - 1)], along
        )
    product = torch.cumprod(source, along, dtype=x.dtype)
    return product.flip(along) if reverse else product


def _reduce_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


TABLE: dict[str, Callable[..., Any]] = {
    "ArgMax": arg(torch.argmax),
    "ArgMin": arg(torch.argmin),
    "CumProd": cumulative_product,
    "CumSum": cumulative_sum,
    "ReduceL1": reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceLogSum": reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceMax": reduction(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep)),
    "ReduceMean": reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": reduction(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep)),
    "ReduceProd": reduction(_product),
    "ReduceSum": reduction(_reduce_sum),
    "ReduceSumSquare": reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "TopK": top_k,
}
