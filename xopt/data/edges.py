"""Inputs at the edges of what a model accepts: where a rewrite that suits usual data may be wrong.

    row 0    zeros: the first row of each table, masks that hide everything, no signal
    row 1    the last row of each table, the largest of other integers, a usual sample of floats
    others   usual samples
Open axes other than the first are cut to half, so that no size can be taken for a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from xopt.data.vocabulary import table_rows

if TYPE_CHECKING:
    from xopt.data.dataset import Dataset


def edge_feeds(model: ir.Model, samples: Dataset, batch: int | None) -> list[dict[str, np.ndarray]]:
    """Two batches: one with shortened axes, one with the sizes of ``samples``.

    Args:
        model: whose inputs are fed; a model may refuse what it is given here.
        samples: usual ones.
        batch: rows that the model demands; two where it takes any number.
    """
    values = [value for value in model.graph.inputs if value.name in samples.inputs]
    rows = np.arange(batch or 2) % len(samples)
    feeds = {str(value.name): _edges(value, samples.inputs[str(value.name)][rows]) for value in values}
    cut = {str(value.name): _shortened(value, feeds[str(value.name)]) for value in values}
    return [cut, feeds]


def _edges(value: ir.Value, usual: np.ndarray) -> np.ndarray:
    array = usual.copy()
    array[0] = 0
    if len(array) > 1 and array.dtype.kind in "iub":
        last = table_rows(value) if array.dtype.kind != "b" else None
        array[1] = usual.max() if last is None else min(last - 1, np.iinfo(array.dtype).max)
    return array


def _shortened(value: ir.Value, array: np.ndarray) -> np.ndarray:
    dims = list(value.shape or ())
    kept = [
        slice(None) if place == 0 or isinstance(dim, int) else slice(-(-size // 2))
        for place, (dim, size) in enumerate(zip(dims, array.shape))
    ]
    return np.ascontiguousarray(array[tuple(kept)])
