"""Passes by name: built-in ones, imported when asked for, and those of the entry point ``xopt.passes``."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from xopt.errors import InputError
from xopt.pipeline.base import Pass

ENTRY_POINT_GROUP = "xopt.passes"

BUILT_IN: dict[str, str] = {
    "canonicalize": "xopt.passes.canonicalize:Canonicalize",
    "fold-constants": "xopt.passes.fold_constants:FoldConstants",
    "deduplicate": "xopt.passes.deduplicate:Deduplicate",
    "fuse-qkv": "xopt.passes.fuse_qkv:FuseQKV",
    "eliminate-dead": "xopt.passes.eliminate_dead:EliminateDead",
    "prune-heads": "xopt.passes.prune_heads:PruneHeads",
    "merge-tokens": "xopt.passes.merge_tokens:MergeTokens",
    "remove-padding": "xopt.passes.remove_padding:RemovePadding",
    "quantize": "xopt.passes.quantize:Quantize",
}


@cache
def _third_party() -> dict[str, EntryPoint]:
    found = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in BUILT_IN:
            warnings.warn(f"pass {point.name} of {point.value} is hidden by the built-in one", stacklevel=2)
        else:
            found[point.name] = point
    return found


def names() -> list[str]:
    """Names of all passes: built-in ones first, then third parties'."""
    return [*BUILT_IN, *sorted(_third_party())]


def get(name: str) -> type[Pass]:
    """The class of pass ``name``; InputError E-PASS when there is none or it cannot be loaded."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        loaded = getattr(importlib.import_module(module), attribute)
    elif name in _third_party():
        loaded = _load(_third_party()[name])
    else:
        raise InputError("E-PASS", f"unknown pass {name!r}", cure=_suggestion(name, names()))
    assert isinstance(loaded, type) and issubclass(loaded, Pass)
    return loaded


def _load(point: EntryPoint) -> object:
    where = f"entry point {point.name} = {point.value}"
    try:
        loaded = point.load()
    except Exception as error:  # a third party's module may fail in any way
        raise InputError("E-PASS", f"the pass cannot be imported ({error})", where=where) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and loaded.name == point.name):
        raise InputError("E-PASS", f"this is not a pass named {point.name}", where=where)
    return loaded


def create(name: str, options: Mapping[str, object]) -> Pass:
    """Pass ``name`` with ``options``; InputError E-PASS or E-OPTION."""
    cls = get(name)
    given = {key.replace("-", "_"): value for key, value in options.items()}
    for key in given:
        if key not in cls.options():
            raise InputError("E-OPTION", f"{name} has no option {key!r}", cure=_suggestion(key, cls.options()))
    return cls(**given)


def _suggestion(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if not known:
        return "it takes none"
    return "did you mean " + " or ".join(near) if near else "known are " + ", ".join(known)
