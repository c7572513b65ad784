"""Linear projections of a canonical graph: MatMul by a weight, its bias, and the part of a fused one.

Weights and inputs in the QDQ form (:mod:`xopt.ir.quantized`) are seen through.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xopt.ir import edit, quantized, walk


@dataclass(frozen=True)
class Projection:
    """``output = input @ weight[:, part] + bias[part]``.

    Attributes:
        matmul: the MatMul; its second input is the weight.
        bias: the Add of the bias, if any.
        weight: initializer [K, N]: floating, or the integers of a quantized one.
        bias_value: initializer [N], if any.
        part: columns that belong to this projection when the matmul is fused and split; None for all.
        input: [..., K], before it is quantized.
        output: [..., N], or the output of the Split that holds ``part``.
    """

    matmul: ir.Node
    bias: ir.Node | None
    weight: ir.Value
    bias_value: ir.Value | None
    part: slice | None
    input: ir.Value
    output: ir.Value

    @property
    def quantized(self) -> bool:
        """Whether the weight is dequantized from integers."""
        return self.matmul.inputs[1] is not self.weight

    @property
    def width(self) -> int:
        """Number of output columns that belong to this projection."""
        if self.part is not None:
            return int(self.part.stop - self.part.start)
        shape = walk.shape_of(self.weight)
        assert shape is not None and shape[1] is not None  # an initializer
        return shape[1]


def projection_into(value: ir.Value | None) -> Projection | None:
    """The projection that makes an operand of attention, seen through what is done to each head apart."""
    value, _ = before_per_head_ops(value)
    output, part = value, None
    if split := edit.producer(value, "Split"):
        part = _split_part(split, value)
        if part is None:
            return None
        value = split.inputs[0]
    return _linear(value, part, output)


def projection_from(value: ir.Value) -> Projection | None:
    """The projection that alone reads a value, with its bias."""
    read = quantized.after(value)
    readers = edit.consumers(read)
    if len(readers) != 1 or not edit.is_op(readers[0], "MatMul") or read.is_graph_output():
        return None
    matmul = readers[0]
    if matmul.inputs[0] is not read or quantized.stored_matrix(matmul.inputs[1]) is None:
        return None
    output = matmul.outputs[0]
    after = edit.consumers(output)
    biased = len(after) == 1 and not output.is_graph_output() and _bias_of(after[0], output) is not None
    output = after[0].outputs[0] if biased else output
    return _linear(output, None, output)


def before_per_head_ops(value: ir.Value | None) -> tuple[ir.Value | None, list[tuple[ir.Value, ir.Node]]]:
    """An operand of attention before what is done to each head apart, and the vectors [heads * d] of that with their
    readers: temperatures and biases of heads.
    """
    vectors: list[tuple[ir.Value, ir.Node]] = []
    while value is not None:
        value = quantized.before(value)
        node = value.producer()
        if edit.is_op(node, "RotaryEmbedding"):
            assert node is not None
            value = node.inputs[0]
        elif (inside := per_head_norm(node)) is not None:
            value = inside[0]
        elif node is not None and (constants := _per_head_constants(node)) is not None:
            vectors.append((constants, node))
            value = node.inputs[0]
        else:
            break
    return value, vectors


def _per_head_constants(node: ir.Node) -> ir.Value | None:
    """The vector that a node scales or shifts an operand by, when it is not the bias of a projection."""
    if not edit.is_op(node, "Mul", "Div", "Add", "Sub") or not walk.is_weight(node.inputs[1], rank=1):
        return None
    return None if edit.producer(node.inputs[0], "MatMul") is not None else node.inputs[1]


def per_head_norm(node: ir.Node | None) -> tuple[ir.Value, ir.Node] | None:
    """For the last node of Reshape [0,0,-1,d] - norm - Reshape [0,0,-1]: the value before, and the norm; that may be a
    division by the length.
    """
    if node is None or not edit.is_op(node, "Reshape") or walk.ints(node.inputs[1]) != [0, 0, -1]:
        return None
    norm = edit.producer(node.inputs[0], *walk.NORMS, "Div")
    split = edit.producer(norm.inputs[0], "Reshape") if norm is not None else None
    if norm is None or split is None:
        return None
    target = walk.ints(split.inputs[1])
    if target is None or len(target) != 4 or target[:3] != [0, 0, -1] or split.inputs[0] is None:
        return None
    return split.inputs[0], norm


def _split_part(split: ir.Node, output: ir.Value | None) -> slice | None:
    """The columns of a Split along the last axis that one output holds."""
    assert output is not None
    shape = walk.shape_of(split.inputs[0])
    rank = None if shape is None else len(shape)
    axis = walk.int_attribute(split, "axis", 0)
    sizes = walk.ints(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is None or not (axis == -1 or (rank is not None and axis == rank - 1)):
        return None
    index = output.index()
    assert index is not None
    start = sum(sizes[:index])
    return slice(start, start + sizes[index])


def _linear(value: ir.Value | None, part: slice | None, output: ir.Value | None) -> Projection | None:
    if value is None or output is None:
        return None
    add = value.producer()
    bias_value = _bias_of(add, None)
    if add is not None and bias_value is not None:
        value = add.inputs[0] if add.inputs[1] is bias_value else add.inputs[1]
    else:
        add = None
    matmul = edit.producer(value, "MatMul")
    weight = quantized.stored_matrix(matmul.inputs[1]) if matmul is not None else None
    if matmul is None or weight is None or matmul.inputs[0] is None:
        return None
    return Projection(matmul, add, weight, bias_value, part, quantized.before(matmul.inputs[0]), output)


def _bias_of(node: ir.Node | None, data: ir.Value | None) -> ir.Value | None:
    """The vector initializer that an Add adds (to ``data``, when given)."""
    if node is None or not edit.is_op(node, "Add"):
        return None
    for bias, other in ((node.inputs[1], node.inputs[0]), (node.inputs[0], node.inputs[1])):
        if walk.is_weight(bias, rank=1) and not walk.is_weight(other):
            return bias if data is None or other is data else None
    return None
