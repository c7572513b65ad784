"""Temporary files: in one folder of the command's own, which never outlives the next command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.acceptance.command import xopt as command
from tests.ir import builders
from xopt import scratch
from xopt.errors import InputError
from xopt.ir.io import save

DEAD = """
import os, signal, sys
sys.path[:] = {path!r}
from xopt.scratch import scratch
with scratch() as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return place


def test_everybody_writes_into_it_and_nothing_stays(temporary: Path) -> None:
    with scratch.scratch() as folder:
        assert folder.parent == temporary
        assert tempfile.gettempdir() == str(folder)
        said = subprocess.run(["mktemp"], capture_output=True, text=True, check=True).stdout
        assert Path(said.strip()).parent == folder
        assert scratch.outer() == temporary
    assert list(temporary.iterdir()) == []
    assert os.environ["TMPDIR"] == str(temporary)


def test_what_a_killed_command_has_left_the_next_one_removes(temporary: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DEAD.format(path=sys.path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(list(temporary.iterdir())) == 1
    with scratch.scratch():
        assert len(list(temporary.iterdir())) == 1
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("lock", [None, b"", b"mine\n", scratch.MARK + b"and more"])
def test_folders_of_others_stay(temporary: Path, lock: bytes | None) -> None:
    mine = temporary / "xopt-notes"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    if lock is not None:
        (mine / "lock").write_bytes(lock)
    with scratch.scratch(), scratch.scratch():
        pass
    assert (mine / "thesis.tex").exists()


def test_the_folder_of_a_living_command_stays(temporary: Path) -> None:
    with scratch.scratch() as folder:
        scratch._sweep(temporary)
        assert folder.is_dir()


@pytest.mark.parametrize("kind", ["missing", "a file", "write-protected", "full"])
def test_a_folder_that_cannot_be_used_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.touch()
    elif kind == "write-protected":
        place.mkdir(mode=0o555)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write anywhere")
    elif kind == "full":
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", place], capture_output=True).returncode:
            pytest.skip("this user may not mount file systems")
    save(builders.vit(layers=1), tmp_path / "m.onnx")
    monkeypatch.setenv("TMPDIR", str(place))
    try:
        with pytest.raises(InputError, match=r"temporary files cannot be written .*place, set TMPDIR"):
            scratch.outer()
        for name in ("optimize", "compile", "tune", "run", "bench"):
            output = [] if name in ("tune", "bench") else ["-o", tmp_path / "new" / "model.so"]
            message = command(name, tmp_path / "m.onnx", *output).refused("E-OUTPUT")
            assert str(place) in message
            assert "TMPDIR" in message
    finally:
        if kind == "full":
            subprocess.run(["umount", place], check=True)
    assert not (tmp_path / "new").exists()
