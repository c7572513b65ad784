"""From ranges to scales and zero points, and the numbers that are left after rounding to them.

Activations  unsigned, asymmetric, one scale a tensor: ``low..high`` (widened to hold 0) on 0..255.
Q, K and V   the same with one scale a head; Q symmetric, around 128.
Weights      signed, symmetric, one scale a column: ``-max|w|..max|w|`` on -127..127.

In both, 0 is one of the numbers, exactly: padding, ReLU's zeros and pruned weights stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVELS = 255
"""Steps of 8 bits."""
LARGEST = 127
"""Largest magnitude of a weight; -128 is left out, so that a weight and its negative are equally far from 0."""
MIDDLE = 128
"""Zero point of a symmetric activation: it stands for 0, with 127 steps above and 128 below."""
_SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Scales stay normal numbers: kernels flush others to zero."""

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Scale:
    """``x`` stands as ``clip(round(x / scale) + zero, 0, 255)``; numbers, or one for each column."""

    scale: np.float32 | npt.NDArray[np.float32]
    zero: np.uint8 | npt.NDArray[np.uint8]


def activation_scale(low: float, high: float) -> Scale:
    """The scale on which ``low..high`` and 0 fit; 1 for a range that holds nothing but 0."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = max(np.float32((high - low) / LEVELS), _SMALLEST_SCALE) if high > low else np.float32(1)
    return Scale(scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, LEVELS)))


def scales_by_head(lows: Floats, highs: Floats, heads: int, symmetric: bool) -> Scale:
    """The scale of each head, for each of its columns; of one head, a number.

    Args:
        lows, highs: ranges of the columns [heads * width].
        symmetric: around 128.
    """
    low = lows.astype(np.float64).reshape(heads, -1).min(axis=1)
    high = highs.astype(np.float64).reshape(heads, -1).max(axis=1)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high * (MIDDLE / LARGEST)
    scales = [activation_scale(*limits) for limits in zip(low, high)]
    zeros = [np.uint8(MIDDLE) if symmetric else one.zero for one in scales]
    if heads == 1:
        return Scale(scales[0].scale, zeros[0])
    width = len(lows) // heads
    return Scale(np.repeat(np.array([one.scale for one in scales]), width), np.repeat(np.array(zeros), width))


def quantized_weight(weight: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight [K, N] as integers [K, N] and the scale of each column [N]; 1 for a column of zeros."""
    wide = weight.astype(np.float64)
    largest = np.abs(wide).max(axis=0)
    scale = np.where(largest > 0, np.maximum(largest / LARGEST, _SMALLEST_SCALE), 1).astype(np.float32)
    integers = np.clip(np.rint(wide / scale), -LARGEST, LARGEST).astype(np.int8)
    return integers, scale
