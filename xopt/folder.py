"""Write a folder of results all at once, by one run at a time: what was there stays until the new one is complete.

    out/                   the results, and the list of what was written (xopt.ownership)
    .out.xopt-cache/       beside it while a run works, and after one that was interrupted:
        lock               held by the run while it lives
        steps/             finished steps, for --resume
        new/               the results in the making
        swap/              complete results on their way into place, then the old ones on their way out
        old/               the old ones, where a file system cannot exchange two folders

Whatever a killed run has left there the next one removes, or brings to an end.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from xopt import ownership
from xopt.errors import InputError

CURE = "name a new folder with -o"
LOCK = "lock"
MARK = "work folder of xopt, process "
"""What a lock begins with."""
NOTHING: Mapping[str, Path | None] = MappingProxyType({})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Claim:
    """The right to write an output, which one run has at a time.

    Attributes:
        output: the path with links followed.
        work: folder beside it for what is not finished.
    """

    output: Path
    work: Path

    @property
    def steps(self) -> Path:
        """Folder for finished steps."""
        return self.work / "steps"


def check(path: Path, apart: Mapping[str, Path | None] = NOTHING) -> None:
    """Refuse a place that cannot be written, or that holds anything but results of xopt; InputError E-OUTPUT.

    Args:
        path: the folder to write.
        apart: what must not lie in it, by the words for it.
    """
    place = resolved(path)
    for words, other in apart.items():
        if other is not None and place in (resolved(other), *resolved(other).parents):
            raise InputError("E-OUTPUT", f"{words} lies in the output folder", where=str(path), cure=CURE)
    with _errors(path):
        if place.exists() and not place.is_dir():
            raise InputError("E-OUTPUT", "the output is a file", where=str(path), cure="name a folder")
        if place.is_dir():
            _check_folder(place, path)
            ownership.refuse_strangers(place, f"{CURE}, or move them away")
        nearest = next(folder for folder in place.parents if folder.exists())
        Path(tempfile.mkdtemp(dir=nearest, prefix=".xopt-")).rmdir()


def _check_folder(place: Path, path: Path) -> None:
    """A folder that is to be exchanged must not be held by a mount, a working directory or the user's protection."""
    if os.path.ismount(place) or os.fsencode(place) in _mount_points():
        what = "the folder is a mount point, which cannot be replaced"
        raise InputError("E-OUTPUT", what, where=str(path), cure="name a folder in it with -o")
    if place == Path.cwd() or place in Path.cwd().parents:
        what = "the current folder lies in the output folder"
        raise InputError("E-OUTPUT", what, where=str(path), cure="name a folder in it with -o")
    if not stat.S_IMODE(place.stat().st_mode) & 0o222 or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise InputError("E-OUTPUT", "the folder is write-protected", where=str(path), cure=CURE)


def resolved(path: Path) -> Path:
    """The path with all links followed; InputError E-OUTPUT where they lead in a circle."""
    try:
        return path.absolute().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError("E-OUTPUT", f"the path leads nowhere ({error})", where=str(path), cure=CURE) from error


