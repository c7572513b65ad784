"""Samples for calibration and evaluation: arrays named as the model's inputs, and optional labels.

An ``.npz`` file holds one array for each input of the model, and optionally ``labels``. The axis that is the model's
batch, mostly the first, has one place for each sample; what all samples share (a temperature, a mask over tokens) has
the shape that the model takes, or one axis more in front with a value for each sample (timesteps).
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.data import npz
from xopt.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.ir.batch import BatchAxes

LABELS = "labels"
DEFAULT_DIM = 16
"""Size of a symbolic axis in random data that the caller said nothing about (such as a sequence length)."""
FAILURES = (Exception, SystemExit)
"""What a user's own function may end with, and must not end us with."""


@dataclass(frozen=True)
class Dataset:
    """N samples.

    Attributes:
        inputs: array of each input of the model. An input with a batch axis has N samples there, by default on the
            first axis. One that all samples of a run share has the input's own shape; where it differs from sample to
            sample (a timestep), its array has an axis of N in front of that shape, and runs hold equal ones.
        labels: [N, ...] or, where k samples share a label, [N / k, ...].
        name: where they come from, for reports.
        synthetic: the samples are random: only fidelity to the original can be measured on them.
        axes: the batch axes of the model that they were matched with; None before that.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    name: str = "data"
    synthetic: bool = field(default=False)
    axes: BatchAxes | None = field(default=None, compare=False)
    varying: frozenset[str] = field(default=frozenset(), compare=False)
    """Shared inputs that have a value for each sample."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("E-DATA", "there are no arrays", where=self.name, cure="add one array for each input")
        for name, array in {**self.inputs, **({} if self.labels is None else {LABELS: self.labels})}.items():
            _check_numbers(name, array, self.name)
        for name, array in self.inputs.items():
            if (axis := self.axis(name)) is not None and not array.shape[axis]:
                what = f"array {name!r} has shape {list(array.shape)}, and so no samples"
                raise InputError("E-DATA", what, where=self.name)
        if self.labels is not None and (self.labels.ndim == 0 or not len(self.labels)):
            raise InputError("E-DATA", "array 'labels' is empty", where=self.name)
        if self.axes is None or self.labels is None:
            return  # which axis has the samples is not known yet
        if len(self.labels) > len(self) or len(self) % len(self.labels):
            raise InputError(
                "E-DATA",
                f"array 'labels' has {len(self.labels)} rows, expected {len(self)} or a whole fraction of it",
                where=self.name,
            )

    def axis(self, name: str) -> int | None:
        """The axis of array ``name`` that runs over samples; None for one that all share."""
        if name in self.varying or self.axes is None:
            return 0 if self.inputs[name].ndim else None
        return self.axes.inputs.get(name, 0)

    def __len__(self) -> int:
        sizes = (a.shape[axis] for name, a in self.inputs.items() if (axis := self.axis(name)) is not None)
        return next(sizes, 1)

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
            state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return state.hexdigest()

    def part(self, start: int, stop: int) -> Dataset:
        """The samples from ``start`` to ``stop``, which are whole groups."""
        labels = None if self.labels is None else self.labels[start // self.group : stop // self.group]
        return replace(self, inputs=self._chosen(slice(start, stop)), labels=labels)

    def take(self, count: int) -> Dataset:
        """The first ``count`` samples (whole groups, at least one), or all where there are fewer."""
        return self.part(0, max(count // self.group, 1) * self.group)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of up to ``size`` samples, in order; where the model fixes its batch, of so many, see `runs`."""
        for _, feeds in self.runs(np.arange(len(self)), size):
            yield feeds

    def runs(
        self, order: np.ndarray[Any, np.dtype[np.int64]], size: int
    ) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], dict[str, np.ndarray]]]:
        """The samples of each run, and its feeds.

        Args:
            order: of the samples.
            size: of a run at most, where the model does not fix it. A run of a fixed batch is filled up with samples
                that it has already; they come last.
        """
        fixed = self.axes.size if self.axes is not None else None
        for index in self._alike(order, fixed or size):
            yield index, self.feeds(index if fixed is None or len(index) == fixed else np.resize(index, fixed))

    def feeds(self, index: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, np.ndarray]:
        """Arrays of one run of the samples ``index``, which share what the model takes once."""
        straight = len(index) == index[-1] - index[0] + 1 and bool((np.diff(index) == 1).all())
        chosen = self._chosen(slice(int(index[0]), int(index[-1]) + 1) if straight else index)
        return {name: np.asarray(array[0]) if name in self.varying else array for name, array in chosen.items()}

    def _chosen(self, index: Any) -> dict[str, np.ndarray]:
        axes = {name: self.axis(name) for name in self.inputs}
        return {
            n: a if axes[n] is None else a[(slice(None),) * (axes[n] or 0) + (index,)] for n, a in self.inputs.items()
        }

    def _alike(
        self, order: np.ndarray[Any, np.dtype[np.int64]], size: int
    ) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        """Up to ``size`` samples in a row that agree in what the model takes once for all."""
        start = 0
        while start < len(order):
            stop = min(start + size, len(order))
            for name in self.varying:
                values = self.inputs[name][order[start:stop]].reshape(stop - start, -1)
                same = (values == values[0]).all(axis=1)
                stop = start + (int(same.argmin()) if not same.all() else len(same))
            yield order[start:stop]
            start = stop

    def matched(self, model: ir.Model) -> Dataset:
        """The same samples with just the arrays that ``model`` reads, in its dtypes and with its batch axes.

        Raises:
            InputError: E-DATA, naming the array, what the model expects and what was given.
        """
        from xopt.data.matching import matched

        return matched(self, model)

    def fitted(self, model: ir.Model) -> Dataset:
        """The samples themselves where they were matched with a model before, else `matched`."""
        return self if self.axes is not None else self.matched(model)

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
    def random(
        cls, model: ir.Model, count: int, seed: int, dims: Mapping[str, int] | None = None, usual: int = DEFAULT_DIM
    ) -> Dataset:
        """``count`` samples that ``model`` accepts: normal numbers, ids within the tables they index, masks of ones.

        Args:
            model: its inputs are read; a fixed first axis is taken for a fixed batch size, and disregarded.
            count: number of samples.
            seed: the same seed gives the same samples.
            dims: sizes of symbolic axes other than the first.
            usual: size of those that neither it nor the graph tells, as what is joined must have equal sizes.

        Raises:
            InputError: ``E-DATA``: a model without inputs.
        """
        from xopt.data.synthetic import random_inputs
        from xopt.ir.batch import batch_axes

        if not model.graph.inputs:
            cure = "export it with the tensors that change as inputs"
            raise InputError("E-DATA", "the model has no inputs, it always computes the same", cure=cure)
        axes = batch_axes(model)
        arrays = random_inputs(model, axes, count, seed, dims or {}, usual)
        return cls(arrays, None, f"random inputs, seed {seed}", True, axes)


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
    if array.dtype.kind not in npz.NUMBERS and (array.dtype.kind != "V" or array.dtype.name.startswith("void")):
        raise InputError("E-DATA", f"array {name!r} holds {array.dtype}, expected numbers", where=where)
    if array.dtype.kind == "f" and (bad := int((np.isnan(array) | np.isposinf(array)).sum())):
        cure = "give numbers; -inf is one, in masks that are added"
        raise InputError("E-DATA", f"array {name!r} has {bad} values that are NaN or infinite", where=where, cure=cure)
