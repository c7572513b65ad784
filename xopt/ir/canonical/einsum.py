"""Einsum of two operands as MatMul, its axes brought in order by Transpose.

bhid,bhjd->bhij, bqhd,bkhd->bhqk     ->  MatMul(Transpose(q), Transpose(k))
bhid,bjd->bhij, bqgrd,bkgd->bgrqk    ->  the same, with axes of size 1 where one of them lacks an axis
bse,hde->bhsd, bhsd,hde->bse         ->  a linear layer of the constant as a matrix, and Reshape
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import constant, initializer, insert, operand, replace
from xopt.ir.shape_rules import einsum_terms


@dataclass(frozen=True)
class Letters:
    """Letters of both operands and of the result: those that only one has, those that are summed, the batch."""

    a: str
    b: str
    out: str

    @property
    def rows(self) -> list[str]:
        """Of the first operand alone."""
        return [x for x in self.a if x not in self.b]

    @property
    def columns(self) -> list[str]:
        """Of the second operand alone."""
        return [x for x in self.b if x not in self.a]

    @property
    def summed(self) -> list[str]:
        """Of both, and not of the result."""
        return [x for x in self.a if x in self.b and x not in self.out]

    @property
    def batch(self) -> list[str]:
        """Of all three."""
        return [x for x in self.a if x in self.b and x in self.out]


def einsum(node: ir.Node) -> bool:
    """A node as a product of matrices, where it is one."""
    found = einsum_terms(node)
    if found is None or len(found[0]) != 2:
        return False
    (a, b), out = found
    letters = Letters(a, b, out)
    if any(value is None or value.shape is None for value in node.inputs) or not letters.summed:
        return False
    if not {*letters.rows, *letters.columns} <= {*out} or not _same_sizes(node, letters):
        return False
    if not letters.batch:
        for x, weight, own in ((0, 1, letters), (1, 0, Letters(b, a, out))):
            array = constant(node.inputs[weight])
            if array is not None and _linear(node, operand(node, x), array, own):
                return True
    return _product(node, letters)


def _same_sizes(node: ir.Node, letters: Letters) -> bool:
    """Whether the summed axes are of one size: Einsum lets a size of 1 broadcast, MatMul does so for batches alone."""
    shapes = [operand(node, index).shape for index in (0, 1)]
    if shapes[0] is None or shapes[1] is None or [len(s or ()) for s in shapes] != [len(letters.a), len(letters.b)]:
        return False
    return all(shapes[0][letters.a.index(x)] == shapes[1][letters.b.index(x)] for x in letters.summed)


def _linear(node: ir.Node, x: ir.Value, array: np.ndarray, letters: Letters) -> bool:
    """``x [rows..., summed...] @ W [summed, columns]``, when the operand or the weight has more axes than these."""
    rows, summed, columns = letters.rows, letters.summed, letters.columns
    if not rows or not columns or (len(summed) == len(columns) == 1):
        return False
    sizes = dict(zip(letters.b, array.shape))
    depth, width = (math.prod(sizes[letter] for letter in part) for part in (summed, columns))
    graph = node.graph
    if not isinstance(graph, ir.Graph) or not depth or not width:
        return False
    matrix = array.transpose([letters.b.index(letter) for letter in (*summed, *columns)]).reshape(depth, width)
    x = _turned(node, x, letters.a, "".join((*rows, *summed)))
    kept = list(x.shape or ())[: len(rows)]
    if len(summed) > 1:
        x = _reshaped(node, x, len(rows), [depth])
    y = insert(node, "MatMul", [x, initializer(graph, "einsum/weight", matrix)], shape=[*kept, width])
    if len(columns) > 1:
        y = _reshaped(node, y, len(rows), [sizes[letter] for letter in columns])
    return replace(node.outputs[0], _turned(node, y, "".join((*rows, *columns)), letters.out))


def _product(node: ir.Node, letters: Letters) -> bool:
    """A product over one letter; letters that one operand alone has, but for the last of each, are batches of size 1
    in the other.
    """
    if len(letters.summed) != 1 or not letters.rows or not letters.columns:
        return False
    (inner,) = letters.summed
    if not letters.batch and len(letters.columns) == 1:
        left = _turned(node, operand(node, 0), letters.a, "".join(letters.rows) + inner)
        right = _turned(node, operand(node, 1), letters.b, inner + letters.columns[0])
        order = "".join((*letters.rows, *letters.columns))
    else:
        row, column = (max(part, key=letters.out.index) for part in (letters.rows, letters.columns))
        lead = "".join(x for x in letters.out if x not in (row, column))
        left = _placed(node, operand(node, 0), letters.a, lead + row + inner)
        right = _placed(node, operand(node, 1), letters.b, lead + inner + column)
        order = lead + row + column
    shape = node.outputs[0].shape
    dims = None if shape is None else [shape[letters.out.index(letter)] for letter in order]
    product = insert(node, "MatMul", [left, right], shape=dims)
    return replace(node.outputs[0], _turned(node, product, order, letters.out))


def _placed(node: ir.Node, value: ir.Value, letters: str, order: str) -> ir.Value:
    """``value`` with its axes in this order, and an axis of size 1 for each letter that it does not have."""
    value = _turned(node, value, letters, "".join(x for x in order if x in letters))
    missing = [place for place, letter in enumerate(order) if letter not in letters]
    if not missing:
        return value
    array, graph = constant(value), node.graph
    assert isinstance(graph, ir.Graph)
    if array is not None:
        return initializer(graph, f"{value.name}_apart", np.expand_dims(array, missing))
    sizes = iter(value.shape or ())
    shape = [1 if place in missing else next(sizes) for place in range(len(order))]
    axes = initializer(graph, "axes", np.asarray(missing, np.int64))
    return insert(node, "Unsqueeze", [value, axes], shape=shape)


def _reshaped(node: ir.Node, value: ir.Value, kept: int, rest: list[int]) -> ir.Value:
    """``value`` with its first ``kept`` axes as they are, and these sizes behind them."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    table = initializer(graph, "einsum/shape", np.asarray([0] * kept + rest, np.int64))
    return insert(node, "Reshape", [value, table], shape=[*list(value.shape or ())[:kept], *rest])


def _turned(node: ir.Node, value: ir.Value, letters: str, order: str) -> ir.Value:
    """``value`` with its axes in another order: now when it is a constant."""
    if letters == order:
        return value
    perm = [letters.index(letter) for letter in order]
    array = constant(value)
    if array is not None and isinstance(node.graph, ir.Graph):
        return initializer(node.graph, f"{value.name}_t", array.transpose(perm))
    shape = None if value.shape is None else [value.shape[place] for place in perm]
    return insert(node, "Transpose", [value], {"perm": perm}, shape=shape)
