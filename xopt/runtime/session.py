"""Run a compiled artifact with nothing but TVM's runtime: neither the compiler, torch nor onnx is imported."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from xopt.errors import InputError
from xopt.runtime import artifact, loops, segments, trio
from xopt.runtime.arrays import aligned_copy, as_tensor
from xopt.runtime.device import CPU, CUDA, Transfer, load_cuda_runtime
from xopt.runtime.loops import REFUSAL as REFUSAL
from xopt.runtime.manifest import ALIGNMENT, Manifest, TensorInfo, array_type, stored_type
from xopt.runtime.segments import Segments
from xopt.runtime.serving import serving
from xopt.runtime.threads import count, running

_POOLED_ALLOCATOR = 2


class Session:
    """A loaded artifact. It owns what it runs on: its files may change or go.

    Attributes:
        inputs: what ``run`` takes, in order.
        outputs: what ``run`` returns, in order.
        manifest: everything recorded at compile time.

    Threads may share a session: their runs come one after the other; load one for each of them to run at once. A forked
    child may use it too, unless it works on a GPU.
    """

    def __init__(
        self,
        machine: Any,
        weights: Any,
        manifest: Manifest,
        threads: int,
        transfer: Transfer | None = None,
        parts: Segments | None = None,
    ) -> None:
        self.machine = machine
        self.segments = parts or Segments({}, threads)
        self._threads = threads
        self._transfer = transfer
        self.inputs: tuple[TensorInfo, ...] = manifest.inputs
        self.outputs: tuple[TensorInfo, ...] = manifest.outputs
        self.manifest = manifest
        self._main = machine["main"]
        self._weights = weights
        self._lock = threading.RLock()  # a fork within a run takes it again
        self._inherited = False
        _sessions.add(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
        """Load the artifact ``path`` (the ``.so``, or its folder when the library is called ``model.so``).

        Args:
            path: the library; its weights and manifest lie beside it.
            threads: threads that kernels run on, the caller's and others; by default as many as there are physical
                cores for this process.

        Raises:
            InputError: E-ARTIFACT, a file is missing, changed since it was written, or of another format; E-CPU,
                the code is for another machine; E-OPTION, so many threads cannot be; E-TOOLCHAIN, a part of the model
                runs in onnxruntime, which is not installed.
        """
        threads = count(threads)
        try:
            library = Path(path).resolve()
            library = library / "model.so" if library.is_dir() else library
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            cure = "give the path of model.so, or of its folder"
            raise InputError("E-ARTIFACT", f"this is no path ({str(error)[:200]})", cure=cure) from error
        trio.settle(library)
        manifest = artifact.read_manifest(library)
        runtime = artifact.runtime()
        loops.register(runtime)
        segments.register(runtime)
        code = artifact.read_code(library, manifest)
        if manifest.device == CUDA:
            load_cuda_runtime(artifact.tvm_libraries())
        weights = artifact.read_weights(library, manifest)
        try:
            machine = artifact.load_code(runtime, code)["vm_load_executable"]()
        except Exception as error:  # whatever the dynamic linker and TVM raise about a library that is none of ours
            what = f"{library.name} cannot be loaded: {' '.join(str(error).split())[:200]}"
            raise artifact.refused(what, library) from error
        if manifest.device == CPU:
            machine["vm_initialization"](CPU, 0, _POOLED_ALLOCATOR)
            models = {
                info.name: np.from_dlpack(weight).tobytes()
                for info, weight in zip(manifest.weights, weights)
                if info.name in manifest.segments
            }
            return cls(machine, runtime.convert(weights), manifest, threads, parts=Segments(models, threads))
        machine["vm_initialization"](manifest.device, 0, _POOLED_ALLOCATOR, CPU, 0, _POOLED_ALLOCATOR)
        transfer = Transfer(manifest.device)
        return cls(
            machine, runtime.convert([transfer.to_device(weight) for weight in weights]), manifest, threads, transfer
        )

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model once.

        Args:
            feeds: a numpy array or CPU torch tensor per input; they are read in place when they are contiguous and
                64-byte aligned, and copied otherwise. Types that numpy lacks are those of ``ml_dtypes``.

        Returns:
            The outputs by name: torch tensors when an input was one, else numpy arrays. They own their memory. Of
            types that torch lacks it gets the bytes.

        Raises:
            InputError: E-DATA, a name, dtype, rank, dimension or index does not fit the model; E-FORK, the session
                works on a GPU, and was loaded before this process was forked.
        """
        arrays = self._arguments(feeds)
        if self._inherited and self._transfer is not None:
            what = "a session on a GPU does not survive a fork"
            raise InputError("E-FORK", what, cure="load the artifact again in the child process")
        try:
            with self._lock, running(self._threads), serving(self):
                results = self._computed(arrays)
        except Exception as error:
            raise _refusal(error) from error
        if len(results) != len(self.outputs):
            what = f"the code has {len(results)} outputs, the manifest {len(self.outputs)}"
            raise InputError("E-ARTIFACT", what, cure="compile the model again")
        if any(type(value).__module__ == "torch" for value in feeds.values()):
            return {info.name: _as_torch(info, result) for info, result in zip(self.outputs, results)}
        return {info.name: _as_array(info, result) for info, result in zip(self.outputs, results)}

    def _arguments(self, feeds: Mapping[str, Any]) -> list[Any]:
        """The inputs in order, checked."""
        if not isinstance(feeds, Mapping):
            what = f"the inputs are {type(feeds).__name__}, not a dict"
            raise InputError("E-DATA", what, cure="give a dict of an array for each input")
        sizes: dict[str, int] = {}
        if feeds.keys() != {info.name for info in self.inputs}:
            _refuse_names(feeds, self.inputs)
        arrays = [_argument(info, feeds[info.name], sizes, self.manifest.empty) for info in self.inputs]
        for name, most in self.manifest.limits.items():
            if sizes.get(name, 0) > most:
                raise InputError("E-DATA", f"dimension {name} is {sizes[name]}", cure=f"give at most {most}")
        return arrays

    def _computed(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """The outputs as the runtime's tensors in this process's memory."""
        if self._transfer is None:
            return list(self._main(*arrays, self._weights))
        moved = [self._transfer.to_device(array) for array in arrays]
        return [self._transfer.to_host(result) for result in self._main(*moved, self._weights)]

    @contextmanager
    def watched(self, callback: Callable[..., int]) -> Iterator[None]:
        """Meanwhile call ``callback(function, name, before, result, *arguments)`` before and after every kernel."""
        self.machine["set_instrument"](callback)
        try:
            yield
        finally:
            self.machine["set_instrument"](None)


_sessions: WeakSet[Session] = WeakSet()
_forking = threading.Lock()
_held: list[Session] = []


def _before_fork() -> None:
    """Wait until no other thread is within a run: a child would inherit its locks, and never see them released."""
    _forking.acquire()
    _held.extend(_living())
    for session in _held:
        session._lock.acquire()


def _living() -> list[Session]:
    """All sessions; another thread may load one meanwhile."""
    while True:
        with suppress(RuntimeError):  # the set has changed while it was gone through
            return list(_sessions)


def _after_fork() -> None:
    for session in _held:
        session._lock.release()
    _held.clear()
    _forking.release()


def _after_fork_in_child() -> None:
    for session in _held:
        session._inherited = True
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _argument(info: TensorInfo, value: Any, sizes: dict[str, int], empty: Collection[str]) -> Any:
    """An input as the runtime takes it, after its type, shape and range were checked against the manifest."""
    array = value if isinstance(value, np.ndarray) else _as_numpy(info, value)
    if array.dtype != array_type(info.dtype):
        raise _data_error(info, f"has dtype {array.dtype}, the model takes {info.dtype}")
    if array.ndim != len(info.shape):
        raise _data_error(info, f"has rank {array.ndim}, the model takes {_shape(info)}")
    for given, wanted in zip(array.shape, info.shape):
        if given == 0 and wanted != 0 and wanted not in empty:
            raise _data_error(info, f"is empty: its shape is {list(array.shape)}")
        if given != (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, given)):
            raise _data_error(info, f"has shape {list(array.shape)}, the model takes {_shape(info)}")
    if info.values is not None:
        array = aligned_copy(array)  # the caller's could be changed after it was checked
        if array.size and (array.min() < info.values[0] or array.max() > info.values[1]):
            raise _data_error(info, f"holds values outside {info.values[0]} to {info.values[1]}")
    return _aligned(array.view(stored_type(info.dtype)))


