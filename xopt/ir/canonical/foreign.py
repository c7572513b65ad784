"""Steps of onnx_ir and onnxscript whose time grows with the square of the graph, made linear while they run."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

YOUNG = 100_000
"""Objects that are made before the collector looks for garbage. A graph is mostly objects that live as long as it."""


@contextmanager
def counted_names() -> Iterator[None]:
    """The inliner numbers copies of a name on from the last one, and does not try every number from 1 again."""
    from onnx_ir.passes.common import inliner

    counts: Counter[str] = Counter()

    def next_name(name: str, callstack: list[str], used_names: set[str]) -> str:
        candidate = name
        while candidate in used_names:
            counts[name] += 1
            candidate = f"{name}_{counts[name] + 1}"
        used_names.add(candidate)
        return candidate

    with _in_place(inliner, "_make_unique_name", next_name):
        yield


@contextmanager
def no_origins() -> Iterator[None]:
    """The constant folder does not note the names of all values that a constant was computed from."""
    from onnxscript.optimizer import _constant_folding

    with _in_place(_constant_folding, "_record_contributing_values", lambda node, replacement: None):
        yield


@contextmanager
def rare_collection() -> Iterator[None]:
    """The garbage collector looks at the graph's objects now and then, not after every 700 new ones."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], YOUNG) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _in_place(module: ModuleType, name: str, function: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)
