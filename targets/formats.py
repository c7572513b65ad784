"""In which formats the values of a graph lie in memory: what products at low precision read, their producers write.

A linear layer at low precision reads its activations as bfloat16 or uint8. The kernel that computes a value writes it
in every format that somebody reads (a normalization before QKV and a residual: bfloat16 and float32), so that no
conversion remains between kernels; only what no kernel of ours computes is converted by a kernel of its own.

    precision "bf16"                     activations of linear layers and attention: bfloat16; sums: float32
    DequantizeLinear(QuantizeLinear(x))  activations of a product with a DequantizeLinear'd int8 matrix: uint8
                                         Q, K and V of attention: uint8 (see `xopt.targets.integer_attention`)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from xopt.ir.schema import op_of, unread
from xopt.targets.symbolic import Array

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Format:
    """How a float tensor lies in memory.

    Attributes:
        name: "float32", "bfloat16" (stored as uint16) or "uint8", which holds round(x / scale) + zero_point;
            "uint8-columns" has a scale and a zero point for each column.
    """

    name: str
    scale: float = 1.0
    zero_point: int = 0
    columns: tuple[tuple[float, ...], tuple[int, ...]] = ((), ())

    @property
    def quantized(self) -> bool:
        """Whether kernels that write it need scales and zero points."""
        return self.name.startswith("uint8")

    @property
    def grid(self) -> Array:
        """Scales and zero points [2], or [2, columns]."""
        return np.array(self.columns if any(self.columns) else (self.scale, self.zero_point), np.float32)


def by_columns(scale: tuple[float, ...], zero_point: tuple[int, ...]) -> Format:
    """uint8 with a scale and a zero point for each column."""
    return Format("uint8-columns", columns=(scale, zero_point))


FLOAT32 = Format("float32")
BFLOAT16 = Format("bfloat16")


@dataclass
class Formatted:
    """A value that lies in memory in other formats than float32 alone."""

    tensors: dict[Format, relax.Expr] = field(default_factory=dict)

    @property
    def any(self) -> relax.Expr:
        """One of the tensors; all have the shape of the value."""
        return next(iter(self.tensors.values()))


@dataclass(frozen=True)
class Quantized:
    """The operands of a linear layer on integers: ``DQ(Q(source)) @ DQ(weight)``.

    Attributes:
        source: the float activation.
        format: what it is quantized to.
        weight: constant [K, N], int8, or uint8 with zero point 128.
        scale: constant, one number or one a column.
    """

    source: ir.Value
    format: Format
    weight: ir.Value
    scale: ir.Value

    def matrix(self, array: Array) -> Array:
        """The weight's content as int8."""
        return array if array.dtype == np.int8 else (array.astype(np.int16) - 128).astype(np.int8)


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear node of constants that computes ``value``, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain or not set(unread(node)) <= {"block_size"}:
        return None
    return node if all(given is None or given.const_value is not None for given in node.inputs) else None


