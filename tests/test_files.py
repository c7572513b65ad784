"""Files that are none: folders, pipes, sockets, devices, and files without an end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from xopt import files
from xopt.errors import InputError


def refusal(path: str | Path, most: int = 100) -> str:
    with pytest.raises(InputError) as caught:
        files.read_text(path, "the recipe", most)
    assert caught.value.code == "E-FILE" and caught.value.cure
    return caught.value.what


def test_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é", encoding="utf-8")
    assert files.read_text(tmp_path / "a", "the recipe", 2) == "é"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (pipe, "a pipe"),
        (bound, "a socket"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes(bytes(101)), "larger than"),
        (lambda path: path.write_bytes(b"\xff"), "not UTF-8"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    make(tmp_path / "it")
    assert word in refusal(tmp_path / "it")


@pytest.mark.parametrize("path", ["", "nul\0l", "x" * 5000, "/dev/null/x", "/proc/self/mem/x"])
def test_paths_that_cannot_be(path: str) -> None:
    assert "cannot be read" in refusal(path)
