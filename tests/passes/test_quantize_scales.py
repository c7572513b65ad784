"""The arithmetic of scales and zero points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xopt.passes.quantize.scales import activation_scale, quantized_weight

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_activations_are_at_most_half_a_step_away_and_zero_stays_zero(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    found = activation_scale(float(x.min()), float(x.max()))
    scale, zero = np.float64(found.scale), int(found.zero)
    assert found.scale.dtype == np.float32 and found.zero.dtype == np.uint8
    levels = np.clip(np.rint(x / scale) + zero, 0, 255)
    # The zero point is rounded, so that one end of the range may lie half a step further out; so is the scale (1e-6).
    assert np.all(np.abs((levels - zero) * scale - x) <= scale * (1 + 255e-6))
    inside = np.abs(np.rint(x / scale) + zero - 127.5) < 127
    assert np.all(np.abs((levels - zero) * scale - x)[inside] <= scale * (0.5 + 255e-6))
    assert (np.clip(np.rint(0 / scale) + zero, 0, 255) - zero) * scale == 0


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0, 0, 1, 0),
        (5, 5, 5 / 255, 0),
        (2, 255, 1, 0),
        (-255, -1, 1, 255),
        (-3, -3, 3 / 255, 255),
        (-127.5, 127.5, 1, 128),
        (-1, 254, 1, 1),
        (-1e-45, 0, 2**-126, 0),
        (-3e38, 3e38, 6e38 / 255, 128),
    ],
)
def test_known_ranges(low: float, high: float, scale: float, zero: int) -> None:
    found = activation_scale(low, high)
    assert found.scale == np.float32(scale)
    assert found.zero == zero


@settings(max_examples=50)
@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=8))
def test_weights_are_at_most_half_a_step_away(rows: list[list[float]]) -> None:
    weight = np.array(rows, np.float32)
    integers, scale = quantized_weight(weight)
    assert integers.dtype == np.int8 and scale.dtype == np.float32
    assert scale.shape == (3,) and np.all(scale > 0)
    for column in range(3):
        step, largest = float(scale[column]), np.abs(weight[:, column]).max()
        for number, level in zip(weight[:, column], integers[:, column]):
            assert abs(int(level)) <= 127
            assert abs(level * step - float(number)) <= step * (0.5 + 127e-6)
            assert (number != largest) or largest < 127 * 2**-126 or level == 127
    again, same = quantized_weight(-weight)
    np.testing.assert_array_equal(again, -integers)
    np.testing.assert_array_equal(same, scale)


def test_a_column_of_zeros() -> None:
    integers, scale = quantized_weight(np.array([[0, 1], [0, -2]], np.float32))
    np.testing.assert_array_equal(integers, [[0, 64], [0, -127]])
    np.testing.assert_array_equal(scale, np.float32([1, 2 / 127]))
