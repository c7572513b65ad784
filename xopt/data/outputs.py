"""Write a model's outputs to an ``.npz`` file, and over nothing but such a file."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xopt.data import npz
from xopt.errors import InputError
from xopt.ir.io import output_errors, replacing

MARK = b"outputs of xopt run, "
"""What the comment of the archive starts with; the digest of the file follows, up to its end."""
_UNSIGNED = b"0" * 64


def check(path: Path) -> None:
    """Refuse a place that holds anything but outputs written here, or whose folder is missing; InputError E-OUTPUT."""
    with output_errors(path):
        if path.is_dir() or (path.is_file() and not _is_ours(path)):
            what = "the file is not one that xopt run has written, or it was changed since"
            raise InputError("E-OUTPUT", what, where=str(path), cure="name another file with -o")
        os.stat(os.path.dirname(os.path.realpath(path)))


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name; an interrupted run leaves the old file. InputError E-OUTPUT."""
    check(path)
    content = io.BytesIO()
    npz.write(content, arrays)
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = MARK + _UNSIGNED
    content.seek(-len(_UNSIGNED), io.SEEK_END)
    content.write(hashlib.sha256(content.getbuffer()).hexdigest().encode())
    with output_errors(path), replacing(path) as file:
        file.write(content.getbuffer())


def _is_ours(path: Path) -> bool:
    """Whether a file is as `write` has left it."""
    with path.open("rb") as file:
        signed = file.seek(0, io.SEEK_END) - len(_UNSIGNED)
        if signed < len(MARK):
            return False
        file.seek(signed - len(MARK))
        if file.read(len(MARK)) != MARK:
            return False
        digest = file.read()
        file.seek(0)
        state, left = hashlib.sha256(), signed
        while left and (part := file.read(min(left, 1 << 20))):
            state.update(part)
            left -= len(part)
        state.update(_UNSIGNED)
        return state.hexdigest().encode() == digest
