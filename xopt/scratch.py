"""One folder for all temporary files of a command, those of the compilers and runtimes it starts among them.

It is removed at the end; what a killed command has left is removed by the next one. A folder is known by its lock,
which says whose it is and which a living process holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xopt.errors import InputError

PREFIX = "xopt-"
LOCK = "lock"
MARK = b"temporary files of xopt\n"
VARIABLES = ("TMPDIR", "TEMP", "TMP")
"""Where the user's folder for temporary files is named; the first that is set counts."""
_outside: list[Path] = []


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that `tempfile`, and every process started meanwhile, takes for the one for temporary files.

    Raises:
        InputError: E-OUTPUT: the user's folder for temporary files is missing, full or not writable.
    """
    outside = outer()
    _sweep(outside)
    try:
        folder, lock = _made(outside)
    except OSError as error:
        raise _unusable(outside, error) from error
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    _outside.append(outside)
    try:
        yield folder
    finally:
        _outside.pop()
        tempfile.tempdir = before[0]
        os.environ.pop("TMPDIR")
        if before[1] is not None:
            os.environ["TMPDIR"] = before[1]
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def outer() -> Path:
    """The user's folder for temporary files, for what is to stay there; InputError E-OUTPUT when it cannot be used."""
    if _outside:
        return _outside[-1]
    named = next((found for name in VARIABLES if (found := os.environ.get(name))), None)
    try:
        place = Path(named or tempfile.gettempdir()).absolute()
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        raise _unusable(named or tempfile.tempdir or "/tmp", error) from error
    return place


def _unusable(place: str | Path, error: OSError) -> InputError:
    what = f"temporary files cannot be written ({error.strerror or error})"
    return InputError("E-OUTPUT", what, where=str(place), cure="set TMPDIR to a writable folder with space")


def _made(outside: Path) -> tuple[Path, int]:
    """A new folder, and the lock on it: locked before it gets its name, so that nobody takes it for a dead one's."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=outside))
    lock = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, MARK)
    os.rename(folder / f"{LOCK}.new", folder / LOCK)
    return folder, lock


def _sweep(outside: Path) -> None:
    """Remove the folders of commands that are no more."""
    for folder in outside.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.pread(lock, len(MARK) + 1, 0) == MARK:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
