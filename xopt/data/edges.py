"""Inputs at the edges of what a model accepts: where a rewrite that suits usual data may be wrong.

    row 0    zeros: the first row of each table, masks that hide everything, no signal
    row 1    the last row of each table, the largest of other integers, a usual sample of floats
    others   usual samples
Open axes other than that of samples are cut to half, so that no size can be taken for a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from xopt.data.vocabulary import table_rows

if TYPE_CHECKING:
    from xopt.data.dataset import Dataset


def edge_feeds(model: ir.Model, samples: Dataset) -> list[dict[str, np.ndarray]]:
    """Two batches: one with shortened axes, one with the sizes of ``samples``.

    Args:
        model: whose inputs are fed; a model may refuse what it is given here.
        samples: usual ones, matched with the model; two are taken where it takes any number.
    """
    assert samples.axes is not None
    usual = samples.feeds(np.arange(samples.axes.size or 2) % len(samples))
    values = [value for value in model.graph.inputs if value.name in usual]
    axes = {value: samples.axes.inputs.get(str(value.name)) for value in values}
    feeds = {str(value.name): _edges(value, axes[value], usual[str(value.name)]) for value in values}
    cut = {str(value.name): _shortened(value, axes[value], feeds[str(value.name)]) for value in values}
    return [cut, feeds]


def _edges(value: ir.Value, axis: int | None, usual: np.ndarray) -> np.ndarray:
    """What a run takes once stays as it is: there is no row of it that could be another."""
    if axis is None or not usual.size:
        return usual
    array = np.moveaxis(usual.copy(), axis, 0)
    array[0] = 0
    if len(array) > 1 and array.dtype.kind in "iub":
        last = table_rows(value) if array.dtype.kind != "b" else None
        array[1] = usual.max() if last is None else min(last - 1, np.iinfo(array.dtype).max)
    return np.moveaxis(array, 0, axis)


def _shortened(value: ir.Value, axis: int | None, array: np.ndarray) -> np.ndarray:
    dims = list(value.shape or ())
    kept = [
        slice(None) if place == axis or isinstance(dim, int) else slice(-(-size // 2))
        for place, (dim, size) in enumerate(zip(dims, array.shape))
    ]
    return np.ascontiguousarray(array[tuple(kept)]) if kept else array