def dequantize(node: ir.Node) -> Array:
    """The constant that a DequantizeLinear node computes: (x - zero_point) * scale."""
    x, scale, *rest = (None if given is None else _constant(given) for given in node.inputs)
    assert x is not None and scale is not None
    zero_point = rest[0] if rest and rest[0] is not None else np.zeros_like(scale, dtype=x.dtype)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    if block:
        extent = x.shape[axis]
        scale, zero_point = (np.repeat(given, block, axis).take(range(extent), axis) for given in (scale, zero_point))
    elif scale.ndim == 1 and x.ndim:
        shape = [-1 if position == axis % x.ndim else 1 for position in range(x.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    exact = np.float32 if x.dtype.kind == "f" else np.int64  # floats of few bits are carried in float32
    difference = x.astype(exact) - zero_point.astype(exact)
    result: Array = (difference.astype(np.float32) * scale).astype(scale.dtype)
    return result


def quantized_operands(matmul: ir.Node) -> Quantized | None:
    """The integer operands of a MatMul, or None where it is none of integers that our kernel multiplies."""
    activation, weight = (value.producer() if value is not None else None for value in matmul.inputs[:2])
    if op_of(activation) != "DequantizeLinear" or activation is None or dequantized(matmul.inputs[1]) is None:
        return None
    assert weight is not None
    source = activation.inputs[0].producer() if activation.inputs[0] is not None else None
    if op_of(source) != "QuantizeLinear" or source is None or source.inputs[0] is None:
        return None
    form = _activation_format(source)
    if form is None or form != _activation_format(activation) or not _is_symmetric(weight):
        return None
    matrix, scale = weight.inputs[:2]
    assert matrix is not None and scale is not None
    return Quantized(source.inputs[0], form, matrix, scale)


def _constant(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _activation_format(node: ir.Node) -> Format | None:
    """What a QuantizeLinear or DequantizeLinear node with one scale stands for; int8 is uint8 moved by 128."""
    scale, zero_point = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or zero_point is None or scale.const_value is None or zero_point.const_value is None:
        return None
    number, zero = _constant(scale), _constant(zero_point)
    if number.size != 1 or number.dtype != np.float32 or zero.dtype not in (np.uint8, np.int8):
        return None
    return Format("uint8", float(number.reshape(())), int(zero.reshape(())) + (128 if zero.dtype == np.int8 else 0))


def _is_symmetric(node: ir.Node) -> bool:
    """Whether a dequantized matrix is int8 around zero or uint8 around 128, with one float32 scale or one a column."""
    matrix, scale = node.inputs[:2]
    assert matrix is not None and scale is not None
    content, factor = _constant(matrix), _constant(scale)
    if content.ndim != 2 or factor.dtype != np.float32 or content.dtype not in (np.int8, np.uint8):
        return False
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if factor.size > 1 and (factor.ndim != 1 or axis % 2 != 1):
        return False
    given = node.inputs[2] if len(node.inputs) > 2 else None
    middle = 0 if content.dtype == np.int8 else 128
    return bool((_constant(given) == middle).all()) if given is not None else middle == 0


def plan_formats(
    graph: ir.Graph,
    layers: Mapping[ir.Node, Quantized | None],
    precision: str,
    attentions: Collection[ir.Node] = (),
    stored: Mapping[ir.Value, Format] = MappingProxyType({}),
) -> tuple[dict[ir.Value, tuple[Format, ...]], set[ir.Node]]:
    """The formats in which values are read, and the nodes that nobody needs to compute.

    Args:
        graph: a canonical graph.
        layers: the MatMul nodes of linear layers, with their integer operands if they have them.
        precision: "fp32" or "bf16".
        attentions: nodes that are computed on integers.
        stored: the tensors that those read, with their formats.

    Returns:
        Formats by value, absent where float32 is all; and quantizing nodes whose work kernels do.
    """
    absorbed = _absorbed(graph, layers, attentions)
    wanted: dict[ir.Value, tuple[Format, ...]] = {}
    for value in _values(graph):
        formats = [stored[value]] if value in stored else []
        formats += [
            _read_as(node, index, layers, absorbed, precision)
            for node, index in value.uses()
            if not (value in stored and _leads_to(node, absorbed))
        ]
        formats += [FLOAT32] * value.is_graph_output()
        unique = tuple(dict.fromkeys(formats))
        if unique and unique != (FLOAT32,):
            wanted[value] = unique
    return wanted, absorbed


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _leads_to(node: ir.Node, absorbed: set[ir.Node]) -> bool:
    """Whether a node is one of those, or splits a tensor for them alone."""
    if node.op_type != "Split":
        return node in absorbed
    return all(reader in absorbed for output in node.outputs for reader, _ in output.uses())


def _absorbed(
    graph: ir.Graph, layers: Mapping[ir.Node, Quantized | None], attentions: Collection[ir.Node]
) -> set[ir.Node]:
    """QuantizeLinear and DequantizeLinear nodes that only integer layers and attentions read."""
    absorbed: set[ir.Node] = set()
    for node in reversed(list(graph)):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.outputs[0].is_graph_output():
            continue
        readers = list(node.outputs[0].uses())
        if all(
            reader in absorbed or (index < 2 and layers.get(reader) is not None) or (index < 3 and reader in attentions)
            for reader, index in readers
        ):
            absorbed.add(node)
    return absorbed


def _read_as(
    node: ir.Node, index: int, layers: Mapping[ir.Node, Quantized | None], absorbed: set[ir.Node], precision: str
) -> Format:
    """The format in which ``node`` reads its input ``index``."""
    if node in absorbed and node.op_type == "QuantizeLinear" and index == 0:
        return _activation_format(node) or FLOAT32
    if precision == "bf16":
        if node in layers and layers[node] is None and index == 0:
            return BFLOAT16
        if _is_attention_operand(node, index):
            return BFLOAT16
    return FLOAT32


def _is_attention_operand(node: ir.Node, index: int) -> bool:
    """Whether input ``index`` is Q, K or V of attention, or all of them in one tensor that is split."""
    if node.op_type in ("Attention", "PackedAttention"):
        return index < 3
    if node.op_type != "Split" or index != 0:
        return False
    readers = [(reader, position) for output in node.outputs for reader, position in output.uses()]
    return all(reader.op_type in ("Attention", "PackedAttention") and position < 3 for reader, position in readers)


def decoded(tensor: Any, form: Format, grid: Any = None) -> Any:
    """A stored element as float32, as a TIR expression; ``grid``: its scale and zero point where columns differ."""
    from tvm import tirx

    if grid is not None:
        return (tensor.astype("float32") - grid[1]) * grid[0]

    if form == BFLOAT16:
        return tirx.reinterpret("float32", tensor.astype("uint32") << tirx.const(16, "uint32"))
    return (tensor.astype("int32") - form.zero_point).astype("float32") * tirx.const(form.scale, "float32")
