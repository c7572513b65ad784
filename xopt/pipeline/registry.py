"""Passes by name: built-in ones, imported when asked for, and those of the entry point ``xopt.passes``."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, distributions

from xopt.errors import InputError, XoptError
from xopt.pipeline.base import Effect, Pass
from xopt.pipeline.containment import contained

ENTRY_POINT_GROUP = "xopt.passes"
NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_./-]*")
"""What a pass may be called, so that it can be written in pipelines and tables."""

BUILT_IN: dict[str, str] = {
    "canonicalize": "xopt.passes.canonicalize:Canonicalize",
    "fold-constants": "xopt.passes.fold_constants:FoldConstants",
    "deduplicate": "xopt.passes.deduplicate:Deduplicate",
    "fuse-qkv": "xopt.passes.fuse_qkv:FuseQKV",
    "eliminate-dead": "xopt.passes.eliminate_dead:EliminateDead",
    "free-batch": "xopt.passes.free_batch:FreeBatch",
    "prune-heads": "xopt.passes.prune_heads:PruneHeads",
    "merge-tokens": "xopt.passes.merge_tokens:MergeTokens",
    "remove-padding": "xopt.passes.remove_padding:RemovePadding",
    "quantize": "xopt.passes.quantize:Quantize",
}


@dataclass(frozen=True)
class Broken:
    """A pass of another package that cannot be used: its name, the package, and why."""

    name: str
    package: str
    reason: str


@cache
def _third_party() -> Mapping[str, EntryPoint]:
    """Entry point of each name that one other package gives, and that can be written in a pipeline."""
    return {name: points[0] for name, points in _entry_points().items() if not _problem(name)}


@cache
def _entry_points() -> Mapping[str, Sequence[EntryPoint]]:
    """All entry points for passes, by name; the first of several installations of one package counts."""
    found: dict[str, list[EntryPoint]] = {}
    seen: set[str] = set()
    for distribution in distributions():
        try:
            package = str(distribution.metadata["Name"])
            points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
        except Exception:  # what is installed wrongly may have any fault, and mostly is none of our business
            continue
        for point in points if package not in seen else ():
            found.setdefault(str(point.name), []).append(point)
        seen.add(package)
    return found


def _package(point: EntryPoint) -> str:
    return str(point.dist.name) if point.dist is not None else point.value.partition(":")[0]


def _problem(name: str) -> str | None:
    """Why a name that another package gives cannot be used."""
    if name in BUILT_IN:
        return "a pass of xopt has this name"
    if not NAME.fullmatch(name):
        return "the name cannot be written in a pipeline"
    packages = [_package(point) for point in _entry_points()[name]]
    return f"several passes have this name, of {' and '.join(packages)}" if len(packages) > 1 else None


def names() -> list[str]:
    """Names of all passes: built-in ones first, then third parties'."""
    return [*BUILT_IN, *sorted(_third_party())]


def survey() -> tuple[list[type[Pass]], list[Broken]]:
    """All passes that can be used, and those of other packages that cannot; every package is imported for that."""
    usable = [get(name) for name in BUILT_IN]
    broken = []
    for name, points in sorted(_entry_points().items()):
        reason = _problem(name)
        if reason is None:
            try:
                usable.append(get(name))
            except XoptError as error:
                reason = error.what
        if reason is not None:
            broken += [Broken(name, _package(point), reason) for point in points]
    return usable, broken


def get(name: str) -> type[Pass]:
    """The class of pass ``name``; InputError E-PASS when there is none or it cannot be loaded."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        loaded: type[Pass] = getattr(importlib.import_module(module), attribute)
        return loaded
    if name in _third_party():
        return _load(_third_party()[name])
    if name in _entry_points():
        packages = ", ".join(map(_package, _entry_points()[name]))
        raise InputError("E-PASS", f"pass {name!r} cannot be used: {_problem(name)}", where=f"package {packages}")
    raise InputError("E-PASS", f"unknown pass {name!r}", cure=_suggestion(name, names()))


def _load(point: EntryPoint) -> type[Pass]:
    """The class of an entry point; InputError E-PASS with the package where it is none, or cannot be imported."""
    package = _package(point)
    where = f"entry point {point.name} = {point.value} of package {package}"
    cure = f"mend or remove package {package}"
    try:
        with contained("the package"):
            loaded = point.load()
    except Exception as error:  # a third party's module may fail in any way
        said = error.what if isinstance(error, XoptError) else f"{type(error).__name__}: {error}"
        raise InputError("E-PASS", f"the pass cannot be imported ({said})", where=where, cure=cure) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and getattr(loaded, "name", "") == point.name):
        raise InputError("E-PASS", f"this is not a pass named {point.name}", where=where, cure=cure)
    try:
        with contained("the pass"):
            loaded.options()
            loaded()
        if not isinstance(loaded.effect, Effect):
            raise TypeError("its effect is neither exact nor lossy")
    except Exception as error:
        said = error.what if isinstance(error, XoptError) else f"{type(error).__name__}: {error}"
        what = f"the pass is not made as one ({said})"
        raise InputError("E-PASS", what, where=where, cure=cure) from error
    return loaded


def create(name: str, options: Mapping[str, object]) -> Pass:
    """Pass ``name`` with ``options``; InputError E-PASS or E-OPTION."""
    cls = get(name)
    given = {key.replace("-", "_"): value for key, value in options.items()}
    for key in given:
        if key not in cls.options():
            raise InputError("E-OPTION", f"{name} has no option {key!r}", cure=_suggestion(key, cls.options()))
    try:
        with contained(f"pass {name}"):
            return cls(**given)
    except XoptError:
        raise
    except Exception as error:  # a third party's own check
        what = f"pass {name} cannot be made of these options ({type(error).__name__}: {error})"
        raise InputError("E-PASS", what, where=f"module {cls.__module__}") from error


def _suggestion(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not known:
        return "it takes none"
    return "did you mean " + " or ".join(near) if near else "known are " + ", ".join(known)
