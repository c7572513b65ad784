"""Arrays by name in an ``.npz`` file.

Nobody vouches for one that is read: what it holds must be plain arrays of numbers, of the sizes that it really has. One
that is written takes every name that an archive can hold, where ``numpy.savez`` keeps some for its own options.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from xopt import files
from xopt.errors import InputError

NUMBERS = "biuf"
"""Kinds of numpy types that are numbers to a model."""
_LONGEST_NAME = 60_000
_PLENTY = 1 << 30
_LARGEST_RATIO = 100
"""Times its size that a file may unpack to, beyond a gigabyte; padded token ids come to forty."""
_CURE = "write it with numpy.savez(path, input_name=array, ...)"


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name.

    Raises:
        InputError: E-FILE, it cannot be read; E-DATA, it is no archive of arrays of numbers, is damaged, holds a name
            twice, or unpacks to more than there is memory for.
    """
    arrays: dict[str, np.ndarray] = {}
    with files.open_regular(path, "the data file") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy comments on headers of old versions
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # what the parser of a foreign file raises is not known
            raise _damaged(f"this is no .npz file ({_brief(error)})", path) from error
        _check_size(sum(item.file_size for item in archive.infolist()), path)
        for item in archive.infolist():
            name = item.filename.removesuffix(".npy")
            if name in arrays:
                raise _damaged(f"array {name!r} is there twice", path)
            try:
                arrays[name] = _array(archive, item)
            except Exception as error:
                raise _damaged(
                    f"{item.filename!r} in it is no plain array of numbers ({_brief(error)})", path
                ) from error
    return arrays


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what ``numpy.load`` reads.

    Args:
        file: open for writing.
        arrays: by name.

    Raises:
        InputError: ``E-OUTPUT``, a name cannot be one in such a file.
    """
    for name in arrays:
        if (problem := _fault_of(name)) is not None:
            cure = "take the array from Session.run in Python, or rename it in the model"
            raise InputError("E-OUTPUT", f"an .npz file cannot hold {name!r}: the name {problem}", cure=cure)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _array(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(item) as file:
        shape, dtype = _header(file)
        if dtype.kind not in NUMBERS:
            raise ValueError(f"it holds {dtype}")
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != item.file_size - file.tell():
            raise ValueError(f"{item.file_size - file.tell()} bytes do not make {list(shape)} of {dtype}")
    with archive.open(item) as file:
        array: np.ndarray = npy.read_array(file, allow_pickle=False)
        file.read(1)  # the end, where the checksum is compared
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not for numbers")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return shape, dtype


def _check_size(needed: int, path: Path) -> None:
    """Refuse what does not fit into memory, or grows out of all proportion, before it is unpacked."""
    import psutil

    available = psutil.virtual_memory().available
    if needed > available:
        what = f"the arrays take {needed >> 20} MiB, {available >> 20} MiB of memory are free"
        raise InputError("E-DATA", what, where=str(path), cure="give fewer samples")
    if needed > max(_PLENTY, _LARGEST_RATIO * path.stat().st_size):
        what = f"the file unpacks to {needed >> 20} MiB, more than {_LARGEST_RATIO} times its size"
        raise InputError("E-DATA", what, where=str(path), cure="write it with numpy.savez, without compression")


def _damaged(what: str, path: Path) -> InputError:
    return InputError("E-DATA", what, where=str(path), cure=_CURE)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__


def _fault_of(name: str) -> str | None:
    """Why a name cannot be a file's in a zip archive: such files are also unpacked by others than numpy."""
    encoded = name.encode("utf-8", "replace")
    if "\0" in name or encoded.decode() != name:
        return "holds characters that cannot be written"
    if len(encoded) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    return "leads out of the archive" if ".." in name.replace("\\", "/").split("/") else None
