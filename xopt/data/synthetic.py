"""Random inputs that a model accepts, made from nothing but its graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from xopt.data.vocabulary import table_rows
from xopt.errors import InputError

DEFAULT_DIM = 16
"""Size of a symbolic axis that the caller said nothing about (such as a sequence length)."""


def random_inputs(model: ir.Model, count: int, seed: int, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """One array [count, ...] for each input that must be fed; see :meth:`Dataset.random`."""
    generator = np.random.default_rng(seed)
    return {
        str(value.name): _random(value, _shape(value, count, dims), generator)
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    }


def _shape(value: ir.Value, count: int, dims: Mapping[str, int]) -> list[int]:
    if value.shape is None or value.dtype is None or len(value.shape) == 0:
        raise InputError(
            "E-DATA",
            "random data need an input with a known type and a first axis for samples",
            where=f"input {value.name!r}",
            cure="give data",
        )
    axes = list(value.shape)[1:]
    return [count, *(dim if isinstance(dim, int) else dims.get(str(dim.value), DEFAULT_DIM) for dim in axes)]


def _random(value: ir.Value, shape: list[int], generator: np.random.Generator) -> np.ndarray:
    assert value.dtype is not None
    dtype = value.dtype.numpy()
    name = str(value.name).lower()
    if dtype.kind == "b" or "mask" in name:
        # ones hide nothing: neither in a mask of flags, nor in one that is added, which a softmax does not notice
        return np.ones(shape, dtype)
    if dtype.kind not in "iu":
        return generator.standard_normal(shape).astype(dtype)
    rows = table_rows(value)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1]) % (rows or shape[-1]), shape).astype(dtype)
    return generator.integers(0, rows or 2, shape).astype(dtype)
