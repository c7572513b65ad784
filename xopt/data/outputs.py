"""Write a model's outputs to an ``.npz`` file, and over nothing but such a file."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xopt.data import npz
from xopt.errors import InputError
from xopt.ir.io import output_errors, replacing

MARK = b"outputs of xopt run"
"""Comment of the archive."""


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
        archive.comment = MARK
    with output_errors(path), replacing(path) as file:
        file.write(content.getbuffer())


def _is_ours(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == MARK
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
