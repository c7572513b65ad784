"""Run a compiled artifact with nothing but TVM's runtime: neither the compiler, torch nor onnx is imported."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xopt.errors import InputError
from xopt.runtime.device import CPU, CUDA, Transfer, load_cuda_runtime
from xopt.runtime.lean import without_torch
from xopt.runtime.manifest import (
    ALIGNMENT,
    Manifest,
    TensorInfo,
    digest,
    machine_features,
    manifest_path,
    weights_path,
)
from xopt.runtime.threads import configure, settled

_POOLED_ALLOCATOR = 2


class Session:
    """A loaded artifact.

    Attributes:
        inputs: what ``run`` takes, in order.
        outputs: what ``run`` returns, in order.
        manifest: everything recorded at compile time.

    ``run`` is not safe to call from several threads at once; load one session per thread.
    """

    def __init__(
        self,
        machine: Any,
        weights: Any,
        manifest: Manifest,
        threads: int,
        transfer: Transfer | None = None,
    ) -> None:
        self.machine = machine
        self._threads = threads
        self._transfer = transfer
        self.inputs: tuple[TensorInfo, ...] = manifest.inputs
        self.outputs: tuple[TensorInfo, ...] = manifest.outputs
        self.manifest = manifest
        self._main = machine["main"]
        self._weights = weights

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
        """Load the artifact ``path`` (the ``.so``, or its folder when the library is called ``model.so``).

        Args:
            path: the library; its weights and manifest lie beside it.
            threads: threads that kernels run on, the caller's and others, each on a core of its own; physical cores
                by default.

        Raises:
            InputError: E-ARTIFACT, a file is missing, changed since it was written, or of another format; E-CPU,
                the code is for another machine.
        """
        library = Path(path).resolve()
        library = library / "model.so" if library.is_dir() else library
        manifest, code = _checked(library)
        runtime = _runtime()
        threads = threads or physical_cores()
        configure(threads)
        if manifest.device == CUDA:
            load_cuda_runtime(_tvm_libraries())
        machine = _load_code(runtime, code)["vm_load_executable"]()
        weights = _map_weights(runtime, library, manifest)
        if manifest.device == CPU:
            machine["vm_initialization"](CPU, 0, _POOLED_ALLOCATOR)
            return cls(machine, runtime.convert(weights), manifest, threads)
        machine["vm_initialization"](manifest.device, 0, _POOLED_ALLOCATOR, CPU, 0, _POOLED_ALLOCATOR)
        transfer = Transfer(manifest.device)
        return cls(
            machine, runtime.convert([transfer.to_device(weight) for weight in weights]), manifest, threads, transfer
        )

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model once.

        Args:
            feeds: a numpy array or CPU torch tensor per input; they are read in place when they are contiguous and
                64-byte aligned, and copied otherwise.

        Returns:
            The outputs by name: torch tensors when an input was one, else numpy arrays. They own their memory.

        Raises:
            InputError: E-DATA, a name, dtype, rank, dimension or index does not fit the model.
        """
        sizes: dict[str, int] = {}
        if feeds.keys() != {info.name for info in self.inputs}:
            _refuse_names(feeds, self.inputs)
        arrays = [_argument(info, feeds[info.name], sizes) for info in self.inputs]
        for name, most in self.manifest.limits.items():
            if sizes.get(name, 0) > most:
                raise InputError("E-DATA", f"dimension {name} is {sizes[name]}", cure=f"give at most {most}")
        if self._transfer is None:
            with settled(self._threads):
                results = self._main(*arrays, self._weights)
        else:
            moved = [self._transfer.to_device(array) for array in arrays]
            results = [self._transfer.to_host(result) for result in self._main(*moved, self._weights)]
        if any(type(value).__module__ == "torch" for value in feeds.values()):
            import torch

            return {info.name: torch.from_dlpack(result) for info, result in zip(self.outputs, results)}
        return {info.name: np.from_dlpack(result) for info, result in zip(self.outputs, results)}

    @contextmanager
    def watched(self, callback: Callable[..., int]) -> Iterator[None]:
        """Meanwhile call ``callback(function, name, before, result, *arguments)`` before and after every kernel."""
        self.machine["set_instrument"](callback)
        try:
            yield
        finally:
            self.machine["set_instrument"](None)


def _checked(library: Path) -> tuple[Manifest, bytes]:
    """The manifest and the code, after the files were compared with their digests and the CPU with the code's needs."""
    where = str(library)
    for file in (library, manifest_path(library), weights_path(library)):
        if not file.is_file():
            raise InputError(
                "E-ARTIFACT", f"{file.name} is missing", where=where, cure="keep the artifact's files together"
            )
    manifest = Manifest.from_json(manifest_path(library).read_text(), str(manifest_path(library)))
    code = library.read_bytes()
    found = {library.name: hashlib.sha256(code).hexdigest(), weights_path(library).name: digest(weights_path(library))}
    for name, value in found.items():
        if manifest.digests.get(name) != value:
            raise InputError(
                "E-ARTIFACT",
                f"{name} is not the file that was compiled",
                where=where,
                cure="compile the model again, and do not load artifacts from untrusted places",
            )
    missing = [name for name in manifest.features if name not in machine_features()]
    if missing:
        raise InputError(
            "E-CPU",
            f"the code is for {manifest.target} and needs {', '.join(missing)}",
            where=where,
            cure="compile it on this machine, or for a target that this machine has",
        )
    return manifest, code


