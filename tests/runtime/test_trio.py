"""An artifact's three files: replaced as one, and nobody else's files of the same names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xopt.errors import InputError
from xopt.runtime import trio
from xopt.runtime.manifest import digest, manifest_path, weights_path


def write(library: Path, text: str) -> None:
    """What a compiler does."""
    with trio.replacing(library) as fresh:
        fresh.write_text(f"{text} code")
        weights_path(fresh).write_text(f"{text} weights")
        (fresh.parent / "lib0.o").write_text("object file")
        digests = {path.name: digest(path) for path in (fresh, weights_path(fresh))}
        manifest_path(fresh).write_text(json.dumps({"format": 1, "digests": digests, "text": text}))


def content(library: Path) -> set[str]:
    """The first words of the three files."""
    texts = [path.read_text() for path in (library, weights_path(library))]
    return {*(text.split()[0] for text in texts), json.loads(manifest_path(library).read_text())["text"]}


def facts(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether a file was touched; that it was read does not count."""
    found = {path.name: path.lstat() for path in folder.iterdir() if path.name[0] != "."}
    return {name: (one.st_mode, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in found.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["model.so", "other.so"])
def test_an_artifact_is_replaced(name: str, tmp_path: Path) -> None:
    for text in ("one", "two"):
        write(tmp_path / "deep" / name, text)
        assert content(tmp_path / "deep" / name) == {text}
    assert len(names(tmp_path / "deep")) == 3


def interrupt(library: Path) -> None:
    with trio.replacing(library) as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old(tmp_path: Path) -> None:
    write(tmp_path / "model.so", "one")
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "model.so")
    assert content(tmp_path / "model.so") == {"one"}
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "deep" / "model.so")
    assert len(names(tmp_path)) == 3


def foreign_library(library: Path) -> None:
    for path in (weights_path(library), manifest_path(library)):
        path.unlink()
    library.write_text("somebody's library")


def foreign_weights(library: Path) -> None:
    for path in (library, manifest_path(library)):
        path.unlink()


def foreign_manifest(library: Path) -> None:
    for path in (library, weights_path(library)):
        path.unlink()
    manifest_path(library).write_text('{"name": "web page", "digests": []}')


def changed_weights(library: Path) -> None:
    weights_path(library).write_text("my weights")


def link(library: Path) -> None:
    weights_path(library).rename(library.parent / "elsewhere")
    weights_path(library).symlink_to("elsewhere")


def folder_in_the_way(library: Path) -> None:
    library.unlink()
    library.mkdir()


def protected(library: Path) -> None:
    library.chmod(0o555)


@pytest.mark.parametrize(
    "change",
    [foreign_library, foreign_weights, foreign_manifest, changed_weights, link, folder_in_the_way, protected],
)
def test_other_files_of_these_names_are_left_alone(tmp_path: Path, change: Callable[[Path], None]) -> None:
    library = tmp_path / "model.so"
    write(library, "one")
    change(library)
    before = facts(tmp_path)
    with pytest.raises(InputError, match="would be replaced"):
        trio.check(library)
    with pytest.raises(InputError, match="would be replaced"):
        write(library, "two")
    assert facts(tmp_path) == before
    assert not any(name.startswith(".") for name in names(tmp_path))


KILLED = """
import os, pathlib, signal, sys
sys.path[:] = {path!r}
from tests.runtime.test_trio import write
from xopt.runtime import trio
count = []
def counted(do):
    def call(*given):
        count.append(1)
        if len(count) > int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*given)
    return call
if sys.argv[2] == "writing":
    pathlib.Path.write_text, sys.argv[2] = counted(pathlib.Path.write_text), "1"
trio.os.replace = counted(os.replace)
pathlib.Path.rmdir = counted(pathlib.Path.rmdir)
write(pathlib.Path(sys.argv[1]), "two")
"""


@pytest.mark.parametrize("moved", ["writing", 0, 1, 2, 3])
@pytest.mark.parametrize("finish", [trio.settle, trio.check])
def test_a_kill_while_the_files_are_written_or_move(
    tmp_path: Path, moved: str | int, finish: Callable[[Path], None]
) -> None:
    """Whoever comes next, to read or to write, finds one artifact whole, and nothing else."""
    library = tmp_path / "model.so"
    write(library, "one")
    code = KILLED.format(path=[str(Path.cwd()), *sys.path])
    done = subprocess.run([sys.executable, "-c", code, library, str(moved)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 4
    finish(library)
    assert content(library) == {"one" if moved == "writing" else "two"}
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
@pytest.mark.parametrize("change", [changed_weights, foreign_manifest, folder_in_the_way])
def test_what_a_user_has_put_there_after_a_kill_stays(
    tmp_path: Path, moved: int, change: Callable[[Path], None]
) -> None:
    library = tmp_path / "model.so"
    write(library, "one")
    code = KILLED.format(path=[str(Path.cwd()), *sys.path])
    subprocess.run([sys.executable, "-c", code, library, str(moved)], timeout=60)
    change(library)
    before = facts(tmp_path)
    trio.settle(library)
    for touch in (lambda: trio.check(library), lambda: write(library, "three")):
        with pytest.raises(InputError, match="would be replaced"):
            touch()
    assert facts(tmp_path) == before


def test_a_name_that_is_too_long_is_nothing_to_settle(tmp_path: Path) -> None:
    trio.settle(tmp_path / f"{'x' * 250}.so")


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    write(tmp_path / "model.so", "one")
    times = tmp_path.stat().st_mtime_ns
    trio.settle(tmp_path / "model.so")
    assert tmp_path.stat().st_mtime_ns == times


def test_a_user_s_folder_of_the_work_folder_s_name_stays(tmp_path: Path) -> None:
    mine = tmp_path / ".model.so.xopt-cache" / "swap"
    mine.mkdir(parents=True)
    (mine / "model.so").write_text("mine")
    trio.settle(tmp_path / "model.so")
    with pytest.raises(InputError, match="in the way"):
        write(tmp_path / "model.so", "one")
    assert os.listdir(tmp_path) == [".model.so.xopt-cache"]
    assert (mine / "model.so").read_text() == "mine"
