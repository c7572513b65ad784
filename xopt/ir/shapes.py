"""Shapes: fresh symbolic inference, and symbolic dimensions bound to numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir.bounds import check_rank
from xopt.ir.symbolic import name_dims
from xopt.ir.untrusted import NATIVE_MEMORY, bounded_memory

LARGEST_CONSTANT = 1024
"""Bytes up to which a constant may matter to shapes; weights are larger."""


def infer_shapes(model: ir.Model, *, names: bool = True) -> None:
    """Infer the shape and type of every value anew, in place.

    What the exporter wrote about intermediate values is forgotten first: passes make it wrong, and other tools trip
    over it. Inputs keep their shapes and the names of their symbolic dimensions; outputs keep a declared name where
    inference finds none. Runs on a copy without weights, so it works beyond 2 GB.

    Args:
        names: also name the dimensions that ONNX's inference leaves open.

    Raises:
        InputError: ``E-FORMAT``, the graph contradicts itself (shapes or types that cannot be).
    """
    declared = {value: value.shape for value in model.graph.outputs}
    clear_inferred(model)
    try:
        with bounded_memory():
            proto = _infer(without_weights(model))
    except Exception as error:
        for value, shape in declared.items():
            value.shape = shape
        raise _unfit(error) from error
    _merge(model, ir.from_proto(proto))
    if names:
        name_dims(model.graph)
    for value, shape in declared.items():
        value.shape = _named(value.shape, shape)


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """``model`` as a small protobuf for ONNX's native code: every large initializer is an input there."""
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes > LARGEST_CONSTANT:
            copy.graph.initializers.pop(name)
            value.const_value = None
            if not value.is_graph_input():
                copy.graph.inputs.append(value)
    copy.ir_version = max(copy.ir_version, 10)
    for node in copy.graph.all_nodes():
        if node.op_type == "MeanVarianceNormalization" and not node.domain and "axes" not in node.attributes:
            node.attributes["axes"] = ir.AttrInt64s("axes", [0, 2, 3])  # inference asks for what has a default
        if node.op_type == "STFT" and not node.domain and "onesided" not in node.attributes:
            node.attributes["onesided"] = ir.AttrInt64("onesided", 1)  # inference takes another default
        if node.op_type == "Range" and not node.domain:
            _take_scalars(node)
    return ir.to_proto(copy)


def _take_scalars(node: ir.Node) -> None:
    """Let a Range read computed operands as scalars: inference refuses vectors of one number, runtimes do not."""
    for place, value in enumerate(node.inputs):
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type != "Constant":
            shape = ir.node("Constant", [], {"value_ints": ir.AttrInt64s("value_ints", [])})
            scalar = ir.node("Reshape", [value, shape.outputs[0]])
            for made in (shape, scalar):
                made.outputs[0].name = f"{node.outputs[0].name}/{place}/{made.op_type}"
            node.prepend([shape, scalar])
            node.replace_input_with(place, scalar.outputs[0])


def clear_inferred(model: ir.Model) -> None:
    """Forget the shapes and types of all values that nodes compute (types of graph outputs stay)."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
            if not value.is_graph_output():
                value.type = None


def bind_dims(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """New model whose symbolic input dimensions named in ``dims`` are fixed; weights are shared.

    Raises:
        InputError: ``E-OPTION`` for a name that no input has, or a size below 1.
    """
    known = symbolic_dims(model)
    for name, size in dims.items():
        if name not in known:
            raise InputError(
                "E-OPTION", f"no input has a dimension {name!r}", cure=f"one of: {', '.join(known) or 'none'}"
            )
        if size < 1:
            raise InputError("E-OPTION", f"dimension {name!r} cannot be {size}", cure="give a size of at least 1")
    bound = model.clone()
    for value in [*bound.graph.inputs, *bound.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dims.get(d.value or "", d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            )
    infer_shapes(bound)
    return bound


def symbolic_dims(model: ir.Model) -> list[str]:
    """Names of the symbolic dimensions of the inputs, in the order of their first appearance."""
    names: dict[str, None] = {}
    for value in model.graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names[dim.value] = None
    return list(names)


def equal_by_count(a: Iterable[int | ir.SymbolicDim], b: Iterable[int | ir.SymbolicDim]) -> bool:
    """Whether dimensions with the same product must be the same: as many, and all but one known to be equal."""
    left, right = list(a), list(b)
    if len(left) != len(right):
        return False
    return sum(x != y or not (isinstance(x, int) or x.value) for x, y in zip(left, right)) <= 1


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return _inferred(proto)
    except Exception as error:
        if "Integer overflow" in str(error):
            return _inferred(proto, data_prop=False)  # integers of a graph wrap around; ONNX does not calculate those
        if "(op_type:If" in str(error):
            return _inferred(proto, strict=False)  # a branch that is never taken need not fit
        raise


def _inferred(proto: onnx.ModelProto, *, data_prop: bool = True, strict: bool = True) -> onnx.ModelProto:
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=strict, data_prop=data_prop
    )
    return inferred


def _merge(model: ir.Model, inferred: ir.Model) -> None:
    """Copy shapes and types of computed values, matched by name, graph by graph."""
    for graph, source in zip(model.graphs(), inferred.graphs(), strict=True):
        found = {value.name: value for node in source for value in node.outputs}
        for node in graph:
            for value in node.outputs:
                other = found.get(value.name)
                if other is not None:
                    check_rank(len(other.shape or ()), f"node {node.name!r}")
                    value.shape, value.type = other.shape, other.type or value.type


def _named(shape: ir.Shape | None, declared: ir.Shape | None) -> ir.Shape | None:
    """``shape``, with the names of ``declared`` for dimensions that inference could only number."""
    if shape is None or declared is None or len(shape) != len(declared):
        return shape if shape is not None else declared
    return ir.Shape([old if _anonymous(new) else new for new, old in zip(shape, declared)])


def _anonymous(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and (dim.value is None or dim.value.startswith("unk__"))


def _unfit(error: Exception) -> InputError:
    if isinstance(error, MemoryError) or "bad_alloc" in str(error):
        what = f"its shapes ask for more than {NATIVE_MEMORY >> 30} GiB to be inferred"
    else:
        what = f"shapes do not fit together: {_brief(error)}"
    return InputError("E-FORMAT", what, cure="check how the model was exported")


def _brief(error: Exception) -> str:
    """First telling line of a native error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
