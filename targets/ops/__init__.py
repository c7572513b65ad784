"""The table: which function emits which operator.

One row per (domain, operator type). Rows of :data:`KERNELS` emit our own kernels and stand aside (return None) where
the target has no templates or the workload does not fit; rows of :data:`OPERATORS` emit Relax operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir
from tvm import relax

from xopt.targets.ops import (
    attention,
    control,
    convolution,
    detection,
    elementwise,
    fallback,
    indexing,
    layout,
    linear,
    narrow,
    norm,
    packing,
    parameters,
    pooling,
    quantization,
    ranges,
    recurrent,
    reduction,
    resize,
    selection,
    spectrum,
    templates,
)
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.refusals import refusing
from xopt.targets.symbolic import Dim
from xopt.targets.widening import storage

if TYPE_CHECKING:
    from xopt.targets.base import Target
    from xopt.targets.emitting import Emitting, Value

OPERATORS: dict[tuple[str, str], Emitter] = {
    ("", name): emitter
    for table in (
        elementwise,
        layout,
        indexing,
        reduction,
        linear,
        norm,
        attention,
        pooling,
        quantization,
        ranges,
        recurrent,
        resize,
        selection,
        spectrum,
        control,
        convolution,
        detection,
    )
    for name, emitter in table.OPS.items()
} | narrow.OPS
"""Emitters of Relax operators by (domain, operator type)."""

KERNELS: dict[tuple[str, str], Callable[[Call], Value | None]] = templates.KERNELS | packing.KERNELS
"""Emitters of our kernels by (domain, operator type); None from one means: use the Relax operators."""


def has_kernel(target: Target, domain: str, name: str) -> bool:
    """Whether an xopt function has a kernel of its own on a target, so that its body is not inlined."""
    return (domain, name) in KERNELS and target.isa() is not None


def emit_node(lowering: Emitting, node: ir.Node) -> Sequence[Value]:
    """Emit one node and return its outputs.

    Raises:
        InputError: E-UNSUPPORTED-OP names the node and what is not supported about it.
    """
    call = Call(lowering, node)
    with refusing(call.unsupported):
        results = _emitted(call)
        for place, output in enumerate(node.outputs):
            if place < len(results):
                _check(call, output, results[place])
            elif output.uses() or output.is_graph_output():
                raise call.unsupported(f"output {place} is not compiled")
    return results


FILLING = frozenset(("Concat", "ConstantOfShape", "Pad", "Reshape", "Split", *reduction.REDUCTIONS))
"""Operators that make elements of none, or see to it that there are none. What else reduces over none has a result
that kernels never write."""


def _check(call: Call, output: ir.Value, result: Value) -> None:
    """A result is of the type and the sizes that ONNX says, and a reduction has something to reduce."""
    if not isinstance(result, relax.Expr) or not isinstance(result.ty, relax.TensorType):
        return
    wanted = None if output.dtype is None else storage(output.dtype)
    if wanted is not None and str(result.ty.dtype) != wanted:
        raise call.unsupported(f"its result would be {result.ty.dtype}, not {wanted}")
    shape = call.lowering.shape_of(result)
    told = list(output.shape) if output.shape is not None else shape
    both = [(mine, its) for mine, its in zip(shape, told) if isinstance(mine, int) and isinstance(its, int)]
    if len(shape) != len(told) or any(mine != its for mine, its in both):
        raise call.unsupported(f"its result would be {[call.dims.readable(dim) for dim in shape]}, not {output.shape}")
    given = call.input(0).shape if call.has(0) else None  # kernels may read another value in its place
    if call.node.op_type not in FILLING and _is_empty(given or ()) and not _is_empty(shape):
        raise call.unsupported("it computes something of no elements")


def _is_empty(shape: Iterable[Dim]) -> bool:
    return any(isinstance(dim, int) and dim == 0 for dim in shape)


def _emitted(call: Call) -> Sequence[Value]:
    node = call.node
    key = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
    at_run_time = parameters.emitter(call) if key[0] == "" else None
    for emitter in (KERNELS.get(key), at_run_time or OPERATORS.get(key)):
        attempt = replace(call, read=set())
        if emitter is not None and (result := emitter(attempt)) is not None:
            attempt.require_read()
            return result if isinstance(result, list) else [result]
    if key[0] == "" and fallback.supports(node.op_type):
        results = fallback.convert(call)
        call.require_read()
        return results
    raise call.unsupported(BEYOND.get(node.op_type) or f"there is no operator {':'.join(filter(None, key))}")


_BEYOND = {
    "it draws random numbers": "Bernoulli RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial",
    "it decodes images": "ImageDecoder",
    "it works on texts": "StringNormalizer TfIdfVectorizer StringConcat StringSplit RegexFullMatch",
    "it works on sequences": "SequenceConstruct SequenceEmpty SequenceAt SequenceInsert SequenceLength SequenceErase "
    "SequenceMap SplitToSequence ConcatFromSequence Optional OptionalHasElement OptionalGetElement",
}
BEYOND = {name: word for word, names in _BEYOND.items() for name in names.split()}
"""What a compiled model does not do, by the operator that would."""
