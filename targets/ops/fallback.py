"""The long tail: operators outside our table go through the converter classes of TVM's ONNX importer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from xopt.targets.ops.bounds import check_indices, valid
from xopt.targets.ops.call import Call
from xopt.targets.symbolic import Ints

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

OPSET = 24
"""The opset of canonical models."""


@functools.cache
def _converters() -> dict[str, Any]:
    from tvm.relax.frontend.onnx import onnx_frontend

    return dict(onnx_frontend._get_convert_map())


UNSAFE = frozenset({
    "AllClassNMS", "MaxRoiPool", "Scatter",
})  # fmt: skip
"""Operators whose converters index by what the data says, unchecked, or give results of a size that only it decides."""


def supports(op_type: str) -> bool:
    """Whether TVM has a converter for an operator, and its code stays inside its tensors whatever the data is."""
    return op_type in _converters() and op_type not in UNSAFE


ELEMENTWISE = frozenset(("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "PRelu"))
"""Operators whose operands are broadcast: to converters they are given in one shape."""
FITTING = {
    "BatchNormalization": [((0, 1), (place, 0)) for place in range(1, 5)],
    "ConvTranspose": [((0, 1), (1, 0))],
    "GridSample": [((0, 0), (1, 0))],
    "InstanceNormalization": [((0, 1), (place, 0)) for place in range(1, 3)],
    "MatMulInteger": [((0, -1), (1, -2))],
    "RoiAlign": [((1, 0), (2, 0))],
}
"""(input, axis) twice, that are of one size: converters take it for granted."""

STRINGS = {
    ("GridSample", "mode"): ("linear", "bilinear", "nearest", "cubic", "bicubic"),
    ("GridSample", "padding_mode"): ("zeros", "border", "reflection"),
    ("RoiAlign", "mode"): ("avg",),  # the converter's maximum is of other points than ONNX's
}
"""What attributes may say, of which converters pass on whatever they are given."""


def convert(call: Call) -> list[Value]:
    """Emit a node through TVM's converter.

    Raises:
        InputError: E-UNSUPPORTED-OP, the converter refuses the node.
    """
    inputs = [None if value is None else _argument(call, value) for value in call.node.inputs]
    for (op, name), known in STRINGS.items():
        if call.node.op_type == op and call.attr(name, known[0]) not in known:
            raise call.unsupported(f"there is no {name} {call.attr(name)!r}")
    checked = replace(call, read=set())  # what is looked at here is not read by the converter
    _require_fitting(checked)
    if call.node.op_type in ELEMENTWISE:
        inputs = _broadcast(checked)
    if call.node.op_type == "RoiAlign":
        inputs[2] = _batch_indices(checked)
    given = {name: _plain(attribute) for name, attribute in call.node.attributes.items()}
    attributes = _Attributes(call, {**given, "tvm_custom": {"num_outputs": len(call.node.outputs)}})
    builder = call.lowering.builder
    converter = _converters()[call.node.op_type].get_converter(OPSET)
    result = converter(builder, _Inputs(call, inputs), attributes, [{}, {}])
    if isinstance(result, relax.Expr):
        result = builder.normalize(result)
    if isinstance(result, relax.Expr):
        _require_outputs(call, result)
    if len(call.node.outputs) == 1 and not isinstance(result, (tuple, list, relax.Tuple)):
        return [call.emit(result)]
    if isinstance(result, relax.Expr):
        bound = call.emit(result)
        return [call.emit(relax.TupleGetItem(bound, index)) for index in range(len(call.node.outputs))]
    return [call.emit(item) for item in result]


class _Attributes(dict[str, Any]):
    """Attributes that note which of them a converter asks for."""

    def __init__(self, call: Call, attributes: dict[str, Any]) -> None:
        super().__init__(attributes)
        self._read = call.read

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._read.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Attribute ``name``, if it is given."""
        self._read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        """Attribute ``name``, which is none afterwards."""
        self._read.add(name)
        return super().pop(name, *default)


class _Inputs(list[Any]):
    """Inputs that note which of them a converter asks for; None beyond the last, as converters expect it."""

    def __init__(self, call: Call, inputs: list[relax.Expr | None]) -> None:
        super().__init__(inputs)
        self._read = call.read

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        self._read.add(place)
        return super().__getitem__(place) if place < len(self) else None

    def __iter__(self) -> Any:
        return (self[place] for place in range(len(self)))


def _require_outputs(call: Call, result: relax.Expr) -> None:
    if len(call.node.outputs) > 1 and not isinstance(result.ty, relax.TupleType):
        raise call.unsupported("only its first output is compiled")


def _require_fitting(call: Call) -> None:
    """Demand the sizes that a converter takes for granted; where that is not known, sizes must not be dynamic."""
    op = call.node.op_type
    for (a, axis), (b, other) in FITTING.get(op, ()):
        call.require(call.dims.same(call.shape(a)[axis], call.shape(b)[other]), f"inputs {a} and {b} do not fit")
    if op in FITTING or op in ELEMENTWISE:
        return
    tensors = [
        call.shape(place) for place in range(len(call.node.inputs)) if call.has(place) and call.const(place) is None
    ]
    if len(tensors) > 1 and not all(isinstance(dim, int) for shape in tensors for dim in shape):
        raise call.unsupported("several inputs with dynamic dimensions")


def _broadcast(call: Call) -> list[relax.Expr]:
    operands = call.aligned(*call.xs())
    shape = call.dims.broadcast(*[call.lowering.shape_of(operand) for operand in operands])
    return [call.emit(relax.op.broadcast_to(operand, shape)) for operand in operands]


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
    if attribute.type == ir.AttributeType.STRING:
        return attribute.value.encode()  # as protobuf has it
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value
