"""The discrete Fourier transform as one product with a constant matrix, made in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Array

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

LONGEST = 1024
"""Lengths that a matrix is made for: 16 MiB of complex numbers."""


def _dft(call: Call) -> Value:
    """X [..., n, ..., 1 | 2] -> [..., n * (1 | 2)] @ matrix -> [..., K, ..., 2]."""
    shape = call.shape()
    given = call.numbers(2)
    axis = call.axes([int(call.attr("axis", -2)) if given is None else given[0]], len(shape))[0]
    size, parts = shape[axis], shape[-1]
    onesided, inverse = bool(call.attr("onesided", 0)), bool(call.attr("inverse", 0))
    wanted = call.numbers(1)
    if not isinstance(size, int) or parts not in (1, 2) or axis == len(shape) - 1:
        raise call.unsupported("it transforms an axis of a size that is not known")
    length = wanted[0] if wanted else 2 * (size - 1) if onesided and inverse else size
    if not 0 < length <= LONGEST or size > LONGEST:
        raise call.unsupported(f"lengths over {LONGEST} are not compiled")
    matrix, results = _matrix(size, length, parts, onesided, inverse)
    rows, count = matrix.shape[0], matrix.shape[1] // results
    order = [place for place in range(len(shape) - 1) if place != axis] + [axis, len(shape) - 1]
    x = call.emit(relax.op.permute_dims(call.x(), order))
    outer = [shape[place] for place in order[:-2]]
    x = call.lowering.reshape(x, [*outer, rows])
    x = call.emit(relax.op.matmul(x, call.lowering.constant(matrix.astype(str(x.ty.dtype)), "fourier")))
    x = call.lowering.reshape(x, [*outer, count, results])
    return call.emit(relax.op.permute_dims(x, [int(place) for place in np.argsort(order)]))


def _matrix(size: int, length: int, parts: int, onesided: bool, inverse: bool) -> tuple[Array, int]:
    """Of [size * parts, K * results], and how many numbers a result has: real and imaginary part, or the former."""
    used = length // 2 + 1 if onesided and inverse else length
    count = length // 2 + 1 if onesided and not inverse else length
    j, k = np.arange(size), np.arange(count)
    turns = (1 if inverse else -1) * 2 * np.pi * (np.outer(j, k) % length) / length
    factors = np.exp(1j * turns) * (j < used)[:, None] / (length if inverse else 1)
    results = 2
    if onesided and inverse:  # the other half is conjugate: twice the real part, but for what is its own
        results = 1
        factors[1 : (length + 1) // 2] *= 2
    columns = [[factors.real, factors.imag], [-factors.imag, factors.real]]
    blocks = np.stack([np.stack(row[:results], -1) for row in columns[:parts]], 1)
    return blocks.reshape(size * parts, count * results), results


OPS: dict[str, Emitter] = {"DFT": _dft}
"""Emitters by operator type."""
