"""Output folders: the old or the new one, never half of one, and nobody else's files."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xopt import folder, ownership
from xopt.errors import InputError
from xopt.ownership import LISTING

CONTENT = ["one.txt", "report.json"]
WORK = ".out.xopt-cache"


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name != LISTING)


def write(path: Path, text: str) -> None:
    with folder.replacing(path) as fresh:
        (fresh / "report.json").write_text(text)
        (fresh / f"{text}.txt").touch()


def interrupted(path: Path, error: BaseException) -> None:
    with folder.replacing(path) as fresh:
        (fresh / "half.txt").touch()
        raise error


def refused(path: Path, clue: str = "") -> None:
    """The check and the writer refuse a place."""
    with pytest.raises(InputError, match=clue) as caught:
        folder.check(path)
    assert caught.value.code == "E-OUTPUT"
    with pytest.raises(InputError, match=clue):
        write(path, "two")


def exchange_is_missing(monkeypatch: pytest.MonkeyPatch, *, known: bool = True) -> None:
    calls = {"renameat2": lambda *args: -1} if known else {}
    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: type("Libc", (), calls))


def test_a_new_folder_appears_with_everything(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", "one")
    assert names(tmp_path / "deep" / "out") == CONTENT
    assert names(tmp_path / "deep") == ["out"]


def owners_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(shutil, "copystat", refuse)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda monkeypatch: None,
        exchange_is_missing,
        lambda monkeypatch: exchange_is_missing(monkeypatch, known=False),
        owners_are_refused,
    ],
)
def test_an_old_folder_of_ours_is_replaced(
    tmp_path: Path, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    write(tmp_path / "out", "one")
    (tmp_path / "out").chmod(0o750)
    write(tmp_path / "out", "two")
    assert names(tmp_path / "out") == ["report.json", "two.txt"]
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), InputError("E-X", "x")])
def test_an_interrupted_write_leaves_the_old(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(type(error)):
        interrupted(tmp_path / "out", error)
    assert names(tmp_path / "out") == CONTENT
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


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for path in (tmp_path / "out", tmp_path / "out" / "deeper"):
        refused(path)


# -- whose files are these? --------------------------------------------------------------------------------------------


def foreign_file(out: Path) -> None:
    (out / "thesis.tex").write_text("years of work")


def foreign_folder(out: Path) -> None:
    (out / "notes").mkdir()
    (out / "notes" / "monday.txt").write_text("years of work")


def foreign_link(out: Path) -> None:
    (out / "data").symlink_to("/etc/hostname")


def edited(out: Path) -> None:
    (out / "report.json").write_text("my remarks")


def replaced_by_a_link(out: Path) -> None:
    (out / "report.json").rename(out.parent / "report.json")
    (out / "report.json").symlink_to(out.parent / "report.json")


def protected(out: Path) -> None:
    (out / "report.json").chmod(0o444)


def without_a_list(out: Path) -> None:
    (out / LISTING).unlink()


def with_somebody_elses_list(out: Path) -> None:
    (out / LISTING).write_text('{"files": {"report.json": null, "one.txt": null}}')


def with_a_torn_list(out: Path) -> None:
    (out / LISTING).write_bytes((out / LISTING).read_bytes()[:40])


def nothing_but_names(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    for name in ("manifest.json", "report.json"):
        (out / name).write_text("{}")


@pytest.mark.parametrize(
    "change",
    [
        foreign_file, foreign_folder, foreign_link, edited, replaced_by_a_link, protected, without_a_list,
        with_somebody_elses_list, with_a_torn_list, nothing_but_names,
    ],
)  # fmt: skip
def test_what_xopt_has_not_written_is_left_alone(tmp_path: Path, change: Callable[[Path], None]) -> None:
    write(tmp_path / "out", "one")
    change(tmp_path / "out")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    refused(tmp_path / "out")
    after = {path: path.lstat() for path in tmp_path.rglob("*")}
    assert after.keys() == before.keys()
    for path, facts in before.items():
        assert (after[path].st_ino, after[path].st_size) == (facts.st_ino, facts.st_size)
        if path != tmp_path:
            assert after[path].st_mtime_ns == facts.st_mtime_ns


def test_a_file_that_is_missing_is_nobodys_loss(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "one.txt").unlink()
    write(tmp_path / "out", "two")
    assert names(tmp_path / "out") == ["report.json", "two.txt"]


def test_a_copy_that_a_user_has_linked_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    os.link(tmp_path / "out" / "report.json", tmp_path / "kept.json")
    write(tmp_path / "out", "two")
    assert (tmp_path / "kept.json").read_text() == "one"


def test_what_comes_while_a_run_works_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(InputError, match=r"thesis\.tex"), folder.replacing(tmp_path / "out"):
        foreign_file(tmp_path / "out")
    assert names(tmp_path / "out") == ["one.txt", "report.json", "thesis.tex"]
    assert names(tmp_path) == ["out"]


def test_what_comes_in_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last check and the exchange: it is in the old folder then, and moves to the new one."""
    write(tmp_path / "out", "one")

    def late(fresh: Path, place: Path) -> None:
        foreign_file(place)
        foreign_folder(place)

    monkeypatch.setattr(folder, "_take_after", late)
    write(tmp_path / "out", "two")
    assert names(tmp_path / "out") == ["notes", "report.json", "thesis.tex", "two.txt"]
    assert (tmp_path / "out" / "notes" / "monday.txt").read_text() == "years of work"
    assert names(tmp_path) == ["out"]


