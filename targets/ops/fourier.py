"""Discrete Fourier transforms of any known length, as products with small constant matrices.

    n = a * b:  X[k1 + a * k2] = DFT_b over j2 of (turn(j2 * k1) * DFT_a over j1 of x[b * j1 + j2])
Lengths that do not factor become a circular convolution of a length that does.

Sources: Cooley & Tukey (1965); Bluestein (1970). Matrices and turns are made in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from xopt.targets.symbolic import Array, Dim

if TYPE_CHECKING:
    from xopt.targets.ops.call import Call

SHORT = 64
"""Lengths that one product does at least as fast as two."""
DIRECT = 1024
"""Lengths up to which primes are one product."""


def transform(call: Call, x: relax.Expr, sign: int) -> relax.Expr:
    """The transform of complex numbers ``x`` [rows, n, 2] along n, not scaled; ``sign`` is that of the exponent."""
    rows, n, _ = call.lowering.shape_of(x)
    first = _divisor(n)
    if n <= SHORT or (first == 1 and n <= DIRECT):
        return _product(call, x, rows, n, sign)
    if first == 1:
        return _convolved(call, x, n, sign)
    second = n // first
    x = call.lowering.reshape(x, [rows, first, second, 2])
    x = call.emit(relax.op.permute_dims(x, [0, 2, 1, 3]))
    x = call.lowering.reshape(x, [rows * second, first, 2])
    x = call.lowering.reshape(transform(call, x, sign), [rows, n, 2])
    x = times(call, x, _turns(np.outer(np.arange(second), np.arange(first)), n, sign).reshape(-1))
    x = call.lowering.reshape(x, [rows, second, first, 2])
    x = call.emit(relax.op.permute_dims(x, [0, 2, 1, 3]))
    x = transform(call, call.lowering.reshape(x, [rows * first, second, 2]), sign)
    x = call.lowering.reshape(x, [rows, first, second, 2])
    return call.lowering.reshape(call.emit(relax.op.permute_dims(x, [0, 2, 1, 3])), [rows, n, 2])


def times(call: Call, x: relax.Expr, factors: Array) -> relax.Expr:
    """Complex numbers ``x`` [rows, n, 2] times n constants."""
    table = call.lowering.constant(np.stack([factors.real, factors.imag], -1).astype(str(x.ty.dtype)), "turns")

    def element(x: Any, t: Any, row: Any, j: Any, part: Any) -> Any:
        zero, one = tirx.const(0, "int64"), tirx.const(1, "int64")
        real = x(row, j, zero) * t(j, zero) - x(row, j, one) * t(j, one)
        return tirx.Select(part == 0, real, x(row, j, zero) * t(j, one) + x(row, j, one) * t(j, zero))

    return call.lowering.compute("turned", call.lowering.shape_of(x), element, x, table)


def resized(call: Call, x: relax.Expr, n: int) -> relax.Expr:
    """``x`` [rows, m, 2] cut, or filled with zeros, to n."""
    rows, m, _ = call.lowering.shape_of(x)
    zero = tirx.const(0, str(x.ty.dtype))

    def element(x: Any, row: Any, j: Any, part: Any) -> Any:
        return tirx.Select(j < m, x(row, tirx.min(j, tirx.const(m - 1, "int64")), part), zero)

    return x if m == n else call.lowering.compute("resized", [rows, n, 2], element, x)


def _product(call: Call, x: relax.Expr, rows: Dim, n: int, sign: int) -> relax.Expr:
    turns = _turns(np.outer(np.arange(n), np.arange(n)), n, sign)
    blocks = np.stack([np.stack([turns.real, turns.imag], -1), np.stack([-turns.imag, turns.real], -1)], 1)
    matrix = blocks.reshape(2 * n, 2 * n).astype(str(x.ty.dtype))
    flat = call.lowering.reshape(x, [rows, 2 * n])
    product = call.emit(relax.op.matmul(flat, call.lowering.constant(matrix, "fourier")))
    return call.lowering.reshape(product, [rows, n, 2])


def _convolved(call: Call, x: relax.Expr, n: int, sign: int) -> relax.Expr:
    """The transform as a convolution with a chirp: j * k = (j^2 + k^2 - (k - j)^2) / 2."""
    size = 1 << (2 * n - 2).bit_length()
    chirp = _turns(np.arange(n, dtype=np.int64) ** 2, 2 * n, sign)
    answer = np.zeros(size, complex)
    answer[:n] = chirp.conj()
    answer[size - n + 1 :] = chirp.conj()[:0:-1]
    x = transform(call, resized(call, times(call, x, chirp), size), -1)
    x = transform(call, times(call, x, np.fft.fft(answer) / size), 1)
    return times(call, resized(call, x, n), chirp)


def _turns(steps: Array, n: int, sign: int) -> Array:
    """e**(sign * 2 pi i * steps / n), complex128."""
    result: Array = np.exp(sign * 2j * np.pi * (steps % n) / n)
    return result


def _divisor(n: int) -> int:
    """The largest divisor of n up to its square root."""
    return next(a for a in range(int(n**0.5), 0, -1) if n % a == 0)
