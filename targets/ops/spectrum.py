"""Fourier transforms: short ones as one product with a constant matrix, made in float64; STFT as many of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from xopt.kernels.emit import i64
from xopt.targets.ops import fourier, spectral_parameters
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Array

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

LONGEST = 1 << 22
"""Lengths that constants are made for."""


def _dft(call: Call) -> Value:
    """X [..., n, ..., 1 | 2] -> [..., K, ..., 2], or [..., K, ..., 1] for real results."""
    if call.has(2) and call.known(2) is None:
        return spectral_parameters.dft(call)
    shape = call.shape()
    given = call.numbers(2)
    axis = call.axes([int(call.attr("axis", -2)) if given is None else given[0]], len(shape))[0]
    size, parts = shape[axis], shape[-1]
    onesided, inverse = bool(call.attr("onesided", 0)), bool(call.attr("inverse", 0))
    wanted = call.numbers(1)
    if not isinstance(size, int) or parts not in (1, 2) or axis == len(shape) - 1:
        raise call.unsupported("it transforms an axis of a size that is not known")
    length = wanted[0] if wanted else 2 * (size - 1) if onesided and inverse else size
    order = [place for place in range(len(shape) - 1) if place != axis] + [axis, len(shape) - 1]
    x = call.emit(relax.op.permute_dims(call.x(), order))
    x = _transformed(call, x, length, onesided, inverse)
    return call.emit(relax.op.permute_dims(x, [int(place) for place in np.argsort(order)]))


def _transformed(call: Call, x: relax.Expr, length: int, onesided: bool, inverse: bool) -> relax.Expr:
    """The transform of length ``length`` of X [..., n, 1 | 2] along n."""
    *outer, size, parts = call.lowering.shape_of(x)
    if not 0 < length <= LONGEST or not 0 < size <= LONGEST:
        raise call.unsupported(f"lengths over {LONGEST} are not compiled")
    rows = call.dims.product(outer)
    if max(length, size) <= fourier.DIRECT:
        matrix, results = _matrix(size, length, parts, onesided, inverse)
        x = call.lowering.reshape(x, [rows, matrix.shape[0]])
        x = call.emit(relax.op.matmul(x, call.lowering.constant(matrix.astype(str(x.ty.dtype)), "fourier")))
        return call.lowering.reshape(x, [*outer, matrix.shape[1] // results, results])
    x = _complex(call, call.lowering.reshape(x, [rows, size, parts]), length, onesided and inverse)
    x = fourier.transform(call, x, 1 if inverse else -1)
    if inverse:
        x = fourier.times(call, x, np.full(length, 1 / length, complex))
    if onesided and not inverse:
        x = fourier.resized(call, x, length // 2 + 1)
    count = call.lowering.shape_of(x)[1]
    if onesided and inverse:
        x = call.lowering.compute("real", [rows, count, 1], lambda x, *i: x(*i), x)
    return call.lowering.reshape(x, [*outer, count, 1 if onesided and inverse else 2])


def _complex(call: Call, x: relax.Expr, length: int, half: bool) -> relax.Expr:
    """X [rows, n, 1 | 2] as complex numbers [rows, length, 2], cut or filled with zeros; ``half`` of what is conjugate
    to its other half.
    """
    rows, size, parts = call.lowering.shape_of(x)
    zero = tirx.const(0, str(x.ty.dtype))
    used = length // 2 + 1 if half else length

    def element(x: Any, row: Any, j: Any, part: Any) -> Any:
        place = tirx.Select(j < used, j, length - j)
        value = x(row, tirx.min(place, i64(size - 1)), part if parts == 2 else i64(0))
        value = tirx.Select(tirx.And(j >= used, part == 1), zero - value, value)
        there = place < size if parts == 2 else tirx.And(place < size, part == 0)
        return tirx.Select(there, value, zero)

    return call.lowering.compute("complex", [rows, length, 2], element, x)


def _stft(call: Call) -> Value:
    """Signal [B, L(, 1 | 2)] -> [B, frames, K, 2]: windows of the signal, each transformed."""
    if call.known(1) is None or (call.has(3) and call.known(3) is None):
        return spectral_parameters.stft(call)
    signal, step, given = call.x(0), call.numbers(1), call.numbers(3)
    shape = call.shape()
    if len(shape) == 2:
        signal = call.lowering.reshape(signal, [*shape, 1])
    batch, total, parts = call.lowering.shape_of(signal)
    length = given[0] if given else call.shape(2)[0] if call.has(2) else None
    if not step or step[0] < 1 or not isinstance(length, int) or length < 1 or parts not in (1, 2):
        raise call.unsupported("its frames are not of a known length")
    call.require(total >= length, "the signal is shorter than a frame")
    frames = call.dims.simplify((total - length) // step[0] + 1)
    inputs = [signal]
    if call.has(2):
        call.require(call.dims.same(call.shape(2)[0], length), "the window has another length than a frame")
        inputs.append(call.x(2))

    def element(x: Any, *rest: Any) -> Any:
        *window, row, frame, j, part = rest
        value = x(row, frame * step[0] + j, part)
        return value * window[0](j) if window else value

    x = call.lowering.compute("frames", [batch, frames, length, parts], element, *inputs)
    return _transformed(call, x, length, bool(call.attr("onesided", 1)), False)


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


OPS: dict[str, Emitter] = {"DFT": _dft, "STFT": _stft} | spectral_parameters.OPS
"""Emitters by operator type."""