def _mount_points() -> set[bytes]:
    """Where file systems are mounted, bound folders among them (which `os.path.ismount` does not see)."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    return {line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines}


@contextmanager
def claimed(path: Path) -> Iterator[Claim]:
    """Claim an output for this process, and clear away what a dead run has left of it; see `workplace`."""
    place = resolved(path)
    with workplace(place) as work:
        with _errors(path):
            _recover(work, place)
        yield Claim(place, work)


@contextmanager
def workplace(place: Path) -> Iterator[Path]:
    """The folder for unfinished work on ``place``, locked; it is removed at the end unless finished steps are in it.

    Raises:
        InputError: E-OUTPUT: another run works on the same output, or the folder is not ours.
    """
    work = place.with_name(work_name(place))
    missing = [folder for folder in place.parents if not folder.exists()]
    with _errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(work, place)
    try:
        shutil.rmtree(work / "new", ignore_errors=True)
        yield work
    finally:
        shutil.rmtree(work / "new", ignore_errors=True)
        _leave(work)
        os.close(lock)
        with suppress(OSError):
            for made in missing:
                made.rmdir()


def work_name(place: Path) -> str:
    """The name of the folder for unfinished work beside an output."""
    return f".{place.name}.xopt-cache"


def _locked(work: Path, place: Path) -> int:
    """The descriptor of the lock, which the system lets go when this process ends, however that happens."""
    while True:
        if os.path.lexists(work) and not _is_ours(work):
            what = f"{work.name} is in the way, and not of xopt"
            raise InputError("E-OUTPUT", what, where=str(work.parent), cure=f"move it away, or {CURE}")
        work.mkdir(exist_ok=True)
        try:
            lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the run before has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(work / LOCK).st_ino == os.fstat(lock).st_ino:
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{MARK}{os.getpid()}\n".encode(), 0)
                return lock
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").removeprefix(MARK).strip()
            os.close(lock)
            what = f"another run (process {holder or 'unknown'}) is writing this output"
            raise InputError("E-OUTPUT", what, where=str(place), cure="wait for it, or name another output") from None
        except FileNotFoundError:
            pass
        except OSError:
            _leave(work)
            os.close(lock)
            raise
        os.close(lock)


def _leave(work: Path) -> None:
    """Remove a work folder that holds nothing but the lock; another run may be about to take it."""
    with suppress(OSError):
        if os.listdir(work) == [LOCK]:
            (work / LOCK).unlink()
            work.rmdir()


def _is_ours(work: Path) -> bool:
    """Whether a folder is a work folder: its lock says so. An empty one, or one with an empty lock, is nobody's.

    A link to a folder is never made here: what it leads to is not ours to clear away.
    """
    if work.is_symlink() or not work.is_dir():
        return False
    names, lock = os.listdir(work), work / LOCK
    if any((work / name).is_symlink() for name in names):
        return False
    if lock.is_symlink() or not lock.is_file():
        return not names
    with suppress(FileNotFoundError), lock.open("rb") as file:
        start = file.read(len(MARK))
        return start == MARK.encode() or (not start and names == [LOCK])
    return True


def _recover(work: Path, place: Path) -> None:
    """Bring to an end, or undo, what a killed run was about."""
    if (work / "old").exists() and not place.exists():
        (work / "old").rename(place)
    for left in (work / "swap", work / "old"):
        if left.is_dir():
            _clear(left, place)
        if left.exists():
            what = f"{place.name} was replaced while files in it were changed, and those are still in {work.name}"
            raise InputError("E-OUTPUT", what, where=str(left), cure="move it away")


@contextmanager
def replacing(path: Path, claim: Claim | None = None) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Args:
        path: the folder to write; a link is followed, and stays.
        claim: of a run that has claimed it already.

    Raises:
        InputError: E-OUTPUT: no permission, the disk is full, other files are there, another run writes there.
    """
    if claim is None or claim.output != resolved(path):
        check(path)
        with claimed(path) as claim, replacing(path, claim) as fresh:
            yield fresh
        return
    fresh = claim.work / "new"
    with _errors(path):
        try:
            fresh.mkdir()
            yield fresh
            ownership.seal(fresh)
            _publish(fresh, claim)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, claim: Claim) -> None:
    """Put a complete folder in its place; an old one is exchanged in one system call."""
    place, swap, old = claim.output, claim.work / "swap", claim.work / "old"
    if place.exists():
        ownership.refuse_strangers(place, "move them away, and run again with --resume")
        _take_after(fresh, place)
    fresh.rename(swap)
    try:
        if not place.exists():
            swap.rename(place)
        elif not _renameat2(swap, place, _RENAME_EXCHANGE):
            place.rename(old)
            try:
                swap.rename(place)
            except OSError:
                old.rename(place)
                raise
    finally:
        for left in (swap, old):
            if left.is_dir():
                _clear(left, place)


def _take_after(fresh: Path, place: Path) -> None:
    """Give a new folder the permissions and, where that is allowed, the attributes and the owner of the old one."""
    facts = place.stat()
    fresh.chmod(stat.S_IMODE(facts.st_mode))
    with suppress(OSError):  # what a file system refuses it also says by other errors than EPERM
        shutil.copystat(place, fresh)
    with suppress(OSError):
        os.chown(fresh, facts.st_uid, facts.st_gid)
    os.utime(fresh)


def _clear(folder: Path, place: Path) -> None:
    """Remove results that are not needed any more; what a user has put among them meanwhile goes back to its place."""
    for name in ownership.strangers(folder):
        if place.is_dir():
            _renameat2(folder / name, place / name, _RENAME_NOREPLACE)
    ownership.remove(folder)
    with suppress(OSError):  # a stranger whose name is taken stays here
        folder.rmdir()


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """The system call; False where it fails, or the file system or the C library cannot do it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """An ``OSError`` of the block, or what came of one, as an E-OUTPUT about ``path``."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # it names the file in the folder that is about to vanish
            raise unwritable(path, error.__cause__) from error
        raise


def unwritable(path: Path, error: OSError) -> InputError:
    """The error for a place that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot write ({error.strerror or error})"
    return InputError("E-OUTPUT", what, where=str(path), cure="name another folder with -o")