def _as_array(info: TensorInfo, result: Any) -> npt.NDArray[Any]:
    return np.from_dlpack(result).view(array_type(info.dtype))


def _as_torch(info: TensorInfo, result: Any) -> Any:
    import torch

    tensor, dtype = torch.from_dlpack(result), getattr(torch, info.dtype, None)
    if stored_type(info.dtype) == info.dtype or dtype is None or dtype.itemsize != tensor.dtype.itemsize:
        return tensor
    return tensor.view(dtype)


def _as_numpy(info: TensorInfo, value: Any) -> npt.NDArray[Any]:
    try:
        if stored_type(info.dtype) != info.dtype and str(getattr(value, "dtype", "")) == f"torch.{info.dtype}":
            import torch

            value = value.view(getattr(torch, stored_type(info.dtype)))
            return np.from_dlpack(value).view(array_type(info.dtype))
        return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except (RuntimeError, TypeError, ValueError, BufferError) as error:
        raise _data_error(info, f"is neither a numpy array nor a CPU tensor ({error})") from error


def _aligned(array: npt.NDArray[Any]) -> Any:
    """The array itself when the runtime can read it in place, else an aligned copy."""
    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous or not array.flags.writeable:
        array = aligned_copy(array)
    return as_tensor(array)


def _shape(info: TensorInfo) -> str:
    return "[" + ", ".join(str(dim) for dim in info.shape) + "]"


def _data_error(info: TensorInfo, what: str) -> InputError:
    return InputError("E-DATA", f"input {info.name} {what}", cure="give inputs as the manifest lists them")


def _refusal(error: Exception) -> InputError:
    """What made compiled code end a run: an assertion of ours, or a size that the runtime found not to fit."""
    message = " ".join(str(error).split())
    if REFUSAL in message:
        what = message.split(REFUSAL, 1)[1]
        return InputError("E-DATA", what, cure="check the values and shapes of the inputs")
    what = f"the model does not run on this data: {message[:300] or type(error).__name__}"
    return InputError("E-DATA", what, cure="check the shapes of the inputs")


def _refuse_names(feeds: Mapping[str, Any], inputs: Sequence[TensorInfo]) -> None:
    names = [info.name for info in inputs]
    missing = [name for name in names if name not in feeds]
    extra = [name for name in feeds if name not in names]
    what = f"input {missing[0]} is missing" if missing else f"there is no input {extra[0]}"
    raise InputError("E-DATA", what, where=f"inputs are {', '.join(names)}", cure="give exactly these")
