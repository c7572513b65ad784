"""The operands of attention, and their rewrite into the QDQ form: ``Attention(DQ(Q(q)), DQ(Q(k)), DQ(Q(v)))``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from xopt.ir import edit, walk
from xopt.passes.quantize.layers import quantized_input
from xopt.passes.quantize.ranges import Range
from xopt.passes.quantize.scales import Scale, scales_by_head


@dataclass(frozen=True)
class Operands:
    """Q, K and V of an attention node."""

    node: ir.Node

    @property
    def name(self) -> str:
        """Name of the node."""
        return str(self.node.name)

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """What is multiplied."""
        return tuple(edit.operand(self.node, index) for index in range(3))

    @property
    def heads(self) -> tuple[int, ...]:
        """Of each operand."""
        return walk.attention_heads(self.node)

    def problem(self) -> str | None:
        """Why they cannot be quantized whatever the data, or None."""
        if any(edit.producer(value, "DequantizeLinear") is not None for value in self.values):
            return "already-quantized"
        if not all(self.heads):
            return "four-dimensional"
        if any(value.dtype != ir.DataType.FLOAT for value in self.values):
            return "not-float32"
        return None

    def scales(self, seen: Mapping[str, Range]) -> list[Scale]:
        """Of each operand, by the ranges of its columns.

        The result of a product, quantized right away, has a single one: onnxruntime takes no others there.
        """
        found = []
        for index, (value, heads) in enumerate(zip(self.values, self.heads, strict=True)):
            watched = seen[str(value.name)]
            count = 1 if edit.producer(value, "MatMul") is not None else heads
            found.append(scales_by_head(watched.lows.numpy(), watched.highs.numpy(), count, symmetric=index == 0))
        return found


def operands_of_attention(graph: ir.Graph) -> list[Operands]:
    """Of all attention nodes, in the order of execution."""
    return [Operands(node) for node in graph if edit.is_op(node, "Attention")]


def named(operands: Operands, patterns: Sequence[str]) -> bool:
    """Whether a pattern with wildcards names the attention."""
    return any(fnmatchcase(operands.name, one) for one in patterns)


def quantize_operands(operands: Operands, seen: Mapping[str, Range]) -> None:
    """Rewrite one attention node."""
    for index, (value, scale) in enumerate(zip(operands.values, operands.scales(seen), strict=True)):
        operands.node.replace_input_with(index, quantized_input(operands.node, value, scale))
