"""Samples for calibration and evaluation: arrays named as the model's inputs, and optional labels.

An ``.npz`` file holds one array for each input of the model, first axis = samples, and optionally ``labels``.
There is one label (or one row of labels) a sample; where a label belongs to k samples in a row, such as a pair of
sentences, there are N / k of them, and label i belongs to the samples i*k to i*k + k - 1.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data import npz
from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

LABELS = "labels"
FAILURES = (Exception, SystemExit)
"""What a user's own function may end with, and must not end us with."""


@dataclass(frozen=True)
class Dataset:
    """N samples.

    Attributes:
        inputs: array [N, ...] of each input of the model.
        labels: [N, ...] or, where k samples share a label, [N / k, ...].
        name: where they come from, for reports.
        synthetic: the samples are random: only fidelity to the original can be measured on them.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    name: str = "data"
    synthetic: bool = field(default=False)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("E-DATA", "there are no arrays", where=self.name, cure="add one array for each input")
        for name, array in {**self.inputs, **({} if self.labels is None else {LABELS: self.labels})}.items():
            _check_numbers(name, array, self.name)
        sizes = {name: len(array) for name, array in self.inputs.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError("E-DATA", f"the arrays have different numbers of samples ({listed})", where=self.name)
        if self.labels is not None and (len(self.labels) > len(self) or len(self) % len(self.labels)):
            raise InputError(
                "E-DATA",
                f"array 'labels' has {len(self.labels)} rows, expected {len(self)} or a whole fraction of it",
                where=self.name,
            )

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def group(self) -> int:
        """How many samples in a row share one label."""
        return 1 if self.labels is None else len(self) // len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 of names, types, shapes and numbers."""
        state = hashlib.sha256()
        for name, array in sorted({**self.inputs, **({} if self.labels is None else {LABELS: self.labels})}.items()):
            state.update(f"{name} {array.dtype} {array.shape} ".encode())
            state.update(np.ascontiguousarray(array).view(np.uint8).data)
        return state.hexdigest()

    def take(self, count: int) -> Dataset:
        """The first ``count`` samples (whole groups, at least one), or all where there are fewer."""
        count = max(count // self.group, 1) * self.group
        labels = None if self.labels is None else self.labels[: count // self.group]
        return Dataset({n: a[:count] for n, a in self.inputs.items()}, labels, self.name, self.synthetic)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of up to ``size`` samples, in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield {name: array[start : start + size] for name, array in self.inputs.items()}

    def matched(self, model: ir.Model) -> Dataset:
        """The same samples with just the arrays that ``model`` reads, in its dtypes.

        Raises:
            InputError: E-DATA, naming the array, what the model expects and what was given.
        """
        sizes: dict[str, int] = {}
        inputs = {str(v.name): _matched(v, self.inputs, sizes, self.name) for v in _fed_inputs(model)}
        return Dataset(inputs, self.labels, self.name, self.synthetic)

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read an ``.npz`` file; InputError E-FILE or E-DATA."""
        path = Path(path)
        arrays = npz.read(path)
        labels = arrays.pop(LABELS, None)
        return cls(arrays, labels, path.name)

    @classmethod
    def call(cls, reference: str) -> Dataset:
        """Data from a Python callable ``module:function`` or ``file.py:function``.

        It is called without arguments and returns a Dataset, a dict of arrays (``labels`` among them or not), or a
        pair (dict of arrays, labels).
        """
        function = resolve(reference, "--data")
        try:
            answer = function()
        except FAILURES as error:
            what = f"the callable fails ({type(error).__name__}: {error})"
            raise InputError("E-DATA", what, where=reference) from error
        if isinstance(answer, Dataset):
            return answer
        labels = None
        if isinstance(answer, tuple) and len(answer) == 2:
            answer, labels = answer
        if not isinstance(answer, Mapping):
            cure = "return a dict of arrays, (dict, labels) or an xopt.Dataset"
            raise InputError("E-DATA", f"the callable returned {type(answer).__name__}", where=reference, cure=cure)
        return cls._of_arrays(answer, labels, reference)

    @classmethod
    def of(cls, source: str | Path | Dataset | Mapping[str, np.ndarray]) -> Dataset:
        """Data from whatever a user has: a Dataset, a dict of arrays, a path, or ``module:function``."""
        if isinstance(source, Dataset):
            return source
        if isinstance(source, Mapping):
            return cls._of_arrays(source, None, "data")
        if not isinstance(source, (str, os.PathLike)):
            cure = "give a Dataset, a dict of arrays, the path of an .npz file, or module:function"
            raise InputError("E-DATA", f"{type(source).__name__} is no data", cure=cure)
        if ":" in str(source) and not os.path.exists(source):
            return cls.call(str(source))
        return cls.load(source)

    @classmethod
    def _of_arrays(cls, arrays: Mapping[Any, Any], labels: Any, name: str) -> Dataset:
        """Data from whatever numpy takes for arrays."""
        found = {str(key): _as_array(str(key), value, name) for key, value in arrays.items()}
        given = found.pop(LABELS, None) if labels is None else _as_array(LABELS, labels, name)
        return cls(found, given, name)

    @classmethod
    def random(cls, model: ir.Model, count: int, seed: int, dims: Mapping[str, int] | None = None) -> Dataset:
        """``count`` samples that ``model`` accepts: normal numbers, ids within the tables they index, masks of ones.

        Args:
            model: its inputs are read; a fixed first axis is taken for a fixed batch size, and disregarded.
            count: number of samples.
            seed: the same seed gives the same samples.
            dims: sizes of symbolic axes other than the first; 16 where it says nothing.

        Raises:
            InputError: ``E-DATA``: a model without inputs.
        """
        from xopt.data.synthetic import random_inputs

        if not model.graph.inputs:
            cure = "export it with the tensors that change as inputs"
            raise InputError("E-DATA", "the model has no inputs, it always computes the same", cure=cure)
        return cls(random_inputs(model, count, seed, dims or {}), None, f"random inputs, seed {seed}", True)


def symbol_sizes(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Size of each symbolic axis of the inputs in ``feeds``."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, size in zip(value.shape or (), feeds[str(value.name)].shape if value.name in feeds else ()):
            if not isinstance(dim, int) and dim.value is not None:
                sizes.setdefault(str(dim.value), int(size))
    return sizes


def resolve(reference: str, option: str) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names; InputError E-OPTION.

    The working directory is searched for modules last, so that nothing in it hides an installed one.
    """
    module_name, _, attribute = reference.rpartition(":")
    if not module_name or not attribute:
        raise InputError("E-OPTION", f"{reference!r} names no function", where=option, cure="write module:function")
    try:
        found = getattr(_import(module_name), attribute)
    except FAILURES as error:
        raise InputError(
            "E-OPTION", f"cannot import {reference} ({type(error).__name__}: {error})", where=option
        ) from error
    if not callable(found):
        raise InputError("E-OPTION", f"{reference} is not a function", where=option)
    return found  # type: ignore[no-any-return]


def _import(name: str) -> object:
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"file {os.path.abspath(name)}", name)  # hides no module
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where a dataclass looks for the one it is in
        spec.loader.exec_module(module)
        return module
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def _as_array(name: str, value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # such as rows of different lengths
        raise InputError("E-DATA", f"array {name!r} is no array ({error})", where=where) from error


def _check_numbers(name: str, array: np.ndarray, where: str) -> None:
    if array.ndim == 0 or array.size == 0:
        cure = "the first axis is samples, and no axis may be empty"
        raise InputError("E-DATA", f"array {name!r} has shape {list(array.shape)}", where=where, cure=cure)
    if array.dtype.kind not in npz.NUMBERS and array.dtype.name != "bfloat16":
        raise InputError("E-DATA", f"array {name!r} holds {array.dtype}, expected numbers", where=where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError("E-DATA", f"array {name!r} has {bad} values that are NaN or infinite", where=where)


def _fed_inputs(model: ir.Model) -> list[ir.Value]:
    """Inputs that a caller must feed: those without an initializer."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _matched(value: ir.Value, arrays: Mapping[str, np.ndarray], sizes: dict[str, int], where: str) -> np.ndarray:
    from xopt.data.vocabulary import table_rows

    name = str(value.name)
    if name not in arrays:
        cure = f"the file has {', '.join(sorted(arrays))}"
        raise InputError("E-DATA", f"array {name!r} is missing", where=where, cure=cure)
    array = arrays[name]
    _check_shape(value, array, sizes, where)
    array = _as_dtype(value, array, where)
    rows = table_rows(value)
    if rows is not None and (array.min() < -rows or array.max() >= rows):
        got = f"got {array.min()} to {array.max()}"
        raise InputError("E-DATA", f"array {name!r} indexes a table of {rows} rows, {got}", where=where)
    return array


def _check_shape(value: ir.Value, array: np.ndarray, sizes: dict[str, int], where: str) -> None:
    """The rank and the fixed axes agree (the first one is samples), and equal symbols stand for equal sizes."""
    if value.shape is None:
        return
    wanted = [dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape]
    before = "".join(f", {name} = {size}" for name, size in sizes.items())
    agrees = len(wanted) == array.ndim
    for dim, size in list(zip(wanted, array.shape))[1:]:
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size) if dim != "?" else size
        agrees = agrees and expected == size
    if not agrees:
        shape = ", ".join(["samples", *map(str, wanted[1:])] if wanted else [])
        what = f"array {str(value.name)!r}: expected [{shape}]{before}, got {list(array.shape)}"
        raise InputError("E-DATA", what, where=where)


def _as_dtype(value: ir.Value, array: np.ndarray, where: str) -> np.ndarray:
    """Integers to integers and floats to floats, of any width that holds the values; nothing else."""
    wanted = value.dtype.numpy() if value.dtype is not None else array.dtype
    if array.dtype == wanted:
        return array
    same_kind = _kind(array.dtype) == _kind(wanted) or (_kind(array.dtype), _kind(wanted)) == ("b", "i")
    if same_kind and _kind(wanted) == "i":
        limits = np.iinfo(wanted)
        same_kind = limits.min <= int(array.min()) and int(array.max()) <= limits.max
    if not same_kind:
        what = f"array {str(value.name)!r}: expected {wanted}, got {array.dtype}"
        raise InputError("E-DATA", what, where=where)
    with np.errstate(over="ignore"):
        converted = array.astype(wanted)
    if _kind(wanted) == "f" and not np.isfinite(converted).all():
        what = f"array {str(value.name)!r} holds numbers that {wanted} does not"
        raise InputError("E-DATA", what, where=where)
    return converted


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu":
        return "i"
    return "b" if dtype.kind == "b" else "f"
