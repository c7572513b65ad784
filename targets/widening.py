"""Types that processors do not compute with, carried in ones that they do while a graph is lowered.

    before   y: float16 = MatMul(x: float16, w: float16)
    after    y = Pack(MatMul(Unpack(x), w: float32))         everything in float32 from the inputs to the outputs

float16, bfloat16 and smaller floats are carried in float32, integers of less than a byte in int8 or uint8. Sums,
products, softmax and norms are so computed at the speed of float32, and rounded where the model says so: by its Casts
(`Round`), and where a value leaves it (`Pack`). In between a value keeps the digits that float32 has, as compilers
for accelerators keep them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

DOMAIN = "xopt.narrow"
"""Of the operators that :mod:`xopt.targets.ops.narrow` emits."""

_TYPES = ir.DataType
CARRIERS: dict[ir.DataType, ir.DataType] = {
    **dict.fromkeys((_TYPES.FLOAT16, _TYPES.BFLOAT16), _TYPES.FLOAT),
    **dict.fromkeys(
        (_TYPES.FLOAT8E4M3FN, _TYPES.FLOAT8E4M3FNUZ, _TYPES.FLOAT8E5M2, _TYPES.FLOAT8E5M2FNUZ), _TYPES.FLOAT
    ),
    **dict.fromkeys((_TYPES.FLOAT8E8M0, _TYPES.FLOAT6E2M3, _TYPES.FLOAT6E3M2, _TYPES.FLOAT4E2M1), _TYPES.FLOAT),
    **dict.fromkeys((_TYPES.INT4, _TYPES.INT2), _TYPES.INT8),
    **dict.fromkeys((_TYPES.UINT4, _TYPES.UINT2), _TYPES.UINT8),
}
"""By the type of a value, the one that it is carried in."""

INEXACT = (_TYPES.FLOAT16, _TYPES.BFLOAT16)
"""Types that are computed with: what is carried may lie between their numbers."""

_NAMING = ("dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")
"""Attributes that name the type of what a node computes, or computes with."""


def storage(dtype: ir.DataType) -> str:
    """What compiled code takes a tensor of a type for in memory: bits, unless it is float16 or computed with."""
    if dtype not in CARRIERS or dtype == _TYPES.FLOAT16:
        return dtype.numpy().name
    return "uint16" if dtype == _TYPES.BFLOAT16 else "uint8"


def widen(model: ir.Model) -> None:
    """Carry all narrow values of a canonical model in wider types, in place. Inputs and outputs stay what they are."""
    given = list(model.graph.inputs)
    kinds = {value: value.dtype for value in values_of(model) if value.dtype is not None and value.dtype in CARRIERS}
    if not kinds:
        return
    for node in list(model.graph.all_nodes()):
        _adapt(node, kinds)
    for value, kind in kinds.items():
        if value not in given:
            retype(value, CARRIERS[kind])
    for value in given:
        if value in kinds:
            _unpack_input(model.graph, value)
    for place, value in enumerate(model.graph.outputs):
        if value in kinds and value not in given:
            model.graph.outputs[place] = _packed(model.graph, value, kinds[value])


def values_of(model: ir.Model) -> Iterable[ir.Value]:
    """All values of a model's graphs, those inside nodes among them."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def retype(value: ir.Value, carrier: ir.DataType) -> None:
    """Make ``value`` one of a type that holds its numbers; constants are converted when they are read."""
    tensor = value.const_value
    value.type = ir.TensorType(carrier)  # a clone shares its types with the model that it is of
    if tensor is not None:
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(tensor.numpy().astype(carrier.numpy()), dtype=carrier),
            dtype=carrier,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name,
        )


def write_types(node: ir.Node, narrow: Collection[ir.DataType]) -> None:
    """Name in a node's attributes the carriers of types, and hold constants in them."""
    for name in _NAMING:
        found = node.attributes.get(name)
        if found is not None and found.value in {int(kind) for kind in narrow}:
            node.attributes[name] = ir.AttrInt64(name, int(CARRIERS[ir.DataType(found.value)]))
    for name, found in list(node.attributes.items()):
        if found.type == ir.AttributeType.TENSOR and found.value.dtype in narrow:
            carrier = CARRIERS[found.value.dtype]
            array = np.asarray(found.value.numpy().astype(carrier.numpy()))
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(array, dtype=carrier))


