"""Inputs at the edges of what a model accepts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from xopt.data.dataset import Dataset
from xopt.data.edges import edge_feeds


@pytest.mark.parametrize(
    ("dtype", "rows", "last"), [(ir.DataType.UINT8, 300, 255), (ir.DataType.UINT8, 9, 8), (ir.DataType.INT64, 300, 299)]
)
def test_the_last_row_of_a_table_is_taken_or_the_last_that_the_type_holds(
    dtype: ir.DataType, rows: int, last: int
) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g ({dtype.name.lower()}[batch, 3] ids) => (float[batch, 3, 2] y)
        <float[{rows}, 2] table> {{ wide = Cast<to = 7>(ids) y = Gather(table, wide) }}
    """
    model = ir.from_onnx_text(text, [ir.tensor(np.zeros((rows, 2), np.float32), name="table")])
    for feeds in edge_feeds(model, Dataset.random(model, 4, 0)):
        np.testing.assert_array_equal(feeds["ids"], [[0] * 3, [last] * 3])
