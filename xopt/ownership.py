"""Which files in a folder are ours: those whose content is still the one that was written.

A folder that xopt has written holds ``.xopt-files.json``, the digests of its files by name. Whatever is not in it, or
has changed since, belongs to the user: it is never removed, nor written over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from xopt.errors import InputError

LISTING = ".xopt-files.json"
KIND = "xopt-files"
SCHEMA = 1
PARTIAL = f"{LISTING}.part"
LARGEST_LISTING = 1 << 20
"""Bytes of a listing; a larger file is none."""


def strangers(folder: Path) -> list[str]:
    """Names in a folder that xopt has not written as they are now, in order.

    A file counts as written when its digest is the listed one. One without any permission to write is under the user's
    protection, and links, folders and devices are never ours.
    """
    listed = _read(folder)
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _ours(entry, listed))


def is_listed(folder: Path, names: re.Pattern[str]) -> bool:
    """Whether a folder is empty, or one in which xopt has written files of such names, and no others."""
    listed = _read(folder).keys() - {LISTING, PARTIAL}
    return all(map(names.fullmatch, listed)) if listed else not os.listdir(folder)


def refuse_stranger(path: Path, cure: str) -> None:
    """InputError E-OUTPUT when there is something at a path that xopt has not written as it is now."""
    if os.path.lexists(path) and path.name in strangers(path.parent):
        what = "what is there was not written by xopt, or was changed since"
        raise InputError("E-OUTPUT", what, where=str(path), cure=cure)


def refuse_strangers(folder: Path, cure: str) -> None:
    """InputError E-OUTPUT when a folder holds anything that xopt has not written as it is now."""
    names = strangers(folder)
    if not names:
        return
    listed = _read(folder)
    changed = [name for name in names if name in listed]
    named = ", ".join(map(repr, (changed or names)[:3])) + (", ..." if len(changed or names) > 3 else "")
    if changed:
        what = f"the folder holds results that were changed since xopt wrote them ({named})"
    elif not listed and _is_report(folder / "report.json"):
        what = "the folder holds results without the list of what xopt has written (of an older version, or copied)"
    else:
        what = f"the folder holds files that xopt has not written ({named})"
    raise InputError("E-OUTPUT", what, where=str(folder), cure=cure)


def seal(folder: Path) -> None:
    """List all files of a folder that was made for one output, and bring them to the disk."""
    _write(folder, {path.name: _digest(path, sync=True) for path in sorted(folder.iterdir())})


@contextmanager
def adding(path: Path) -> Iterator[None]:
    """List a file that the block writes into a folder of ours, with the data file that may come beside it.

    Meanwhile its name alone is listed: after a crash half of a file is still known for ours.
    """
    folder, data = path.parent, re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}\.data")
    _write(folder, {**_read(folder), path.name: None})
    before = set(os.listdir(folder))
    try:
        yield
    finally:  # also after an error: a name without a digest would make whatever is put there ours
        others = {name: digest for name, digest in _read(folder).items() if name != path.name}
        added = (name for name in os.listdir(folder) if name not in before and data.fullmatch(name))
        written = [name for name in (path.name, *added) if (folder / name).is_file()]
        _write(folder, {**others, **{name: _digest(folder / name) for name in written}})


@contextmanager
def noted(path: Path) -> Iterator[None]:
    """`adding`, where the file is listed already: it is written again."""
    if path.name not in _read(path.parent):
        yield
        return
    with adding(path):
        yield


def remove(folder: Path) -> None:
    """Remove what is ours from a folder, the listing last; strangers stay."""
    listed = _read(folder)
    with os.scandir(folder) as entries:
        ours = [entry.name for entry in entries if entry.name != LISTING and _ours(entry, listed)]
    for name in ours:
        (folder / name).unlink()
    if _read(folder):
        (folder / LISTING).unlink()


def _ours(entry: os.DirEntry[str], known: Mapping[str, str | None]) -> bool:
    if not known or not entry.is_file(follow_symlinks=False):
        return False
    if entry.name in (LISTING, PARTIAL):
        return True
    if entry.name not in known or not stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode) & 0o222:
        return False
    expected = known[entry.name]
    try:
        return expected is None or _digest(Path(entry.path)) == expected
    except OSError:
        return False


def _read(folder: Path) -> dict[str, str | None]:
    """The listing of a folder; empty where there is none, or something else under its name."""
    path = folder / LISTING
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_LISTING:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or (content.get("kind"), content.get("schema")) != (KIND, SCHEMA):
        return {}
    files = content.get("files")
    if not isinstance(files, dict) or not all(digest is None or isinstance(digest, str) for digest in files.values()):
        return {}
    return {**files, LISTING: None, PARTIAL: None}


def _write(folder: Path, files: Mapping[str, str | None]) -> None:
    """Write the listing, the old or the new one at any moment."""
    named = {name: digest for name, digest in files.items() if name not in (LISTING, PARTIAL)}
    partial = folder / PARTIAL
    try:
        partial.write_text(
            json.dumps({"kind": KIND, "schema": SCHEMA, "files": named}, indent=1) + "\n", encoding="utf-8"
        )
        partial.replace(folder / LISTING)
    finally:
        partial.unlink(missing_ok=True)


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_report(path: Path) -> bool:
    """Whether a file is the report of an optimization, by its content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == "xopt-report"
