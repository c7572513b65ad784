"""The three files of an artifact on disk: replaced as one, and only where they are an artifact.

Three files cannot change at one moment. They are complete in the work folder (`xopt.folder.workplace`) before the first
of them moves; whoever finds that a killed run has not moved all of them moves the others.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from xopt import folder
from xopt.errors import InputError
from xopt.runtime.manifest import LARGEST_MANIFEST, digest, manifest_path, weights_path


@contextmanager
def replacing(library: Path) -> Iterator[Path]:
    """The path to write a new library to, its weights and its manifest beside it; they move to ``library`` at the end.

    Args:
        library: a resolved path.

    Raises:
        InputError: E-OUTPUT: files of the same names are there that are not an artifact, or another run writes there.
    """
    with folder.workplace(library) as work:
        _move(work / "swap", library)
        _refuse_foreign(library)
        fresh = work / "new"
        fresh.mkdir()
        yield fresh / library.name
        _refuse_foreign(library)
        for path in fresh.iterdir():
            if path not in _trio(fresh / library.name):
                path.unlink()
        fresh.rename(work / "swap")
        _move(work / "swap", library)


def check(library: Path) -> None:
    """Refuse a place where no artifact can be written, as `replacing` does."""
    with folder.workplace(folder.resolved(library)) as work:
        _move(work / "swap", library)
        _refuse_foreign(library)


def settle(library: Path) -> None:
    """Bring the replacing of an artifact to an end that a killed run has begun, where that is possible."""
    with suppress(InputError, OSError):
        if library.with_name(folder.work_name(library)).is_dir():
            with folder.workplace(library) as work:
                _move(work / "swap", library)


def _trio(library: Path) -> list[Path]:
    return [weights_path(library), library, manifest_path(library)]


def _move(complete: Path, library: Path) -> None:
    """Move what is left of a complete artifact to its place, unless a user has put other files there meanwhile."""
    if complete.is_dir():
        _refuse_foreign(library, complete / manifest_path(library).name)
        for target in _trio(library):
            with suppress(FileNotFoundError):
                os.replace(complete / target.name, target)
        complete.rmdir()


def _refuse_foreign(library: Path, *manifests: Path) -> None:
    """InputError E-OUTPUT where one of the three files is neither of the manifest beside it nor of the others."""
    present = [path for path in _trio(library) if os.path.lexists(path)]
    known = [_digests(manifest) for manifest in (manifest_path(library), *manifests)]
    foreign = [path for path in present if not _is_ours(path, known)]
    if foreign:
        names = ", ".join(repr(path.name) for path in foreign)
        what = f"{names} would be replaced, and xopt has not written {'it' if len(foreign) == 1 else 'them'} as it is"
        cure = "move it away, or name another library with -o"
        raise InputError("E-OUTPUT", what, where=str(library.parent), cure=cure)


def _is_ours(path: Path, known: Sequence[Mapping[str, str]]) -> bool:
    """Whether a file is as a manifest says; the first is the one beside it, which must be one to be replaced."""
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode) or not stat.S_IMODE(facts.st_mode) & 0o222:
        return False
    with suppress(OSError):
        return bool(known[0]) if path.suffix == ".json" else digest(path) in [one.get(path.name) for one in known]
    return False


def _digests(manifest: Path) -> dict[str, str]:
    """The digests in a manifest by file name; empty where there is none."""
    try:
        if manifest.is_symlink() or not manifest.is_file() or manifest.stat().st_size > LARGEST_MANIFEST:
            return {}
        content = json.loads(manifest.read_text(encoding="utf-8"))
        digests = content["digests"] if isinstance(content["format"], int) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return (
        {name: value for name, value in digests.items() if isinstance(value, str)} if isinstance(digests, dict) else {}
    )
