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


def test_blocks_are_refused() -> None:
    model = node_model("DequantizeLinear", {"x": X, "s": ["b", 2, 6]}, dtypes={"x": ir.DataType.INT8}, block_size=2)
    with pytest.raises(InputError, match="blocks"):
        run_node(model, {})