def test_what_comes_while_old_results_are_removed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the files and their removal, which may be seconds: digests are computed."""
    write(tmp_path / "out", "one")
    compute = ownership._digest

    def slowly(path: Path, *, sync: bool = False) -> str:
        foreign_file(tmp_path / "out")
        return compute(path, sync=sync)

    monkeypatch.setattr(ownership, "_digest", slowly)
    ownership.remove(tmp_path / "out")
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_what_failed_to_be_written_again_makes_nobody_s_file_ours(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(OSError, match="full"), ownership.noted(tmp_path / "out" / "report.json"):
        raise OSError(errno.ENOSPC, "full")
    folder.check(tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text("my words")
    refused(tmp_path / "out", "changed")


def test_what_comes_while_a_file_is_written_is_not_ours(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with ownership.adding(tmp_path / "out" / "000.onnx"):
        for name in ("000.onnx", "000-0123456789abcdef.data", "000-notes.txt"):
            (tmp_path / "out" / name).touch()
    assert ownership.strangers(tmp_path / "out") == ["000-notes.txt"]


# -- which place is meant? ---------------------------------------------------------------------------------------------


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "out" / "report.json").read_text() == text
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["out"]


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200])
def test_a_name_that_is_too_long(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, "too long")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a")


@pytest.mark.parametrize("where", [".", "..", "../..", "/", ""])
def test_the_current_folder_is_not_taken_away(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    refused(Path(where))
    assert Path.cwd() == tmp_path / "a" / "b"


@pytest.mark.parametrize("inside", ["one.txt", "deep/er", "."])
def test_the_model_in_the_output_folder_is_not_written_over(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(InputError, match="the model lies in"):
        folder.check(tmp_path / "out", {"the model": tmp_path / "out" / inside})
    folder.check(tmp_path / "out", {"the model": tmp_path / "model.onnx", "the dump": None})
    with pytest.raises(InputError, match="the dump lies in"):
        folder.check(tmp_path / "new", {"the dump": tmp_path / "new" / "dumps"})


def test_a_folder_without_permission_to_write(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    (tmp_path / "out").chmod(0o555)
    refused(tmp_path / "out", "write-protected")
    (tmp_path / "out").chmod(0o755)


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path) -> None:
    for options in (["-t", "tmpfs", "none"], ["--bind", str(tmp_path / "bound")]):
        for name in ("out", "bound"):
            (tmp_path / name).mkdir(exist_ok=True)
        if subprocess.run(["mount", *options, tmp_path / "out"], capture_output=True).returncode:
            pytest.skip("this user may not mount file systems")
        try:
            refused(tmp_path / "out", "mount point")
        finally:
            subprocess.run(["umount", tmp_path / "out"], check=True)


# -- one run at a time, and what a dead one has left -------------------------------------------------------------------


def test_two_runs_do_not_write_the_same_output(tmp_path: Path) -> None:
    with folder.claimed(tmp_path / "out") as claim:
        with pytest.raises(InputError, match=f"another run \\(process {os.getpid()}\\)"):
            write(tmp_path / "out", "one")
        with folder.replacing(tmp_path / "out", claim) as fresh:
            (fresh / "report.json").write_text("one")
        write(tmp_path / "elsewhere", "one")
    assert names(tmp_path) == ["elsewhere", "out"]
    write(tmp_path / "out", "two")


def test_finished_steps_stay(tmp_path: Path) -> None:
    with folder.claimed(tmp_path / "out") as claim:
        claim.steps.mkdir()
    assert names(tmp_path) == [WORK]
    with folder.claimed(tmp_path / "out") as claim:
        claim.steps.rmdir()
    assert names(tmp_path) == []


@pytest.mark.parametrize("lock", [None, "", "mine"])
def test_a_users_folder_in_the_way_is_left_alone(tmp_path: Path, lock: str | None) -> None:
    (tmp_path / WORK / "steps").mkdir(parents=True)
    (tmp_path / WORK / "steps" / "thesis.tex").touch()
    if lock is not None:
        (tmp_path / WORK / "lock").write_text(lock)
    with pytest.raises(InputError, match="in the way"):
        write(tmp_path / "out", "one")
    assert (tmp_path / WORK / "steps" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["swap", "old", "new", "steps"])
def test_a_link_in_a_work_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    """Such as one in a folder that a stranger has packed: it may lead to other results of the user's."""
    write(tmp_path / "mine", "one")
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "lock").write_text(f"{folder.MARK}1\n")
    (tmp_path / WORK / name).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="in the way"):
        write(tmp_path / "out", "two")
    assert names(tmp_path / "mine") == CONTENT