def _load_code(runtime: Any, code: bytes) -> Any:
    """Load a shared library from memory: exactly the bytes that were checked, under a name that was never used before.

    (The dynamic linker takes a library of the same name for the same library, even after the file was replaced.)
    """
    descriptor = os.memfd_create("xopt-model")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(code)
        with tempfile.TemporaryDirectory(prefix="xopt-") as folder:
            link = Path(folder) / "model.so"
            link.symlink_to(f"/proc/self/fd/{descriptor}")
            return runtime.load_module(str(link), keep_module_alive=False)
    finally:
        os.close(descriptor)


_LIBRARY: ctypes.CDLL | None = None


def _runtime() -> Any:
    """``tvm_ffi`` with TVM's runtime library loaded."""
    global _LIBRARY
    with without_torch():
        import tvm_ffi
    if _LIBRARY is None:
        _LIBRARY = ctypes.CDLL(str(_tvm_libraries() / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(_tvm_libraries() / "libtvm_runtime_extra.so"), ctypes.RTLD_GLOBAL)  # sorting: TopK
    return tvm_ffi


def _tvm_libraries() -> Path:
    spec = find_spec("tvm")
    if spec is None or spec.origin is None:
        raise InputError("E-TOOLCHAIN", "TVM's runtime is missing", cure="install the package apache-tvm")
    return Path(spec.origin).parent / "lib"


def physical_cores() -> int:
    """The physical cores that this process may run on."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return max(len(siblings), 1)


def _map_weights(runtime: Any, library: Path, manifest: Manifest) -> list[Any]:
    """The weights as tensors over the mapped file; pages are shared until somebody writes to them."""
    path = weights_path(library)
    size = path.stat().st_size
    if not manifest.weights:
        return []
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b"")
    tensors = []
    for info in manifest.weights:
        part = content[info.offset : info.offset + info.bytes] if info.offset >= 0 else content[:0]
        try:
            array = np.frombuffer(part, np.dtype(info.dtype)).reshape(info.shape)
        except (TypeError, ValueError) as error:
            what = f"the manifest describes weight {info.name} wrongly: it lies outside the file or has another size"
            raise InputError("E-ARTIFACT", what, where=str(path), cure="compile the model again") from error
        tensors.append(runtime.from_dlpack(array))
    return tensors


def _argument(info: TensorInfo, value: Any, sizes: dict[str, int]) -> Any:
    """An input as the runtime takes it, after its type, shape and range were checked against the manifest."""
    array = value if isinstance(value, np.ndarray) else _as_numpy(info, value)
    if array.dtype != info.dtype:
        raise _data_error(info, f"has dtype {array.dtype}, the model takes {info.dtype}")
    if array.ndim != len(info.shape):
        raise _data_error(info, f"has rank {array.ndim}, the model takes {_shape(info)}")
    for given, wanted in zip(array.shape, info.shape):
        if given == 0:
            raise _data_error(info, f"is empty: its shape is {list(array.shape)}")
        if given != (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, given)):
            raise _data_error(info, f"has shape {list(array.shape)}, the model takes {_shape(info)}")
    if info.values is not None and (array.min() < info.values[0] or array.max() > info.values[1]):
        raise _data_error(info, f"holds values outside {info.values[0]} to {info.values[1]}")
    return _aligned(array)


def _as_numpy(info: TensorInfo, value: Any) -> npt.NDArray[Any]:
    try:
        return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except (RuntimeError, TypeError, ValueError, BufferError) as error:
        raise _data_error(info, f"is neither a numpy array nor a CPU tensor ({error})") from error


def _aligned(array: npt.NDArray[Any]) -> Any:
    """The array itself when the runtime can read it in place, else an aligned copy."""
    import tvm_ffi

    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous or not array.flags.writeable:
        array = aligned_copy(array)
    return tvm_ffi.from_dlpack(array)


def aligned_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that lies as the runtimes' own outputs do, so that none of them has to copy it again."""
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy: npt.NDArray[Any] = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _shape(info: TensorInfo) -> str:
    return "[" + ", ".join(str(dim) for dim in info.shape) + "]"


def _data_error(info: TensorInfo, what: str) -> InputError:
    return InputError("E-DATA", f"input {info.name} {what}", cure="give inputs as the manifest lists them")


def _refuse_names(feeds: Mapping[str, Any], inputs: Sequence[TensorInfo]) -> None:
    names = [info.name for info in inputs]
    missing = [name for name in names if name not in feeds]
    extra = [name for name in feeds if name not in names]
    what = f"input {missing[0]} is missing" if missing else f"there is no input {extra[0]}"
    raise InputError("E-DATA", what, where=f"inputs are {', '.join(names)}", cure="give exactly these")
