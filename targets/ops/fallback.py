"""The long tail: operators outside our table go through the converter classes of TVM's ONNX importer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from xopt.targets.ops.bounds import check_indices, valid
from xopt.targets.ops.call import Call
from xopt.targets.symbolic import Ints

if TYPE_CHECKING:
    from xopt.targets.lowering import Value

OPSET = 24
"""The opset of canonical models."""


@functools.cache
def _converters() -> dict[str, Any]:
    from tvm.relax.frontend.onnx import onnx_frontend

    return dict(onnx_frontend._get_convert_map())


UNSAFE = frozenset({
    "AllClassNMS", "Compress", "MaxRoiPool", "MaxUnpool", "NonMaxSuppression", "NonZero", "Scatter", "Unique",
})  # fmt: skip
"""Operators whose converters index by what the data says, unchecked, or give results of a size that only it decides."""


def supports(op_type: str) -> bool:
    """Whether TVM has a converter for an operator, and its code stays inside its tensors whatever the data is."""
    return op_type in _converters() and op_type not in UNSAFE


def convert(call: Call) -> list[Value]:
    """Emit a node through TVM's converter.

    Raises:
        InputError: E-UNSUPPORTED-OP, the converter refuses the node.
    """
    from tvm.relax.frontend.onnx import onnx_frontend

    inputs = [None if value is None else _argument(call, value) for value in call.node.inputs]
    if call.node.op_type == "RoiAlign":
        inputs[2] = _batch_indices(call)
    attributes = {name: _plain(attribute) for name, attribute in call.node.attributes.items()}
    attributes["tvm_custom"] = {"num_outputs": len(call.node.outputs)}
    builder = call.lowering.builder
    try:
        converter = _converters()[call.node.op_type].get_converter(OPSET)
        result = converter(builder, onnx_frontend.onnx_input(inputs), attributes, [{}, {}])
        if isinstance(result, relax.Expr):
            result = builder.normalize(result)
    except Exception as error:  # the converters raise whatever their checks run into
        reason = str(error).strip().splitlines()
        raise call.unsupported(reason[-1][:200] if reason else type(error).__name__) from error
    if len(call.node.outputs) == 1 and not isinstance(result, (tuple, list, relax.Tuple)):
        return [call.emit(result)]
    if isinstance(result, relax.Expr):
        bound = call.emit(result)
        return [call.emit(relax.TupleGetItem(bound, index)) for index in range(len(call.node.outputs))]
    return [call.emit(item) for item in result]


def _batch_indices(call: Call) -> relax.Expr:
    """The image of each region of RoiAlign, checked, and inside the batch."""
    batch = call.shape(0)[0]
    check_indices(call, 2, [batch])
    indices = call.x(2)
    clamped = call.lowering.compute("images", call.shape(2), lambda x, i: valid(x(i), batch), indices)
    return call.emit(relax.op.astype(clamped, str(indices.ty.dtype)))


def _argument(call: Call, value: ir.Value) -> relax.Expr:
    """An input as converters expect it: constants visible, known shapes as shape expressions."""
    content = call.lowering.value(value)
    if isinstance(content, np.ndarray):
        return relax.const(content, str(content.dtype))
    if isinstance(content, Ints):
        if content.array.ndim == 1:
            return relax.ShapeExpr(list(content.array))
        return call.lowering.materialized(content)
    return content


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.to_proto(attribute.value)
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value
