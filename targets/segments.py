"""Nodes that nothing here computes, run by onnxruntime in the middle of the compiled model's run.

    y = SomeOp(x, constant)   ->   y = xopt.segment("segment 0", (x,))

Only where the caller asks for it (``Target.fallback``), so that no model is lost to one operator. The node is an ONNX
model of its own, its constants inside; the model lies among the weights, and the manifest names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import ir as tvm_ir
from tvm import relax

from xopt.errors import InputError
from xopt.ir import io
from xopt.ir.exporting import export
from xopt.ir.outlining import alone, reads
from xopt.runtime.segments import opened
from xopt.targets.ops.call import label
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Emitting


def segment(lowering: Emitting, node: ir.Node, error: InputError) -> list[Any]:
    """The outputs of a node, computed by onnxruntime.

    Args:
        lowering: of the graph that the node is in.
        node: any node of tensors.
        error: why it is not compiled.

    Raises:
        InputError: ``error``, where onnxruntime cannot run it either, or not beside code for this target.
    """
    target, model = lowering.target, lowering.model
    wanted = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if not target.runs_segments or not all(is_tensor(value) for value in wanted):
        raise error
    given: dict[ir.Value, relax.Expr] = {}
    constants: dict[ir.Value, np.ndarray[Any, Any]] = {}
    for value in reads(node):
        content = lowering.value(value)
        if isinstance(content, np.ndarray):
            constants[value] = content
        else:
            given[value] = lowering.tensor(value)
    made = export(alone(node, list(given), constants, model))
    if io.weight_bytes(made) > io.EMBEDDED_WEIGHTS:
        raise error
    content = io.to_bytes(made)
    try:
        opened(content, threads=1)
    except InputError:
        raise error from None
    name = f"segment {len(lowering.segments)}"
    lowering.segments[name] = label(node)
    lowering.weights.variable(name, name, lambda: np.frombuffer(content, np.uint8))
    return _called(lowering, name, node, list(given.values()), wanted)


def is_tensor(value: ir.Value) -> bool:
    """Whether compiled code can take a value: numbers, of known type and rank."""
    return isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING and value.shape is not None


def _called(
    lowering: Emitting, name: str, node: ir.Node, given: list[relax.Expr], wanted: list[ir.Value]
) -> list[relax.Expr | None]:
    shapes = [[_size(lowering, dim) for dim in value.shape or ()] for value in wanted]
    dtypes = [value.dtype.numpy().name for value in wanted if value.dtype is not None]
    packed = relax.op.call_pure_packed(
        "xopt.segment",
        tvm_ir.StringImm(name),
        tvm_ir.StringImm(label(node)),
        relax.Tuple(given),
        ty_args=relax.TupleType([relax.TensorType(dtype=d, ndim=len(s)) for s, d in zip(shapes, dtypes)]),
    )
    typed = dict(zip(wanted, lowering.typed(lowering.emit(packed), shapes, dtypes), strict=True))
    return [typed.get(value) for value in node.outputs]


def _size(lowering: Emitting, dim: int | ir.SymbolicDim) -> Dim:
    """A size of a result: a number, one of the model's own dimensions, or what the run decides."""
    if isinstance(dim, int):
        return dim
    known = lowering.dims.named(dim.value) if dim.value else None
    return lowering.dims.decided("decided by a segment") if known is None else known
