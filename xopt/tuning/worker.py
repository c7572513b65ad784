"""A process that builds kernels, times them and computes with them.

    python -m xopt.tuning.worker FD TARGET THREADS

It answers requests (method, arguments) on the connection FD with (True, result) or (False, why it failed), and ends
when the other side does. A kernel that crashes takes this process with it; one that hangs is ended from outside.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from xopt import targets
from xopt.kernels import emit
from xopt.kernels.precision import from_bfloat16
from xopt.measure import latency
from xopt.runtime.threads import configure_tvm
from xopt.targets.database import family_of
from xopt.tuning.sites import Array, Site, Tensor

TURN_SECONDS = 2e-3
LONGEST_TURN = 4 * TURN_SECONDS
"""Where threads wait for a CPU at each barrier, a call takes a thousand times longer than the one it was planned by."""
COLD_BYTES = 64 << 20
"""Weights are taken from all over so many bytes: like a model's, they are not in the cache from the last call."""
PATIENCE = 4
"""Disturbed turns for each one that is wanted, until those that there are have to do."""
ALIGNMENT = 64
PR_SET_PDEATHSIG = 1


@dataclass
class Bench:
    """The kernels that were built, and the memory that they are timed on.

    Args:
        target: what to build for.
        threads: that kernels are timed on.
    """

    target: targets.Target
    threads: int
    _kernels: dict[tuple[Site, Any], Callable[..., None]] = field(default_factory=dict)
    _shapes: dict[tuple[Site, Any], list[tuple[int, ...]]] = field(default_factory=dict)
    _filled: dict[str, Array] = field(default_factory=dict)

    @cached_property
    def _code_target(self) -> Any:
        return self.target.tvm_target()

    def prepare(self, site: Site, config: Any) -> None:
        """Build the kernel of a site with a configuration."""
        if (site, config) in self._kernels:
            return
        family, isa = family_of(site.family), self.target.isa()
        function = family.build(site.workload, config, isa)
        tensors = (*site.inputs, *site.outputs)
        self._shapes[site, config] = [_shape(p.ty.shape, t.shape) for p, t in zip(function.params, tensors)]
        self._kernels[site, config] = emit.compiled(function, self._code_target)

    def compare(self, site: Site, first: Any, second: Any, rounds: int) -> list[tuple[float, float]]:
        """Seconds of a call with one configuration and with another, in turns: ``rounds`` pairs.

        Pairs in which a thread has waited for a CPU do not count, unless there are no others.
        """
        for config in (first, second):
            self.prepare(site, config)
        turns = [_turn(self._kernels[site, config], self._operands(site, config)) for config in (first, second)]
        pairs: list[tuple[float, float]] = []
        disturbed: list[tuple[float, float]] = []
        configure_tvm(self.threads)
        while len(pairs) < rounds and len(disturbed) < PATIENCE * rounds:
            order = (0, 1) if (len(pairs) + len(disturbed)) % 2 else (1, 0)
            start, before = time.perf_counter(), latency.waited()
            seconds = {index: turns[index]() for index in order}
            waited = (latency.waited() - before) / (time.perf_counter() - start)
            (pairs if waited < latency.DISTURBED else disturbed).append((seconds[0], seconds[1]))
        return (pairs or disturbed)[:rounds]

    def difference(
        self, site: Site, configs: tuple[Any, Any], constants: tuple[Mapping[int, Array], Mapping[int, Array]]
    ) -> float:
        """How much the results with two configurations differ, relative to the largest; infinite when NaN does.

        Args:
            site: the kernel.
            configs: its configurations.
            constants: the constant inputs, packed for each of them.
        """
        results = [self._results(site, config, packed) for config, packed in zip(configs, constants)]
        return max(_difference(a, b) for a, b in zip(*results))

    def forget(self) -> None:
        """Let go of all kernels."""
        self._kernels.clear()
        self._shapes.clear()

    def _results(self, site: Site, config: Any, constants: Mapping[int, Array]) -> list[Array]:
        self.prepare(site, config)
        arrays = [
            constants[position] if position in constants else _random(tensor.shape, tensor.dtype, seed=position)
            for position, tensor in enumerate(site.inputs)
        ]
        outputs = [_aligned(tensor.shape, tensor.dtype) for tensor in site.outputs]
        inputs = [_copied(array) for array in arrays]
        self._kernels[site, config](*map(tvm_ffi.from_dlpack, (*inputs, *outputs)))
        return outputs

    def _operands(self, site: Site, config: Any) -> Iterator[list[Any]]:
        """Arguments for one call after the other: weights of their own each time, the other tensors always the same."""
        shapes = self._shapes[site, config]
        tensors = (*site.inputs, *site.outputs)
        cold = sum(_bytes(shape, t.dtype) for shape, t in zip(shapes, tensors) if t.constant)
        copies = max(1, min(64, COLD_BYTES // max(cold, 1)))
        warm = [None if t.constant else _random(shape, t.dtype, 0) for shape, t in zip(shapes, tensors)]
        calls = []
        for copy in range(copies):
            start, arrays = copy * cold, []
            for array, shape, tensor in zip(warm, shapes, tensors):
                arrays.append(self._cold(shape, tensor, start) if array is None else array)
                start += _bytes(shape, tensor.dtype) if array is None else 0
            calls.append([tvm_ffi.from_dlpack(array) for array in arrays])
        return itertools.cycle(calls)

    def _cold(self, shape: tuple[int, ...], tensor: Tensor, start: int) -> Array:
        """A tensor that lies ``start`` bytes into random memory."""
        size, itemsize = math.prod(shape), np.dtype(tensor.dtype).itemsize
        first = -(-start // ALIGNMENT) * ALIGNMENT // itemsize
        needed = first + size
        memory = self._filled.get(tensor.dtype)
        if memory is None or memory.size < needed:
            memory = _random((max(needed, (COLD_BYTES + (1 << 20)) // itemsize),), tensor.dtype, 0)
            self._filled[tensor.dtype] = memory
        return memory[first:needed].reshape(shape)


def _turn(kernel: Callable[..., None], operands: Iterator[list[Any]]) -> Callable[[], float]:
    """A function that times enough calls to fill a turn, and gives the seconds of one."""
    kernel(*next(operands))
    start = time.perf_counter()
    kernel(*next(operands))
    calls = max(1, min(1000, math.ceil(TURN_SECONDS / max(time.perf_counter() - start, 1e-6))))

    def turn() -> float:
        kernel(*next(operands))
        start = now = time.perf_counter()
        done = 0
        while done < calls and now - start < LONGEST_TURN:
            kernel(*next(operands))
            done += 1
            now = time.perf_counter()
        return (now - start) / done

    return turn


def _shape(declared: Any, given: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a kernel declares for a parameter, its symbols replaced by the extents of the call."""
    return tuple(int(d.value) if isinstance(d, tvm.tirx.IntImm) else extent for d, extent in zip(declared, given))


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def _aligned(shape: tuple[int, ...], dtype: str) -> Array:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copied(array: Array) -> Array:
    result = _aligned(array.shape, str(array.dtype))
    result[...] = array
    return result


def _random(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Values that a kernel can take: normal numbers, any byte, bfloat16 bits in uint16, True, and zero for an index."""
    generator = np.random.default_rng(seed)
    result = _aligned(shape, dtype)
    if dtype == "float32":
        generator.standard_normal(out=result, dtype=np.float32)
    elif dtype == "uint16":
        result[...] = (generator.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif dtype in ("int8", "uint8"):
        result[...] = generator.integers(0, 256, shape, np.uint8).view(dtype)
    elif dtype == "bool":
        result[...] = True
    return result


def _difference(a: Array, b: Array) -> float:
    x, y = (_values(array) for array in (a, b))
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return math.inf
    finite = np.isfinite(x)
    if not finite.any():
        return 0.0
    return float(np.abs(x - y)[finite].max() / max(np.abs(x)[finite].max(), 1e-30))


def _values(array: Array) -> Array:
    return (from_bfloat16(array) if array.dtype == np.uint16 else array).astype(np.float64)


def serve(connection: Connection, bench: Bench) -> None:
    """Say that this process is ready, and answer requests until the other side closes the connection."""
    connection.send((True, None))
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(bench, method)(*arguments)
        except Exception as error:  # whatever a candidate does is its own failure
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)


def main() -> None:
    descriptor, target, threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a kernel that hangs must not outlive the tuner
    serve(Connection(descriptor), Bench(targets.get(target), threads))


if __name__ == "__main__":
    main()
