"""Read an artifact's files into memory, checked: what runs is what was checked, whatever becomes of the files."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xopt.errors import InputError
from xopt.files import check_memory
from xopt.runtime import threads
from xopt.runtime.arrays import as_tensor
from xopt.runtime.lean import without_torch
from xopt.runtime.manifest import (
    LARGEST_MANIFEST,
    Manifest,
    WeightInfo,
    machine_features,
    manifest_path,
    weights_path,
)

LARGEST_CODE = 1 << 30
"""Bytes of a library."""
_CHUNK = 1 << 24
_MACHINES = {"x86_64": 62, "aarch64": 183}
_HEADER = struct.Struct("<4s2B10xHHI3QI6H")
_LOAD, _SEGMENT = 1, struct.Struct("<2I6Q")


def read_manifest(library: Path) -> Manifest:
    """The manifest beside a library, after all three files were found and the CPU has what the code needs.

    Raises:
        InputError: E-ARTIFACT, E-CPU.
    """
    for file in (library, manifest_path(library), weights_path(library)):
        if not file.is_file():
            raise refused(f"{file.name} is missing", library, "keep the artifact's files together")
    with _reading(manifest_path(library), library), manifest_path(library).open("rb") as opened:
        text = opened.read(LARGEST_MANIFEST + 1)
    manifest = Manifest.from_json(text, str(manifest_path(library)))
    missing = [name for name in manifest.features if name not in machine_features()]
    if missing:
        raise InputError(
            "E-CPU",
            f"the code is for {manifest.target} and needs {', '.join(missing)}",
            where=str(library),
            cure="compile it on this machine, or for a target that this machine has",
        )
    return manifest


def read_code(library: Path, manifest: Manifest) -> bytes:
    """The library's bytes, which have the manifest's digest and are a whole library for this machine."""
    with _reading(library, library):
        size = library.stat().st_size
        if size > LARGEST_CODE:
            raise refused(f"{library.name} has {size} bytes, more than any library", library)
        code = library.read_bytes()
    _compare(library, hashlib.sha256(code).hexdigest(), manifest, library)
    if (problem := _incomplete(code)) is not None:
        raise refused(f"{library.name} {problem}", library)
    return code


def _compare(file: Path, digest: str, manifest: Manifest, library: Path) -> None:
    if manifest.digests.get(file.name) != digest:
        cure = "compile the model again, and do not load artifacts from untrusted places"
        raise refused(f"{file.name} is not the file that was compiled", library, cure)


def _incomplete(code: bytes) -> str | None:
    """What is wrong with a library before the dynamic linker maps it: it would read past the end of a cut one."""
    if len(code) < _HEADER.size:
        return "is no library"
    magic, bits, order, kind, machine, _, _, segments, sections, _, _, width, count, section_width, section_count, _ = (
        _HEADER.unpack_from(code)
    )
    if magic != b"\x7fELF" or bits != 2 or order != 1 or kind != 3:
        return "is no 64-bit library"
    if machine != _MACHINES.get(os.uname().machine):
        return "is for another kind of machine"
    if (
        width != _SEGMENT.size
        or segments + width * count > len(code)
        or sections + section_width * section_count > len(code)
    ):
        return "is cut off"
    for index in range(count):
        kind, _, offset, _, _, in_file, _, _ = _SEGMENT.unpack_from(code, segments + index * width)
        if kind == _LOAD and offset + in_file > len(code):
            return "is cut off"
    return None


def load_code(runtime: Any, code: bytes) -> Any:
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
            module = runtime.load_module(str(link), keep_module_alive=False)
            threads.install(link)
            return module
    finally:
        os.close(descriptor)


def read_weights(library: Path, manifest: Manifest) -> list[Any]:
    """The weights as tensors of this process's own memory, whose bytes have the manifest's digest."""
    path = weights_path(library)
    size = max((info.offset + info.bytes for info in manifest.weights), default=0)
    state, filled = hashlib.sha256(), 0
    with _reading(path, library), path.open("rb", buffering=0) as file:
        if (found := os.fstat(file.fileno()).st_size) != size:
            more = "more" if size > found else "less"
            raise refused(f"{path.name} has {found} bytes, and the manifest describes {more}", library)
        content = _memory(size, library)
        while filled < size and (count := file.readinto(content[filled : filled + _CHUNK])):
            state.update(content[filled : filled + count])
            filled += count
    _compare(path, state.hexdigest() if filled == size else "", manifest, library)
    return [as_tensor(_weight(content, info)) for info in manifest.weights]


def _memory(size: int, library: Path) -> memoryview:
    """So many bytes of this process's own; InputError E-MEMORY where there is no place for them."""
    check_memory(size, str(library))
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


@contextmanager
def _reading(file: Path, library: Path) -> Iterator[None]:
    """An ``OSError`` of the block as an E-ARTIFACT about one of the files."""
    try:
        yield
    except OSError as error:
        raise refused(f"{file.name} cannot be read ({error.strerror or error})", library, "check the files") from error


def _weight(content: memoryview, info: WeightInfo) -> npt.NDArray[Any]:
    part = content[info.offset : info.offset + info.bytes]
    return np.frombuffer(part, np.dtype(info.dtype)).reshape(info.shape)


def refused(what: str, library: Path, cure: str = "compile the model again") -> InputError:
    return InputError("E-ARTIFACT", what, where=str(library), cure=cure)


_library: ctypes.CDLL | None = None


def runtime() -> Any:
    """``tvm_ffi`` with TVM's runtime library loaded."""
    global _library
    with without_torch():
        import tvm_ffi
    if _library is None:
        _library = ctypes.CDLL(str(tvm_libraries() / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(tvm_libraries() / "libtvm_runtime_extra.so"), ctypes.RTLD_GLOBAL)  # sorting: TopK
    return tvm_ffi


def tvm_libraries() -> Path:
    """The folder of TVM's shared libraries; InputError E-TOOLCHAIN where it is not installed."""
    spec = find_spec("tvm")
    if spec is None or spec.origin is None:
        raise InputError("E-TOOLCHAIN", "TVM's runtime is missing", cure="install the package apache-tvm")
    return Path(spec.origin).parent / "lib"
