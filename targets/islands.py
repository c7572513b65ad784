"""Graphs of mixed precision in one type: float32 in the midst of float16, as converters and exporters put it there.

    before   y: float16 = MatMul(Cast(Softmax(Cast(scores, to=float32)), to=float16), v)
    after    y: float32 = MatMul(Softmax(scores), v)          cast where the model begins and ends

What is computed is carried in float32 (:mod:`xopt.targets.widening`), so such a Cast has nothing to do, but it stands
between nodes that are one kernel: the graph is brought into canonical form again without it. A Cast to half precision
stays where its rounding shows: in a result, and in what is cast back, compared or chosen by. A product, a norm or a sum
of half precision rounds by itself what it is given in more digits.
"""

from __future__ import annotations

import onnx_ir as ir

from xopt.ir import canonicalize
from xopt.ir.edit import insert, names_remembered, unique_name
from xopt.targets.widening import INEXACT, retype, values_of, write_types

FLOAT = ir.DataType.FLOAT

_ROUNDING = (
    "MatMul Gemm Conv ConvTranspose Einsum Attention RotaryEmbedding Softmax LogSoftmax LayerNormalization "
    "RMSNormalization BatchNormalization InstanceNormalization GroupNormalization ReduceMean ReduceSum Gelu Swish "
    "Sigmoid Tanh Erf Exp Log Sqrt Reciprocal"
)
ROUNDING = frozenset(_ROUNDING.split())
"""Operators whose results are no numbers of half precision, even if their operands are."""

ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))
"""The same for two computed operands; a constant may be 0, 1 or a power of 2."""

_KEEPING = (
    "Identity Reshape Flatten Transpose Squeeze Unsqueeze Slice Split Concat Pad Expand Gather Relu Neg Abs Max Min "
    "Where Clip"
)
KEEPING = frozenset(_KEEPING.split())
"""Operators whose results are among their operands, up to the sign."""

BLIND = frozenset(("Shape", "Size", "IsNaN"))
"""Operators that do not look at the digits of their operands."""


def merge_islands(model: ir.Model) -> None:
    """Bring a canonical model in which floats are cast to half precision, or back, to float32 throughout, in place.

    Inputs and outputs stay what they are. A model of one float type is left alone: it has nothing to merge.
    """
    nodes = list(model.graph.all_nodes())
    if not any(_between(node) for node in nodes):
        return
    given = list(model.graph.inputs)
    kinds = {value: value.dtype for value in values_of(model) if value.dtype is not None and value.dtype in INEXACT}
    with names_remembered():
        for node in nodes:
            _adapt(node, kinds)
        for value in given:
            if value in kinds:
                _cast_input(value, nodes[0])
        for place, value in enumerate(model.graph.outputs):
            if value in kinds and value not in given:
                model.graph.outputs[place] = _cast_output(model.graph, value, kinds[value])
    for value in kinds:
        if value not in given:
            retype(value, FLOAT)
    canonicalize(model)


def _between(node: ir.Node) -> bool:
    """Whether a node is a Cast from float32 to half precision, or back."""
    if (node.domain, node.op_type) != ("", "Cast") or node.inputs[0] is None:
        return False
    pair = (node.inputs[0].dtype, node.outputs[0].dtype)
    return FLOAT in pair and any(kind in INEXACT for kind in pair)


def _shows(value: ir.Value) -> bool:
    """Whether anything that reads ``value``, as it is or moved, would be another one without its rounding."""
    found, pending = {value}, [value]
    while pending:
        one = pending.pop()
        if one.is_graph_output():
            return True
        for node in {use.node for use in one.uses()}:
            computed = all(x is None or x.const_value is None for x in node.inputs)
            if node.domain or node.op_type not in ROUNDING | ARITHMETIC | KEEPING | BLIND:
                return True
            if node.op_type in KEEPING or (node.op_type in ARITHMETIC and not computed):
                pending += [result for result in node.outputs if result not in found]
                found.update(node.outputs)
    return False


def _adapt(node: ir.Node, kinds: dict[ir.Value, ir.DataType]) -> None:
    """Casts and attributes as they are where every value of half precision is one of float32."""
    source = kinds.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    narrow = kinds.get(node.outputs[0]) if node.outputs else None
    target = node.outputs[0].dtype if node.outputs else None
    cast = not node.domain and node.op_type in ("Cast", "CastLike") and target is not None
    bits = not node.domain and node.op_type == "BitCast"
    if source is not None and (bits or (cast and target is not None and not target.is_floating_point())):
        _narrow_operand(node, source)
    if bits and narrow is not None:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        whole = insert(node, "BitCast", [node.inputs[0]], attributes, dtype=narrow, shape=node.outputs[0].shape)
        _become_cast(node, whole, FLOAT)
    elif cast and target is not None:
        if narrow is not None and _shows(node.outputs[0]):
            _narrow_operand(node, narrow)
        _become_cast(node, node.inputs[0], FLOAT if narrow is not None else target)
    elif not bits:
        write_types(node, INEXACT)


def _narrow_operand(node: ir.Node, kind: ir.DataType) -> None:
    """Let a node read its first operand in half precision."""
    value = node.inputs[0]
    assert value is not None
    node.replace_input_with(0, insert(node, "Cast", [value], {"to": int(kind)}, dtype=kind, shape=value.shape))


def _become_cast(node: ir.Node, value: ir.Value | None, to: ir.DataType) -> None:
    node.op_type = "Cast"
    node.attributes.clear()
    node.attributes["to"] = ir.AttrInt64("to", int(to))
    node.resize_inputs(1)
    node.replace_input_with(0, value)


def _cast_input(value: ir.Value, first: ir.Node) -> None:
    uses = list(value.uses())
    wide = insert(first, "Cast", [value], {"to": int(FLOAT)}, dtype=FLOAT, shape=value.shape)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)


def _cast_output(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """The output as callers know it, of which ``value`` is the number in float32."""
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(kind))], num_outputs=1)
    stored = node.outputs[0]
    stored.name, value.name = value.name, unique_name(graph, f"{value.name}/wide")
    stored.shape, stored.type = value.shape, ir.TensorType(kind)
    graph.append(node)
    return stored
