"""Whether samples are what a model takes: names, types, shapes, the batch axis of each input, rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data.dataset import Dataset
from xopt.data.vocabulary import table_rows
from xopt.errors import InputError
from xopt.ir.batch import batch_axes, fed_inputs

if TYPE_CHECKING:
    import onnx_ir as ir


def matched(data: Dataset, model: ir.Model) -> Dataset:
    """``data`` with the arrays that ``model`` reads; see :meth:`Dataset.matched`."""
    axes = batch_axes(model)
    sizes: dict[str, int] = {}
    inputs: dict[str, np.ndarray] = {}
    varying: dict[str, int | None] = {}
    for value in fed_inputs(model.graph):
        name = str(value.name)
        array = _given(data, name)
        axis = axes.inputs[name]
        if axis is None and (own := _one_for_each(value, array)) is not None:
            array = own
            varying[name] = axis = 0
        _check_shape(value, array, axis, name in varying, sizes, data.name)
        inputs[name] = _in_table(value, _as_dtype(value, array, data.name), data.name)
    along = {**axes.inputs, **varying}
    count = _count(inputs, along, data.name)
    for name, axis in along.items():
        if axis is not None and inputs[name].shape[axis] != count:  # one that stands for all
            inputs[name] = np.repeat(inputs[name], count, axis)
    return Dataset(inputs, data.labels, data.name, data.synthetic, axes, frozenset(varying))


def _given(data: Dataset, name: str) -> np.ndarray:
    if name not in data.inputs:
        cure = f"the file has {', '.join(sorted(data.inputs))}"
        raise InputError("E-DATA", f"array {name!r} is missing", where=data.name, cure=cure)
    return data.inputs[name]


def _one_for_each(value: ir.Value, array: np.ndarray) -> np.ndarray | None:
    """What is given for each sample of an input that a run takes once, [N, ...its shape]; None where one is given."""
    if value.shape is None:
        return None
    if array.ndim == len(value.shape) + 1:
        return array
    single = array.ndim == len(value.shape) > 0 and value.shape[0] == 1
    return array[:, None] if single and len(array) > 1 else None


def _count(inputs: Mapping[str, np.ndarray], along: Mapping[str, int | None], where: str) -> int:
    """How many samples there are."""
    sizes = {name: array.shape[axis] for name, array in inputs.items() if (axis := along[name]) is not None}
    if len(set(sizes.values()) - {1}) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError("E-DATA", f"the arrays have different numbers of samples ({listed})", where=where)
    return max(sizes.values(), default=1)


def _check_shape(
    value: ir.Value, array: np.ndarray, axis: int | None, front: bool, sizes: dict[str, int], where: str
) -> None:
    """The rank and the fixed axes agree beside that of samples, and equal symbols stand for equal sizes."""
    if value.shape is None:
        return
    wanted: list[int | str] = [dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape]
    if axis is not None:
        wanted = [*wanted[:axis], "samples", *wanted[axis + (not front) :]]
    before = "".join(f", {name} = {size}" for name, size in sizes.items())
    agrees = len(wanted) == array.ndim
    for place, (dim, size) in enumerate(zip(wanted, array.shape)):
        free = place == axis or dim == "?"
        expected = dim if isinstance(dim, int) else size if free else sizes.setdefault(dim, size)
        agrees = agrees and expected == size
    if not agrees:
        shape = ", ".join(map(str, wanted))
        what = f"array {str(value.name)!r}: expected [{shape}]{before}, got {list(array.shape)}"
        raise InputError("E-DATA", what, where=where)


def _as_dtype(value: ir.Value, array: np.ndarray, where: str) -> np.ndarray:
    """Integers to integers and floats to floats, of any width that holds the values; nothing else."""
    wanted = value.dtype.numpy() if value.dtype is not None else array.dtype
    if array.dtype == wanted:
        return array
    same_kind = _kind(array.dtype) == _kind(wanted) or (_kind(array.dtype), _kind(wanted)) == ("b", "i")
    if same_kind and _kind(wanted) == "i" and array.size:
        limits = np.iinfo(wanted)
        same_kind = limits.min <= int(array.min()) and int(array.max()) <= limits.max
    if not same_kind:
        what = f"array {str(value.name)!r}: expected {wanted}, got {array.dtype}"
        raise InputError("E-DATA", what, where=where)
    with np.errstate(over="ignore"):
        converted = array.astype(wanted)
    if _kind(wanted) == "f" and (np.isinf(converted) & np.isfinite(array)).any():
        what = f"array {str(value.name)!r} holds numbers that {wanted} does not"
        raise InputError("E-DATA", what, where=where)
    return converted


def _in_table(value: ir.Value, array: np.ndarray, where: str) -> np.ndarray:
    rows = table_rows(value)
    if rows is not None and array.size and (array.min() < -rows or array.max() >= rows):
        got = f"got {array.min()} to {array.max()}"
        raise InputError("E-DATA", f"array {str(value.name)!r} indexes a table of {rows} rows, {got}", where=where)
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu":
        return "i"
    return "b" if dtype.kind == "b" else "f"
