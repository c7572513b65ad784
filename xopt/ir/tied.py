"""Tied embeddings: a table of tokens that is also, transposed, the matrix of the last layer (GPT-2 and many others).

A canonical graph has both, since a linear layer's matrix lies as MatMul reads it; whatever writes weights can store
one of them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import is_op

LARGE = 1 << 20
"""Bytes from which on looking for a twin is worth it."""


def tied_tables(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Tables [V, C] that are only read by rows (Gather), each with the matrix [C, V] that holds the same numbers."""
    candidates: dict[ir.Value, ir.TensorProtocol] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= LARGE and len(tensor.shape) == 2 and not value.is_graph_output():
            candidates[value] = tensor
    tables = [value for value in candidates if _is_table(value)]
    matrices = [value for value in candidates if _is_matrix(value)]
    return {table: matrix for table in tables for matrix in matrices if _twins(candidates[table], candidates[matrix])}


def _is_table(value: ir.Value) -> bool:
    uses = value.uses()
    return bool(uses) and all(
        is_op(use.node, "Gather") and use.idx == 0 and use.node.attributes.get_int("axis", 0) == 0 for use in uses
    )


def _is_matrix(value: ir.Value) -> bool:
    return all(is_op(use.node, "MatMul") and use.idx == 1 for use in value.uses())


def _twins(table: ir.TensorProtocol, matrix: ir.TensorProtocol) -> bool:
    if table.dtype != matrix.dtype or list(table.shape) != list(matrix.shape)[::-1]:
        return False
    first, second = table.numpy(), matrix.numpy().T
    if first.ctypes.data == second.ctypes.data and first.strides == second.strides:
        return True
    return np.array_equal(first[:2], second[:2]) and np.array_equal(first, second)
