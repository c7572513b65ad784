"""Outputs in an .npz file, which replaces nothing but such a file."""

from __future__ import annotations

import os
import resource
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xopt.data import outputs
from xopt.errors import InputError

ARRAYS = {"y": np.arange(6.0).reshape(2, 3)}


def facts(path: Path) -> tuple[int, ...]:
    """What tells whether a file was touched; that it was read does not count."""
    found = path.lstat()
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


def test_written_and_written_again(tmp_path: Path) -> None:
    for shift in (0, 1):
        outputs.write(tmp_path / "y.npz", {"y": ARRAYS["y"] + shift})
        with np.load(tmp_path / "y.npz") as archive:
            np.testing.assert_array_equal(archive["y"], ARRAYS["y"] + shift)
    assert [path.name for path in tmp_path.iterdir()] == ["y.npz"]


def calibration(path: Path) -> None:
    np.savez(path, pixel_values=np.zeros(3))


def thesis(path: Path) -> None:
    path.write_text("years of work")


def edited(path: Path) -> None:
    outputs.write(path, ARRAYS)
    with np.load(path) as archive:
        np.savez(path, **archive, more=np.zeros(3))


def added_to(path: Path) -> None:
    outputs.write(path, ARRAYS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "years of work")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [calibration, thesis, edited, added_to, folder])
def test_other_files_are_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "y.npz")
    before = facts(tmp_path / "y.npz")
    for attempt in (outputs.check, lambda path: outputs.write(path, ARRAYS)):
        with pytest.raises(InputError, match="not one that xopt run has written") as caught:
            attempt(tmp_path / "y.npz")
        assert caught.value.code == "E-OUTPUT"
    assert facts(tmp_path / "y.npz") == before


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "link.npz").symlink_to(tmp_path / "y.npz")
    outputs.write(tmp_path / "link.npz", ARRAYS)
    assert (tmp_path / "link.npz").is_symlink()
    assert (tmp_path / "y.npz").is_file()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_stays_one(device: str) -> None:
    """(As root a file could take its place.)"""
    if device == "/dev/full":
        with pytest.raises(InputError, match=r"No space left on device, /dev/full"):
            outputs.write(Path(device), ARRAYS)
    else:
        outputs.write(Path(device), ARRAYS)
    assert stat.S_ISCHR(os.stat(device).st_mode)


def test_a_missing_folder_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        outputs.check(tmp_path / "missing" / "y.npz")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    outputs.write(tmp_path / "y.npz", ARRAYS)
    before = (tmp_path / "y.npz").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write"):
            outputs.write(tmp_path / "y.npz", {"y": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "y.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["y.npz"]
