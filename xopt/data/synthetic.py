"""Random inputs that a model accepts, made from nothing but its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data.dataset import DEFAULT_DIM
from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.ir.batch import BatchAxes
    from xopt.runtime.manifest import TensorInfo


def random_inputs(
    model: ir.Model, axes: BatchAxes, count: int, seed: int, dims: Mapping[str, int], usual: int
) -> dict[str, np.ndarray]:
    """One array for each input that must be fed, with ``count`` samples on its batch axis (:meth:`Dataset.random`)."""
    from xopt.data.vocabulary import table_rows
    from xopt.ir.batch import fed_inputs
    from xopt.ir.canonical.relations import fitting_sizes

    generator = np.random.default_rng(seed)
    values = fed_inputs(model.graph)
    along = {str(v.shape[axis]) for v in values if v.shape and (axis := axes.inputs[str(v.name)]) is not None}
    dims = fitting_sizes(model.graph, dict.fromkeys(along, count) | dict(dims), usual)
    shapes = {}
    for value in values:
        name = str(value.name)
        if value.shape is None or value.dtype is None:
            what = "random data need an input with a known type and shape"
            raise InputError("E-DATA", what, where=f"input {name!r}", cure="give data")
        shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
        axis = axes.inputs[name]
        shapes[name] = _sizes(shape if axis is None else [*shape[:axis], count, *shape[axis + 1 :]], dims, usual)
    longest = _longest(shapes)
    return {
        str(v.name): _random(str(v.name), v.dtype.numpy(), shapes[str(v.name)], table_rows(v), longest, generator)  # type: ignore[union-attr]
        for v in values
    }


def random_feeds(inputs: Sequence[TensorInfo], batch: int, seed: int, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """One array for each input of a compiled model: ``batch`` samples on the axis called so, or on first ones."""
    from xopt.ir.batch import is_batch_name

    generator = np.random.default_rng(seed)
    named = {dim for info in inputs for dim in info.shape if isinstance(dim, str) and is_batch_name(dim)}
    symbols = named or {info.shape[0] for info in inputs if info.shape and isinstance(info.shape[0], str)}
    sizes = {**dict.fromkeys(symbols, batch), **dims}
    shapes = {info.name: _sizes(info.shape, sizes, DEFAULT_DIM) for info in inputs}
    longest = _longest(shapes)
    return {
        info.name: _random(
            info.name,
            np.dtype(info.dtype),
            shapes[info.name],
            None if info.values is None else info.values[1] + 1,
            longest,
            generator,
        )
        for info in inputs
    }


def _sizes(shape: Sequence[int | str], dims: Mapping[str, int], usual: int) -> list[int]:
    return [dim if isinstance(dim, int) else dims.get(dim, usual) for dim in shape]


def _longest(shapes: Mapping[str, Sequence[int]]) -> int:
    """How long a sequence is: the second axis of the inputs that have one, where that is smallest."""
    return min((shape[1] for shape in shapes.values() if len(shape) > 1), default=1)


def _check_memory(name: str, dtype: np.dtype[Any], shape: list[int]) -> None:
    """Refuse an array that memory has no place for; numpy needs another one of double width to make it."""
    import psutil

    needed, available = math.prod(shape) * max(dtype.itemsize, 8), psutil.virtual_memory().available
    if needed > available // 2:
        what = f"random data of shape {shape} take {needed >> 20} MiB, {available >> 20} MiB of memory are free"
        raise InputError("E-DATA", what, where=f"input {name!r}", cure="take a smaller batch, or smaller sizes of axes")


def _random(
    name: str, dtype: np.dtype[Any], shape: list[int], rows: int | None, longest: int, generator: np.random.Generator
) -> np.ndarray:
    _check_memory(name, dtype, shape)
    if dtype.kind == "b" or "mask" in name.lower():
        # ones hide nothing: neither in a mask of flags, nor in one that is added, which a softmax does not notice
        return np.ones(shape, dtype)
    if dtype.kind not in "iu":
        return np.asarray(generator.standard_normal(shape)).astype(dtype)
    if "position" in name.lower():
        places = np.arange(shape[-1] if shape else 1) % (rows or max([1, *shape[-1:]]))
        return np.broadcast_to(places if shape else places[0], shape).astype(dtype)
    if rows is None and "len" in name.lower():
        return np.full(shape, longest, dtype)
    return np.asarray(generator.integers(0, rows or 2, shape)).astype(dtype)
