"""Output folders: the old or the new one, never half of one, and nobody else's files."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from xopt import folder
from xopt.errors import InputError


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def write(path: Path, text: str) -> None:
    with folder.replacing(path) as fresh:
        (fresh / "report.json").write_text(text)
        (fresh / f"{text}.txt").touch()


def interrupted(path: Path, error: BaseException) -> None:
    with folder.replacing(path) as fresh:
        (fresh / "half.txt").touch()
        raise error


def test_a_new_folder_appears_with_everything(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", "one")
    assert names(tmp_path / "deep" / "out") == ["one.txt", "report.json"]
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_folder_of_ours_is_replaced(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: type("Libc", (), {"renameat2": lambda *args: -1}))
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert names(tmp_path / "out") == ["report.json", "two.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), InputError("E-X", "x")])
def test_an_interrupted_write_leaves_the_old(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(type(error)):
        interrupted(tmp_path / "out", error)
    assert names(tmp_path / "out") == ["one.txt", "report.json"]
    assert names(tmp_path) == ["out"]


def test_an_interrupted_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), folder.replacing(tmp_path / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the disk is full") as caught, folder.replacing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.code == "E-OUTPUT"
    assert names(tmp_path) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        folder.check(tmp_path / "letters")


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for path in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(InputError) as caught:
            folder.check(path)
        assert caught.value.code == "E-OUTPUT"