def test_what_stays_in_a_work_folder_is_said_before_any_work(tmp_path: Path) -> None:
    """A changed file of old results, whose place was taken by that of the new ones."""
    for text in ("one", "two"):
        write(tmp_path / "out", text)
        with folder.claimed(tmp_path / "out") as claim:
            claim.steps.mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "out", tmp_path / WORK / "swap")
    (tmp_path / WORK / "swap" / "report.json").write_text("changed by hand")
    with pytest.raises(InputError, match="are still in"), folder.claimed(tmp_path / "out"):
        pass
    assert (tmp_path / WORK / "swap" / "report.json").read_text() == "changed by hand"
    shutil.rmtree(tmp_path / WORK / "swap")
    write(tmp_path / "out", "three")


KILLED = """
import ctypes, os, pathlib, signal, sys
sys.path[:] = {path!r}
from xopt import folder, ownership
place, moment = pathlib.Path(sys.argv[1]), sys.argv[2]

def die(*anything, **more):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "sealing":
    ownership.seal = die
elif moment == "before the exchange":
    folder._renameat2 = die
elif moment == "after the exchange":
    ownership.remove = die
elif moment == "between two renames":
    folder._renameat2 = lambda *a: False
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda self, to: die() if self.name == "swap" else rename(self, to)
elif moment == "while the old one is removed":
    unlink, count = pathlib.Path.unlink, []
    pathlib.Path.unlink = lambda self, **k: die() if count else (count.append(1), unlink(self, **k))
with folder.replacing(place) as fresh:
    (fresh / "report.json").write_text("two")
    (fresh / "two.txt").touch()
    if moment == "writing":
        die()
"""
MOMENTS = {
    "writing": "one",
    "sealing": "one",
    "before the exchange": "one",
    "between two renames": "one",
    "after the exchange": "two",
    "while the old one is removed": "two",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_clears_up_after_one_that_was_killed(tmp_path: Path, moment: str) -> None:
    write(tmp_path / "out", "one")
    code = KILLED.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out", moment], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / WORK).is_dir()
    if moment != "between two renames":  # where folders cannot be exchanged there is a moment without one
        assert (tmp_path / "out" / "report.json").read_text() == MOMENTS[moment]
    foreign_file(tmp_path / WORK / "swap") if (tmp_path / WORK / "swap").exists() else None
    with folder.claimed(tmp_path / "out"):
        assert (tmp_path / "out" / "report.json").read_text() == MOMENTS[moment]
    assert names(tmp_path) == ["out"]
    assert set(names(tmp_path / "out")) - {"thesis.tex"} == {"report.json", f"{MOMENTS[moment]}.txt"}
