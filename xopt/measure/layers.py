"""Where the time of one run goes: every call of a compiled model, in its place, with the memory it touches.

The runtime calls back before and after each kernel. The callback itself takes some microseconds, which lie outside of
what is measured; caches and memory are as in a run without it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xopt.measure.peak import Peak
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
        sizes: of those tensors in bytes.
    """

    name: str
    ms: float
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions of linear layers and attention; 0 for other kernels."""
        if found := _GEMM.match(self.name):
            k, n = (int(size) for size in found.groups())
            return 2 * math.prod(self.shapes[0][:-1]) * k * n
        if found := _ATTENTION.match(self.name):
            _, d, _, dv = (int(size) for size in found.groups()[:4])
            # Operands [B, S, columns] lie in the input with the number in the name, else they are [B, heads, S, d].
            keys = self.shapes[int(found["source"])][1] if found["source"] else self.shapes[1][2]
            return 2 * math.prod(self.shapes[-1]) // dv * keys * (d + dv)
        return 0

    @property
    def precision(self) -> str:
        """Of the operands of its products: "float32", "bfloat16" or "int8"."""
        computed = self.name.partition("_to_")[0]  # what follows is how results are stored
        return next((name for name in ("bfloat16", "int8") if f"_{name}" in computed), "float32")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of a linear layer, which come from memory; 0 for other kernels."""
        return self.sizes[1] if _GEMM.match(self.name) else 0


_GEMM = re.compile(r"gemm_[^_]+_(\d+)x(\d+)")
_ATTENTION = re.compile(r"attention_[^_]+_(\d+)x(\d+)_(\d+)x(\d+)_(?:\d+at\d+of\d+_(?P<source>\d+)at)?")


@dataclass(frozen=True)
class Layer:
    """All calls of one kernel on the same shapes.

    Attributes:
        kernel: its name.
        shapes: of its tensors.
        calls: how many there are in a run.
        ms: of all of them.
        limit_ms: what the machine's arithmetic or memory needs for them; 0 where there are no products.
    """

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    calls: int
    ms: float
    flops: int
    bytes: int
    limit_ms: float


def layers(found: Sequence[Call], peaks: Mapping[str, Peak]) -> list[Layer]:
    """The calls by kernel and shapes, the longest first, beside the machine's limits at each precision."""
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[Call]] = {}
    for call in found:
        groups.setdefault((call.name, call.shapes), []).append(call)
    result = [
        Layer(
            kernel=kernel,
            shapes=shapes,
            calls=len(group),
            ms=sum(call.ms for call in group),
            flops=sum(call.flops for call in group),
            bytes=sum(sum(call.sizes) for call in group),
            limit_ms=sum(peaks[call.precision].limit_ms(call.flops, call.weight_bytes) for call in group if call.flops),
        )
        for (kernel, shapes), group in groups.items()
    ]
    return sorted(result, key=lambda layer: -layer.ms)


def products(found: Sequence[Call]) -> list[str]:
    """The precisions of the products among calls."""
    return sorted({call.precision for call in found if call.flops})


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
    sizes = tuple(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in tensors)
    return Call(name, float(np.median([e[1] for e in entries])) * 1e3, tuple(shape for shape, _ in tensors), sizes)
