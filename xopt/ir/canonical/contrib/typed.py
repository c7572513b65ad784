"""What is known of values while operators are written: dimensions, small integers, and element types."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from xopt.ir.symbolic import Symbols


class Typed(Symbols):
    """Symbols that also give a type to what nodes compute."""

    def visit(self, node: ir.Node) -> None:
        """Learn the outputs of a node whose inputs are known."""
        super().visit(node)
        if node.domain:
            return
        for place, value in enumerate(node.outputs):
            dtype = _dtype(node, place) if value.dtype is None else None
            if dtype is not None:
                value.type = ir.TensorType(dtype)


def _dtype(node: ir.Node, place: int) -> ir.DataType | None:
    """Element type of an output, as the operator's schema relates it to the inputs and attributes."""
    if node.op_type in ("Cast", "BitCast") and "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int())
    constraint, allowed = _output_type(node.op_type, place)
    for given, value in zip(_input_types(node.op_type, len(node.inputs)), node.inputs):
        if given == constraint and value is not None:
            return value.dtype
    return _TYPES.get(allowed[0]) if len(allowed) == 1 else None


_TYPES = {f"tensor({str(dtype).lower()})": dtype for dtype in ir.DataType}


@functools.cache
def _output_type(op_type: str, place: int) -> tuple[str, tuple[str, ...]]:
    """The name of an output's type, and the types that it may be."""
    if not onnx.defs.has(op_type):
        return "", ()
    schema = onnx.defs.get_schema(op_type)
    kind = schema.outputs[min(place, len(schema.outputs) - 1)].type_str
    constraints = {one.type_param_str: tuple(one.allowed_type_strs) for one in schema.type_constraints}
    return kind, constraints.get(kind, (kind,))


@functools.cache
def _input_types(op_type: str, count: int) -> tuple[str, ...]:
    if not onnx.defs.has(op_type):
        return ()
    names = [given.type_str for given in onnx.defs.get_schema(op_type).inputs]
    return tuple(names[min(place, len(names) - 1)] for place in range(count)) if names else ()
