"""Arrays by name in an ``.npz`` file, where ``numpy.savez`` takes some names for its own options."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from xopt.errors import InputError

_LONGEST_NAME = 60_000


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what ``numpy.load`` reads.

    Args:
        file: open for writing.
        arrays: by name.

    Raises:
        InputError: ``E-OUTPUT``, a name cannot be one in such a file.
    """
    for name in arrays:
        if (problem := _problem(name)) is not None:
            cure = "take the array from Session.run in Python, or rename it in the model"
            raise InputError("E-OUTPUT", f"an .npz file cannot hold {name!r}: the name {problem}", cure=cure)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _problem(name: str) -> str | None:
    """Why a name cannot be a file's in a zip archive: such files are also unpacked by others than numpy."""
    encoded = name.encode("utf-8", "replace")
    if "\0" in name or encoded.decode() != name:
        return "holds characters that cannot be written"
    if len(encoded) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    return "leads out of the archive" if ".." in name.replace("\\", "/").split("/") else None
