"""Read a file that a user names: only a regular one, only up to a size and to what memory holds, and never waiting for
somebody to write it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from xopt.errors import InputError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | os.PathLike[str], what: str, cure: str = "check the path") -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: the file; a symbolic link is followed.
        what: what the file is to the user, such as ``"the recipe"``.
        cure: what to do when it is no file, or cannot be read.

    Raises:
        InputError: E-FILE, it is not there, may not be read, or is a folder, a pipe, a socket or a device.
    """
    where = os.fspath(path)
    try:
        descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer must not wait
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENXIO:  # sockets cannot be opened at all
            raise InputError("E-FILE", f"{what} is a socket", where=where, cure=cure) from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError("E-FILE", f"{what} cannot be read: {reason}", where=where, cure=cure) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((word for test, word in _KINDS if test(mode)), "no file")
        raise InputError("E-FILE", f"{what} is {kind}", where=where, cure=cure)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], what: str, most: int, cure: str = "check the path") -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        InputError: E-FILE as :func:`open_regular`, or the file is larger.
    """
    where = os.fspath(path)
    with open_regular(path, what, cure) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise InputError("E-FILE", f"{what} cannot be read: {error.strerror}", where=where, cure=cure) from error
    if len(content) > most:
        raise InputError("E-FILE", f"{what} is larger than {most >> 10} KiB", where=where, cure=cure)
    return content


def read_text(path: str | os.PathLike[str], what: str, most: int, cure: str = "check the path") -> str:
    """The UTF-8 text of a regular file of at most ``most`` bytes.

    Raises:
        InputError: E-FILE as :func:`read_bytes`, or the file is no text.
    """
    try:
        return read_bytes(path, what, most, cure).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("E-FILE", f"{what} is not UTF-8 text", where=os.fspath(path), cure=cure) from error


def check_memory(weights: int, where: str = "") -> None:
    """Refuse weights of so many bytes where memory has no place for them; InputError E-MEMORY."""
    import psutil

    if weights > (free := psutil.virtual_memory().available):
        what = f"the weights take {weights >> 20} MB, and {free >> 20} MB of memory are free"
        raise InputError("E-MEMORY", what, where=where, cure="use a machine with more memory")
