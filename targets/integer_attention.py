"""Attention whose Q, K and V are quantized: which integers its kernel reads, and how they stand for numbers.

    projection ─▶ Split ─▶ (QuantizeLinear ─▶ DequantizeLinear) x 3 ─▶ Attention

A head has one scale and zero point in each of Q, K and V, so that its sums are sums of integers. The kernel that
computes the projection writes it as uint8, column by column on the grid of its head, and attention reads it in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xopt.ir import edit, walk
from xopt.ir.schema import unread
from xopt.targets.formats import Format, by_columns
from xopt.targets.symbolic import Array

OPS = ("Attention", "PackedAttention")
MASKS = (ir.DataType.BOOL, ir.DataType.FLOAT)
MIDDLE = 128
"""The zero point that queries must have."""


@dataclass(frozen=True)
class Part:
    """Q, K or V.

    Attributes:
        source: the float value that is quantized.
        scale, zero_point: of each column.
        heads: that share the columns evenly.
    """

    source: ir.Value
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    heads: int

    @property
    def format(self) -> Format:
        """What the value is stored as."""
        return by_columns(self.scale, self.zero_point)

    @property
    def by_head(self) -> tuple[Array, Array]:
        """Scale and zero point of each head."""
        step = len(self.scale) // self.heads
        return np.asarray(self.scale[::step], np.float32), np.asarray(self.zero_point[::step])


def parts(node: ir.Node) -> tuple[Part, Part, Part] | None:
    """The quantized Q, K and V of an attention node, or None where they are not all integers that the kernel takes."""
    if node.op_type not in OPS or not _plain(node):
        return None
    found = [_part(node.inputs[index], count) for index, count in enumerate(walk.attention_heads(node)) if count]
    if len(found) != 3 or not all(found):
        return None
    q, k, v = (part for part in found if part is not None)
    multiples_of_four = all(len(part.scale) // part.heads % 4 == 0 for part in (q, k))
    return (q, k, v) if multiples_of_four and set(q.zero_point) == {MIDDLE} else None


def _plain(node: ir.Node) -> bool:
    """Whether nothing else keeps the node from the kernel: a cache, a second output, a mask of few dimensions."""
    if node.op_type == "PackedAttention":
        return True
    if unread(node):
        return False
    mask = edit.input_at(node, 3)
    known = mask is None or (mask.dtype in MASKS and mask.shape is not None and len(mask.shape) == 4)
    return known


def _part(value: ir.Value | None, heads: int) -> Part | None:
    dequantizer = edit.producer(value, "DequantizeLinear")
    quantizer = edit.producer(dequantizer.inputs[0], "QuantizeLinear") if dequantizer is not None else None
    if dequantizer is None or quantizer is None or list(dequantizer.inputs[1:]) != list(quantizer.inputs[1:]):
        return None
    source, (scale, zero) = quantizer.inputs[0], (edit.constant(edit.input_at(quantizer, index)) for index in (1, 2))
    if source is None or source.shape is None or scale is None or zero is None or zero.dtype != np.uint8:
        return None
    rank, columns = len(source.shape), source.shape[-1]
    last = scale.size == 1 or quantizer.attributes.get_int("axis", 1) % rank == rank - 1
    if not isinstance(columns, int) or columns % heads or scale.dtype != np.float32 or not last:
        return None
    scales, zeros = np.resize(scale, columns), np.resize(zero, columns)
    if any(np.ptp(grid.reshape(heads, -1), axis=1).any() for grid in (scales, zeros)):
        return None
    return Part(source, tuple(map(float, scales)), tuple(map(int, zeros)), heads)


def stored_formats(attentions: dict[ir.Node, tuple[Part, Part, Part]]) -> dict[ir.Value, Format]:
    """The tensors that integer attention reads, each with its format: a projection as a whole, or its parts.

    Attentions that cannot be served so are removed from ``attentions``: parts of one tensor that do not make it up, or
    that others read on other grids, and rows that do not fill whole lanes.
    """
    formats: dict[ir.Value, Format] = {}
    for node, operands in list(attentions.items()):
        wanted = _stored(operands)
        if not wanted or any(formats.get(value, form) != form for value, form in wanted.items()):
            del attentions[node]
        else:
            formats |= wanted
    return formats


def _stored(operands: tuple[Part, Part, Part]) -> dict[ir.Value, Format]:
    by_source = {part.source: part for part in operands}
    if any(len(part.scale) % 4 for part in operands):
        return {}
    splits = {edit.producer(part.source, "Split") for part in operands}
    if splits == {None}:
        return {part.source: part.format for part in operands} if len(by_source) == 3 else {}
    (split, *others) = splits
    if others or split is None or split.inputs[0] is None or set(split.outputs) != set(by_source):
        return {}
    ordered = [by_source[output] for output in split.outputs]
    scale, zero_point = (sum((getattr(part, name) for part in ordered), ()) for name in ("scale", "zero_point"))
    return {split.inputs[0]: by_columns(scale, zero_point)}
