"""QuantizeLinear and DequantizeLinear outside of products: bit for bit as the standard's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.targets.running import node_model, reference, run_node
from xopt.errors import InputError

RANDOM = np.random.default_rng(0)
X = ["b", 4, 6]
SCALE = np.array(0.25, np.float32)
SCALES = np.array([0.25, 0.5, 0.125, 1.0], np.float32)


def halves(*shape: int) -> np.ndarray:
    """Multiples of 1/8 from -80 to 80: many lie in the middle between two steps, and many beyond the ends."""
    return (RANDOM.integers(-640, 640, shape) / 8).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, None])
@pytest.mark.parametrize("axis", [None, 1, -2])
def test_quantize(dtype: Any, axis: int | None) -> None:
    scale = SCALE if axis is None else SCALES
    zero = {} if dtype is None else {"z": np.full(scale.shape, 7, dtype)}
    rest = {} if axis is None else {"axis": axis}
    out = ir.DataType.UINT8 if dtype is None else ir.DataType.from_numpy(np.dtype(dtype))
    model = node_model("QuantizeLinear", {"x": X, "s": scale, **zero}, output_type=out, **rest)
    feeds = {"x": halves(3, 4, 6)}
    (ours,), (theirs,) = run_node(model, feeds), reference(model, feeds)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
@pytest.mark.parametrize("axis", [None, 1, -2])
@pytest.mark.parametrize("zeros", [True, False])
def test_dequantize(dtype: Any, axis: int | None, zeros: bool) -> None:
    scale = SCALE if axis is None else SCALES
    zero = {"z": np.full(scale.shape, 7, dtype)} if zeros else {}
    rest = {} if axis is None else {"axis": axis}
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    model = node_model("DequantizeLinear", {"x": X, "s": scale, **zero}, dtypes={"x": kind}, **rest)
    feeds = {"x": RANDOM.integers(0, 120, (3, 4, 6)).astype(dtype)}
    np.testing.assert_array_equal(run_node(model, feeds)[0], reference(model, feeds)[0])


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear"])
@pytest.mark.parametrize(("axis", "block"), [(1, 2), (-1, 4)])
def test_blocks(op: str, axis: int, block: int) -> None:
    shape = [2, 4, 6]
    shape[axis] = -(-shape[axis] // block)
    scale = (2.0 ** RANDOM.integers(-3, 2, shape)).astype(np.float32)
    zero = RANDOM.integers(-5, 5, shape).astype(np.int8)
    there = op == "QuantizeLinear"
    kinds = {"dtypes": {"x": ir.DataType.FLOAT if there else ir.DataType.INT8}}
    out = ir.DataType.INT8 if there else ir.DataType.FLOAT
    inputs = {"x": [2, 4, 6], "s": scale, "z": zero}
    model = node_model(op, inputs, output_type=out, axis=axis, block_size=block, **kinds)
    x = halves(2, 4, 6) if there else RANDOM.integers(-128, 128, (2, 4, 6)).astype(np.int8)
    places = np.arange([2, 4, 6][axis]) // block
    s, z = (np.take(array, places, axis).astype(np.float32) for array in (scale, zero))
    want = np.clip(np.rint(x / s) + z, -128, 127).astype(np.int8) if there else (x - z) * s
    np.testing.assert_array_equal(run_node(model, {"x": x})[0], want)


def test_blocks_that_do_not_fit_are_refused() -> None:
    model = node_model("QuantizeLinear", {"x": [2, 4, 6], "s": np.ones((2, 3, 6), np.float32)}, axis=1, block_size=2)
    with pytest.raises(InputError, match="not one scale for each block"):
        run_node(model, {"x": halves(2, 4, 6)})
