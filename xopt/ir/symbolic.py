"""What is known about every tensor of a graph: its dimensions, and the numbers in small integer tensors, as
polynomials.

Exporters compute the targets of Reshape, Expand and Slice in the graph (Shape, Gather, Concat, Range, Where ...).
Here that arithmetic is carried out on symbols, so that a target reads ``[batch, seq, 12, 32]`` whatever the exporter
wrote for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from xopt.ir.edit import constant
from xopt.ir.number_rules import LARGEST, NUMBER_RULES
from xopt.ir.poly import Poly
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import SHAPE_RULES, Dims, Numbers, Shapes
from xopt.ir.spatial_rules import SPATIAL_RULES

DIMENSIONS = {**SHAPE_RULES, **SPATIAL_RULES}
"""Rules for the dimensions of the outputs, by operator."""


class Symbols:
    """Dimensions and integer contents of the values of ``graph``, found in one pass over its nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._dims: dict[ir.Value, Dims | None] = {}
        self._numbers: dict[ir.Value, Numbers | None] = {}
        for node in graph:
            self.visit(node)

    def visit(self, node: ir.Node) -> None:
        """Learn the outputs of a node whose inputs are known."""
        rule, evaluate = DIMENSIONS.get(op_of(node)), NUMBER_RULES.get(op_of(node))
        found: Shapes = None
        numbers: Numbers | None = None
        try:
            found = rule(self, node) if rule is not None else None
            for index, value in enumerate(node.outputs):
                self._dims[value] = found[index] if found is not None and index < len(found) else _declared(value)
            numbers = evaluate(self, node) if evaluate is not None else None
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
            pass  # a node that lacks an input or contradicts its shapes teaches nothing
        if numbers is not None and len(numbers) <= LARGEST:
            self._numbers[node.outputs[0]] = numbers
        if op_of(node) == "Split":
            self._split(node)

    def _split(self, node: ir.Node) -> None:
        """Learn the numbers of each part of a vector."""
        left = self.numbers(node.inputs[0]) if self.rank(node.inputs[0]) == 1 else None
        for value in node.outputs:
            size = (self.dims(value) or (Poly.unknown(),))[0].constant
            if left is None or size is None:
                return
            self._numbers[value], left = left[:size], left[size:]

    def learn(self, value: ir.Value) -> ir.Value:
        """Learn what a rewrite has computed by a new node; gives it back."""
        if (node := value.producer()) is not None:
            self.visit(node)
        return value

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Dimensions of a value, or None when even its rank is unknown."""
        if value is None:
            return None
        if value not in self._dims:
            self._dims[value] = _declared(value)
        return self._dims[value]

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes."""
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def numbers(self, value: ir.Value | None) -> Numbers | None:
        """Elements of a small integer (or boolean, as 0 and 1) scalar or vector."""
        if value is None:
            return None
        if value not in self._numbers:
            large = value.const_value is not None and value.const_value.size > LARGEST
            array = constant(value) if not large else None
            small = array is not None and array.ndim <= 1 and array.size <= LARGEST and array.dtype.kind in "iub"
            self._numbers[value] = tuple(Poly.of(int(x)) for x in array.reshape(-1)) if small else None  # type: ignore[union-attr]
        return self._numbers[value]

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """Elements of a small integer tensor, all of them plain numbers."""
        numbers = self.numbers(value)
        found = None if numbers is None else [number.constant for number in numbers]
        return None if found is None or None in found else found  # type: ignore[return-value]


def name_dims(graph: ir.Graph) -> None:
    """Write the dimensions that are numbers, or dimensions of the graph's inputs, into shapes that lack them."""
    symbols = Symbols(graph)
    symbolic = [dim for value in graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)]
    names = {Poly.axis(dim.value): dim.value for dim in symbolic if dim.value}
    for node in graph:
        for value in node.outputs:
            dims = symbols.dims(value)
            if dims is None or (value.shape is not None and len(value.shape) != len(dims)):
                continue
            old = list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)] * len(dims)
            value.shape = ir.Shape([_named(have, dim, names) for have, dim in zip(old, dims)])


def _named(have: int | ir.SymbolicDim, dim: Poly, names: Mapping[Poly, str]) -> int | ir.SymbolicDim | str:
    if isinstance(have, int) or have.value in names.values():
        return have
    return dim.constant if dim.constant is not None else names.get(dim, have)


def _declared(value: ir.Value) -> Dims | None:
    if value.const_value is not None:
        return tuple(Poly.of(int(dim)) for dim in value.const_value.shape.numpy())
    if value.shape is None:
        return None
    return tuple(
        Poly.of(dim) if isinstance(dim, int) else Poly.axis(dim.value) if dim.value else Poly.unknown()
        for dim in value.shape
    )
