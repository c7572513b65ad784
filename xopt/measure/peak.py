"""What this machine can do at best: multiply-adds of a loop that stays in registers, and memory read in order.

python -P -m xopt.measure.peak --threads 2
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xopt.runtime.threads import configure_tvm

READ_BYTES = 256 << 20
"""Bytes of the array that is read: many times the last-level cache."""
PAGE = 1 << 19
"""Numbers in a huge page."""
FLOPS = 1 << 27
"""Work of one call of the arithmetic loops: about a millisecond."""
OPERANDS = 8
"""Vectors that the arithmetic loops read in turn: in the first-level cache, and not the same in every step."""
REPEATS = 7


def isa() -> Any:
    """The vector unit of this machine."""
    from xopt import targets

    return targets.get("cpu").isa()


def native() -> Any:
    """The machine that this runs on, for TVM."""
    from xopt import targets

    return targets.get("cpu").tvm_target()


def fused_multiply_adds(flops: int, threads: int, precision: str = "float32") -> Callable[[], object]:
    """``flops`` multiplications and additions over the threads, in a loop that never leaves the registers.

    Args:
        flops: two for each product, in all threads together.
        threads: iterations of the parallel loop.
        precision: "float32", "bfloat16" (pairs) or "int8" (fours).
    """
    from xopt.kernels import emit
    from xopt.kernels import precision as precisions

    vectors, form = isa(), precisions.BY_NAME[precision]
    lanes, rows = vectors.lanes, 12  # twice what hides the latency
    depth = max(1, flops // (2 * rows * lanes * form.pack * threads))
    words = "float32" if form.pack == 1 else "int32"

    def body() -> None:
        factors, operands = emit.argument("x", (rows,), words), emit.argument("w", (OPERANDS, lanes), words)
        sums = emit.argument("y", (threads, rows, lanes), form.accumulator)
        with emit.parallel(threads) as thread:
            emit.outer_product(
                rows,
                1,
                depth,
                lambda r, k: factors[emit.i64(r)],
                lambda v, k: emit.load(operands, k % OPERANDS, 0, lanes=lanes),
                lambda r, v, acc: emit.store(sums, acc, thread, r, 0, lanes=lanes),
                lanes=lanes,
                chains=1,
                dot=precisions.dot(form, vectors),
            )

    kernel = emit.compiled(emit.prim_func("peak", body), native())
    shapes = ((rows,), words), ((OPERANDS, lanes), words), ((threads, rows, lanes), form.accumulator)
    tensors = [_tensor(np.zeros(shape, dtype)) for shape, dtype in shapes]
    return lambda: kernel(*tensors)


def reads(threads: int) -> Callable[[], object]:
    """Sum ``READ_BYTES`` of memory, each thread its own stretch."""
    from tvm import tirx

    from xopt.kernels import emit

    lanes, chains = isa().lanes, 8
    steps = READ_BYTES // (4 * lanes * chains * threads)

    def body() -> None:
        x = emit.argument("x", (threads, steps, chains, lanes))
        y = emit.argument("y", (threads, chains, lanes))
        with emit.parallel(threads) as thread:
            emit.outer_product(
                1,
                chains,
                steps,
                lambda r, k: tirx.const(1.0, "float32"),
                lambda v, k: emit.load(x, thread, k, v, 0, lanes=lanes),
                lambda r, v, acc: emit.store(y, acc, thread, v, 0, lanes=lanes),
                lanes=lanes,
                chains=1,
            )

    kernel = emit.compiled(emit.prim_func("peak", body), native())
    x = _large((threads, steps, chains, lanes))
    y = _tensor(np.zeros((threads, chains, lanes), np.float32))
    return lambda: kernel(x, y)


def _large(shape: tuple[int, ...]) -> Any:
    """Zeros in memory of numpy's own, which asks for huge pages."""
    import tvm_ffi

    count = math.prod(shape)
    buffer = np.empty(count + PAGE, np.float32)
    start = -buffer.ctypes.data % (4 * PAGE) // 4
    array = buffer[start : start + count].reshape(shape)
    array[...] = 0
    return tvm_ffi.from_dlpack(array)


def _tensor(array: npt.NDArray[Any]) -> Any:
    import tvm

    return tvm.runtime.tensor(array)


@dataclass(frozen=True)
class Peak:
    """Rates of all threads together: thousand million floating-point operations, and bytes, a second."""

    gflops: float
    gb_per_s: float

    def limit_ms(self, flops: float, read: float) -> float:
        """Milliseconds that so many operations, or reading so many bytes from memory, take at least."""
        return max(flops / self.gflops, read / self.gb_per_s) * 1e-6


class Probe:
    """The loops for one number of threads and one precision, compiled once and measured as often as wanted."""

    def __init__(self, threads: int, precision: str = "float32") -> None:
        self._arithmetic = fused_multiply_adds(FLOPS * threads, threads, precision)
        self._reads = reads(threads)
        self._flops = FLOPS * threads
        self._threads = threads

    def measure(self) -> Peak:
        """The best of some calls, on which disturbances of a shared machine show least."""
        configure_tvm(self._threads)
        return Peak(self._flops / _best(self._arithmetic) * 1e-9, READ_BYTES / _best(self._reads) * 1e-9)


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    import argparse
    import os

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    rates = {name: Probe(options.threads, name).measure() for name in ("float32", "bfloat16", "int8")}
    answer = {f"{name}_gops": round(rate.gflops, 1) for name, rate in rates.items()}
    print(json.dumps({"threads": options.threads, **answer, "read_gb_s": round(rates["float32"].gb_per_s, 1)}))
