"""Where the time of one run goes: every call of a compiled model, in its place, with the memory it touches.

The runtime calls back before and after each kernel. The callback itself takes some microseconds, which lie outside of
what is measured; caches and memory are as in a run without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xopt.runtime.session import Session

_NO_OPERATION = 0
_RUNTIME = "vm.builtin."


@dataclass(frozen=True)
class Call:
    """One call of a kernel in the order of execution.

    Attributes:
        name: of the kernel, which says what it computes.
        ms: median over the rounds.
        shapes: of its tensors, results last.
        bytes: of those tensors together.
    """

    name: str
    ms: float
    shapes: tuple[tuple[int, ...], ...]
    bytes: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products and attention; 0 for other kernels."""
        if self.name.startswith("gemm_"):
            inputs, weight = self.shapes[:2]
            return 2 * math.prod(inputs[:-1]) * math.prod(weight)
        return 0


def calls(session: Session, feeds: Mapping[str, np.ndarray], rounds: int = 20) -> list[Call]:
    """Time every kernel of a CPU artifact in ``rounds`` runs."""
    taken: list[list[tuple[str, float, tuple[Any, ...]]]] = []
    started = 0.0

    def watch(_function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> int:
        nonlocal started
        if before:
            started = time.perf_counter()
        else:
            taken[-1].append((name, time.perf_counter() - started, arguments))
        return _NO_OPERATION

    session.run(feeds)
    with session.watched(watch):
        for _ in range(rounds):
            taken.append([])
            session.run(feeds)
            taken[-1] = [_plain(entry) for entry in taken[-1] if not entry[0].startswith(_RUNTIME)]
    return [_call(entries) for entries in zip(*taken)]


def _plain(entry: tuple[str, float, tuple[Any, ...]]) -> tuple[str, float, tuple[Any, ...]]:
    """The entry with shapes and sizes in place of tensors, whose memory is free for others again."""
    name, seconds, arguments = entry
    tensors = [(tuple(x.shape), str(x.dtype)) for x in arguments if hasattr(x, "shape") and hasattr(x, "dtype")]
    return name, seconds, tuple(tensors)


def _call(entries: tuple[tuple[str, float, tuple[Any, ...]], ...]) -> Call:
    name, _, tensors = entries[0]
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in tensors)
    return Call(name, float(np.median([e[1] for e in entries])) * 1e3, tuple(shape for shape, _ in tensors), size)
