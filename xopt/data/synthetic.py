"""Random inputs that a model accepts, made from nothing but its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.runtime.manifest import TensorInfo

DEFAULT_DIM = 16
"""Size of a symbolic axis that the caller said nothing about (such as a sequence length)."""


def random_inputs(model: ir.Model, count: int, seed: int, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """One array [count, ...] for each input that must be fed; see :meth:`Dataset.random`."""
    from xopt.data.vocabulary import table_rows

    generator = np.random.default_rng(seed)
    arrays = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if value.shape is None or value.dtype is None:
            raise _unknown(str(value.name))
        shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
        sizes = _sizes(str(value.name), shape, count, dims)
        arrays[str(value.name)] = _random(str(value.name), value.dtype.numpy(), sizes, table_rows(value), generator)
    return arrays


def random_feeds(inputs: Sequence[TensorInfo], batch: int, seed: int, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """One array for each input of a compiled model: ``batch`` samples where that is not fixed."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for info in inputs:
        fixed = info.shape[0] if info.shape else 0
        sizes = _sizes(info.name, info.shape, fixed if isinstance(fixed, int) else batch, dims)
        rows = None if info.values is None else info.values[1] + 1
        arrays[info.name] = _random(info.name, np.dtype(info.dtype), sizes, rows, generator)
    return arrays


def _sizes(name: str, shape: Sequence[int | str], count: int, dims: Mapping[str, int]) -> list[int]:
    if not shape:
        raise _unknown(name)
    return [count, *(dim if isinstance(dim, int) else dims.get(dim, DEFAULT_DIM) for dim in shape[1:])]


def _unknown(name: str) -> InputError:
    what = "random data need an input with a known type and a first axis for samples"
    return InputError("E-DATA", what, where=f"input {name!r}", cure="give data")


def _check_memory(name: str, dtype: np.dtype[Any], shape: list[int]) -> None:
    """Refuse an array that memory has no place for; numpy needs another one of double width to make it."""
    import psutil

    needed, available = math.prod(shape) * max(dtype.itemsize, 8), psutil.virtual_memory().available
    if needed > available // 2:
        what = f"random data of shape {shape} take {needed >> 20} MiB, {available >> 20} MiB of memory are free"
        raise InputError("E-DATA", what, where=f"input {name!r}", cure="take a smaller batch, or smaller sizes of axes")


def _random(
    name: str, dtype: np.dtype[Any], shape: list[int], rows: int | None, generator: np.random.Generator
) -> np.ndarray:
    _check_memory(name, dtype, shape)
    if dtype.kind == "b" or "mask" in name.lower():
        # ones hide nothing: neither in a mask of flags, nor in one that is added, which a softmax does not notice
        return np.ones(shape, dtype)
    if dtype.kind not in "iu":
        return generator.standard_normal(shape).astype(dtype)
    if "position" in name.lower():
        return np.broadcast_to(np.arange(shape[-1]) % (rows or shape[-1]), shape).astype(dtype)
    return generator.integers(0, rows or 2, shape).astype(dtype)