def _adapt(node: ir.Node, kinds: dict[ir.Value, ir.DataType]) -> None:
    """Say with operators of the domain, or by attributes, what the types of a node have said."""
    narrow = kinds.get(node.outputs[0]) if node.outputs else None
    source = kinds.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if node.op_type in ("Cast", "CastLike") and not node.domain:
        _cast(node, source, narrow)
    elif node.op_type == "BitCast" and not node.domain and (source or narrow):
        _bit_cast(node, source, narrow)
    elif node.op_type == "QuantizeLinear" and narrow is not None:
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(narrow))
    else:
        write_types(node, CARRIERS)


def _cast(node: ir.Node, source: ir.DataType | None, narrow: ir.DataType | None) -> None:
    target = node.outputs[0].dtype
    if target is None:
        return
    x = node.inputs[0]
    if source in INEXACT and not target.is_floating_point():
        x = _insert(node, "Round", [x], source)  # a whole number may lie between
    if narrow is not None:
        node.domain, node.op_type = DOMAIN, "Round"
        node.attributes["type"] = ir.AttrInt64("type", int(narrow))
        node.attributes.pop("to", None)
    else:
        node.op_type = "Cast"
        node.attributes["to"] = ir.AttrInt64("to", int(target))
    node.resize_inputs(1)
    node.replace_input_with(0, x)


def _bit_cast(node: ir.Node, source: ir.DataType | None, narrow: ir.DataType | None) -> None:
    """``Pack``, bits as bits, ``Unpack``; each where it is needed."""
    node.domain = DOMAIN
    if source is not None:
        node.replace_input_with(0, _insert(node, "Pack", [node.inputs[0]], source))
    if narrow is not None:
        bits = ir.Node(DOMAIN, "BitCast", node.inputs, node.attributes.values(), num_outputs=1)
        bits.outputs[0].name = f"{node.outputs[0].name}/bits"
        bits.outputs[0].shape = node.outputs[0].shape
        assert node.graph is not None
        node.graph.insert_before(node, bits)
        node.op_type = "Unpack"
        node.attributes.clear()
        node.attributes["type"] = ir.AttrInt64("type", int(narrow))
        node.replace_input_with(0, bits.outputs[0])


def _insert(site: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], kind: ir.DataType) -> ir.Value:
    node = ir.Node(DOMAIN, op_type, inputs, [ir.AttrInt64("type", int(kind))], num_outputs=1)
    node.outputs[0].name = f"{site.outputs[0].name}/{op_type}"
    node.outputs[0].shape = inputs[0].shape if inputs[0] is not None else None
    assert site.graph is not None
    site.graph.insert_before(site, node)
    return node.outputs[0]


def _unpack_input(graph: ir.Graph, value: ir.Value) -> None:
    assert value.dtype is not None
    node = ir.Node(DOMAIN, "Unpack", [value], [ir.AttrInt64("type", int(value.dtype))], num_outputs=1)
    carried = node.outputs[0]
    carried.name, carried.shape, carried.dtype = f"{value.name}/Unpack", value.shape, CARRIERS[value.dtype]
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, carried)
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)
    node.replace_input_with(0, value)


def _packed(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """The output as it is stored, under the name that callers know."""
    node = ir.Node(DOMAIN, "Pack", [_unrounded(value, kind)], [ir.AttrInt64("type", int(kind))], num_outputs=1)
    stored = node.outputs[0]
    stored.name, value.name = value.name, f"{value.name}/carried"
    stored.shape, stored.dtype = value.shape, kind
    graph.append(node)
    return stored


def _unrounded(value: ir.Value, kind: ir.DataType) -> ir.Value:
    """What ``value`` is before it is rounded as ``Pack`` rounds: of the types that are computed with, by a Cast."""
    node = value.producer()
    if kind not in INEXACT or node is None or (node.domain, node.op_type) != (DOMAIN, "Round"):
        return value
    source = node.inputs[0]
    same = source is not None and source.dtype == CARRIERS[kind] and source.graph is value.graph
    return source if same and source is not None and node.attributes["type"].value == int(kind) else value
