"""What a model means: its exported graph, run in onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir import io
from xopt.ir.empties import may_be_empty
from xopt.ir.exporting import export
from xopt.ir.unsigned import widen_products
from xopt.runtime.portable import brief, started

Array = npt.NDArray[np.generic]


class ReferenceSession:
    """Runs ``model`` (canonical or not) in onnxruntime on the CPU, through ``export``.

    Args:
        model: left as it is.
        threads: threads that one operator may use.

    Raises:
        InputError: ``E-UNSUPPORTED-OP``: onnxruntime cannot run the exported graph.
    """

    def __init__(self, model: ir.Model, threads: int = 2) -> None:
        exported = export(model)
        widen_products(exported)
        self._session = _session(exported, threads)
        self.inputs: dict[str, ir.Value] = {value.name or "": value for value in exported.graph.inputs}
        self._optional = frozenset(self.inputs) & frozenset(exported.graph.initializers)
        self._empty = may_be_empty(model)
        self.outputs: list[str] = [value.name or "" for value in exported.graph.outputs]
        self._types = {value.name or "": value.dtype for value in exported.graph.outputs}

    def run(self, feeds: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """Outputs by name.

        Args:
            feeds: one array per input, with the input's type and fixed dimensions; integers and floats of another width
                are converted. Inputs that have a default (an initializer of the same name) may be left out.

        Raises:
            InputError: ``E-DATA``: an input is missing, unknown, empty, or of another shape or kind.
        """
        needed = {name: value for name, value in self.inputs.items() if name in feeds or name not in self._optional}
        arrays = check_feeds(needed, feeds, self._empty)
        try:
            results = self._session.run(self.outputs, arrays)
        except Exception as error:
            raise InputError(
                "E-DATA", f"the model does not run on this data: {brief(error)}", cure="check the shapes of the inputs"
            ) from error
        return {name: _typed(array, self._types[name]) for name, array in zip(self.outputs, results)}


def _typed(array: Array, dtype: ir.DataType | None) -> Array:
    """An output in its own type, where onnxruntime gives the bits of one that numpy lacks."""
    wanted = array.dtype if dtype is None or dtype == ir.DataType.STRING else np.dtype(dtype.numpy())
    bits = array.dtype != wanted and array.dtype.kind == "u" and array.dtype.itemsize == wanted.itemsize
    return array.view(wanted) if bits else array


def check_feeds(
    inputs: Mapping[str, ir.Value], feeds: Mapping[str, npt.ArrayLike], empty: Collection[str] = ()
) -> dict[str, Array]:
    """``feeds`` as arrays of the types that ``inputs`` declare, with symbolic dimensions that agree with each other.

    Those called one of ``empty`` may be 0.

    Raises:
        InputError: ``E-DATA``, as ``ReferenceSession.run``.
    """
    unknown = [name for name in feeds if name not in inputs]
    missing = [name for name in inputs if name not in feeds]
    if unknown or missing:
        problem = f"input {unknown[0]!r} is unknown" if unknown else f"input {missing[0]!r} is missing"
        raise InputError("E-DATA", problem, cure=f"the model's inputs are: {', '.join(inputs)}")
    sizes: dict[str, int] = {}
    return {name: _checked(value, np.asarray(feeds[name]), sizes, empty) for name, value in inputs.items()}


def _checked(value: ir.Value, array: Array, sizes: dict[str, int], empty: Collection[str]) -> Array:
    """``array`` in the type of ``value``; ``sizes`` remembers what each named dimension was."""
    where = f"input {value.name!r}"
    wanted = value.dtype.numpy() if value.dtype is not None else array.dtype
    if array.dtype != wanted:
        if not np.can_cast(array.dtype, wanted, casting="same_kind"):
            raise InputError("E-DATA", f"{array.dtype} given, {wanted} needed", where=where, cure="convert the data")
        array = array.astype(wanted)
    told = list(value.shape) if value.shape is not None else [None] * array.ndim
    fits = len(told) == array.ndim
    if fits and any(not size and _filled(dim, empty) for dim, size in zip(told, array.shape)):
        raise InputError(
            "E-DATA", f"the data is empty: shape {list(array.shape)}", where=where, cure="give at least one element"
        )
    if value.shape is None:
        return array
    for dim, size in zip(value.shape, array.shape) if fits else ():
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        fits &= size == (sizes.setdefault(name, size) if name else dim) if name or isinstance(dim, int) else True
    if not fits:
        known = f" (with {', '.join(f'{k}={v}' for k, v in sizes.items())})" if sizes else ""
        raise InputError(
            "E-DATA",
            f"shape {list(array.shape)} given, [{', '.join(str(d) for d in value.shape)}] needed{known}",
            where=where,
            cure="give data of the model's shape",
        )
    return array


def _filled(dim: int | ir.SymbolicDim | None, empty: Collection[str]) -> bool:
    """Whether an axis must have elements."""
    return dim != 0 if not isinstance(dim, ir.SymbolicDim) else dim.value not in empty


def _session(model: ir.Model, threads: int) -> Any:
    """An onnxruntime session that makes no noise; a model beyond protobuf's 2 GB goes through a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="xopt-") as folder:
        source: bytes | str
        if io.weight_bytes(model) > io.EMBEDDED_WEIGHTS:
            source = str(Path(folder) / "model.onnx")
            io.save(model, source)
        else:
            source = io.to_bytes(model)
        try:
            return started(source, threads, optimized=True)
        except Exception:  # its own rewrites break some graphs (norms of scalars), which run as they are
            try:
                return started(source, threads, optimized=False)
            except Exception as error:
                what = f"onnxruntime refuses the model: {brief(error)}"
                raise InputError("E-UNSUPPORTED-OP", what, cure="export the model differently") from error
