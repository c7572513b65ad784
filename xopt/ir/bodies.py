"""An operator's function body: what ONNX itself says that it means, in simpler operators.

    before   y = GroupNormalization(x, scale, bias)      after   mean = ReduceMean(Reshape(x)), …, y = Add(Mul(…), …)
It is what an operator is compiled to that nothing here knows a better way for.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from xopt.errors import InputError
from xopt.ir.canonical import opset as conversion
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.schema import STANDARD
from xopt.ir.shapes import LARGEST_CONSTANT, infer_shapes

_DOMAIN = "body"


@functools.cache
def _have_bodies() -> frozenset[str]:
    schemas = (schema for schema in onnx.defs.get_all_schemas() if schema.domain in STANDARD)
    return frozenset(schema.name for schema in schemas if schema.has_function or schema.has_context_dependent_function)


def has_body(node: ir.Node) -> bool:
    """Whether ONNX may define an operator by a function."""
    return node.domain in STANDARD and node.op_type in _have_bodies()


def body(node: ir.Node, opset: int) -> ir.Model | None:
    """A model of the operators that ``node`` stands for; None when ONNX gives it no body.

    Its inputs are the inputs of the node that are given and no small constants, its outputs those of the node that
    have a name, both in order and by the same names; at the canonical opset, shapes inferred.
    """
    if not has_body(node):
        return None
    proto = ir.to_proto(node)
    _write_constants(node, proto)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None
    function = _function(schema, proto, opset, node)
    if function is None or set(node.attributes) - set(schema.attributes) or len(node.inputs) > len(function.input):
        return None  # it carries more than the body tells of
    given = {attribute.name for attribute in proto.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.type:
            proto.attribute.add().CopyFrom(attribute.default_value)
    try:
        return _inlined(node, proto, function, opset)
    except InputError:
        return None


def _write_constants(node: ir.Node, proto: onnx.NodeProto) -> None:
    """Make nodes of the constants that graphs inside a node read: ONNX takes only nodes of them into a body."""
    for attribute in proto.attribute:
        if not attribute.HasField("g"):
            continue
        inside = list(node.attributes[attribute.name].as_graph())
        read = {
            value.name: value.const_value
            for inner in inside
            for value in inner.inputs
            if value is not None and value.producer() is None
        }
        constants = [
            onnx.helper.make_node("Constant", [], [name], value=ir.to_proto(ir.Tensor(array.numpy(), array.dtype)))
            for name, array in read.items()
            if array is not None
        ]
        nodes = [*constants, *attribute.g.node]
        del attribute.g.node[:], attribute.g.initializer[:]
        attribute.g.node.extend(nodes)


def _function(
    schema: onnx.defs.OpSchema, proto: onnx.NodeProto, opset: int, node: ir.Node
) -> onnx.FunctionProto | None:
    """The body for the newest opset up to ``opset`` that there is one for."""
    types = [_type(value) for value in node.inputs]
    dependent = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    plain = [v for v in schema.function_opset_versions if v <= opset]
    if dependent:
        content = schema.get_context_dependent_function_with_opset_version(
            max(dependent), proto.SerializeToString(), types
        )
    elif plain:
        content = schema.get_function_with_opset_version(max(plain))
    else:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(content)
    return function if function.node else None


def _type(value: ir.Value | None) -> bytes:
    type_ = onnx.TypeProto()
    if value is not None and value.dtype is not None:
        type_.tensor_type.elem_type = value.dtype.value
        for dim in value.shape or ():
            added = type_.tensor_type.shape.dim.add()
            if isinstance(dim, int):
                added.dim_value = dim
            elif dim.value:
                added.dim_param = dim.value
    content: bytes = type_.SerializeToString()
    return content


def _inlined(node: ir.Node, call: onnx.NodeProto, function: onnx.FunctionProto, opset: int) -> ir.Model:
    graphs = [attribute for attribute in call.attribute if attribute.HasField("g")]
    for attribute in graphs:  # what is in them is in the body
        call.attribute.remove(attribute)
    call.domain = function.domain = _DOMAIN
    call.op_type = function.name
    made = {*function.input, *(name for inner in function.node for name in inner.output)}
    outputs = [(mine, its) for mine, its in zip(call.output, function.output) if its in made]
    call.output[:], function.output[:] = [mine for mine, _ in outputs], [its for _, its in outputs]
    graph = onnx.GraphProto(name="body", node=[call])
    for value in dict.fromkeys(value for value in node.inputs if value is not None):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= LARGEST_CONSTANT:
            graph.initializer.add().CopyFrom(ir.to_proto(ir.Tensor(tensor.numpy(), tensor.dtype, name=value.name)))
        else:
            graph.input.add(name=value.name).type.ParseFromString(_type(value))
    for value in node.outputs:
        if value.name and value.name in call.output:
            graph.output.add(name=value.name).type.ParseFromString(_type(value))
    told = [given.version for given in function.opset_import if given.domain in ("", "ai.onnx")]
    versions = {"": told[0] if told else opset, _DOMAIN: 1}
    imports = [onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in versions.items()]
    del function.opset_import[:]
    function.opset_import.extend(imports[:1])
    proto = onnx.ModelProto(ir_version=10, graph=graph, functions=[function], opset_import=imports)
    model: ir.Model = ir.from_proto(proto)
    InlinePass()(model)
    infer_shapes(model)
    conversion.rewrite(model, CanonicalizeReport())
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer_shapes(model)
    return model
