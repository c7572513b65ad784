"""Write a folder of results all at once: what was there stays until the new one is complete."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xopt.errors import InputError

MARKERS = ("report.json", "manifest.json")
"""A folder with one of these files is one of ours, and may be replaced."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check(path: Path) -> None:
    """Refuse a place that cannot be written, or that holds somebody else's files; InputError E-OUTPUT."""
    parent = path.absolute().parent
    if path.exists() and not path.is_dir():
        raise InputError("E-OUTPUT", "the output is a file", where=str(path), cure="name a folder")
    if path.is_dir() and any(path.iterdir()) and not any((path / marker).is_file() for marker in MARKERS):
        raise InputError("E-OUTPUT", "the folder holds other files", where=str(path), cure="name a new folder")
    nearest = next(folder for folder in (parent, *parent.parents) if folder.exists())
    try:
        Path(tempfile.mkdtemp(dir=nearest, prefix=f".{path.name}.")).rmdir()
    except OSError as error:
        raise _unwritable(nearest, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        InputError: E-OUTPUT: no permission, the disk is full.
    """
    check(path)
    path = path.absolute()
    fresh: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        _swap(fresh, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # it names the file in the folder that is about to vanish
            raise _unwritable(path, error.__cause__) from error
        raise
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot write ({error.strerror or error})"
    return InputError("E-OUTPUT", what, where=str(path), cure="name another folder with -o")


def _swap(fresh: Path, path: Path) -> None:
    """Put ``fresh`` in the place of ``path``; an old folder is exchanged in one system call."""
    if not path.exists():
        fresh.rename(path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(fresh), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE)
    if done != 0:  # a file system without exchange: two renames, the old folder back if the second fails
        aside = fresh.with_name(f"{fresh.name}.old")
        path.rename(aside)
        try:
            fresh.rename(path)
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
