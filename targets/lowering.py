"""The canonical graph as a Relax module: one table of operators, one pass over the nodes.

``lower`` walks the graph once. What shapes alone determine is evaluated on the way (:mod:`xopt.targets.symbolic`);
every other node is emitted by the function that the table (:mod:`xopt.targets.ops`) names for it: our kernels by
``call_tir``, Relax operators, or TVM's own ONNX converter for the long tail. Weights are not part of the code: they
are collected, packed for the kernels, and reach ``main`` as one tuple behind the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import tvm
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass
from tvm import relax

from xopt.errors import InputError
from xopt.ir.bodies import body, has_body
from xopt.ir.empties import may_be_empty
from xopt.ir.names import identifier
from xopt.ir.schema import op_of
from xopt.ir.shapes import infer_shapes, symbolic_dims
from xopt.ir.tied import tied_tables
from xopt.runtime.manifest import TensorInfo
from xopt.targets import checks
from xopt.targets.emitting import Emitting, Value, in_memory
from xopt.targets.formats import dequantized, plan_formats
from xopt.targets.integer_attention import parts, stored_formats
from xopt.targets.islands import merge_islands
from xopt.targets.refusals import function_scope, refusing, uncompiled, unsupported
from xopt.targets.segments import segment
from xopt.targets.symbolic import (
    EVALUATED,
    STRUCTURAL,
    Array,
    Dim,
    ImpossibleError,
    UndecidedError,
    evaluate,
    known,
)
from xopt.targets.weights import Weights
from xopt.targets.widening import storage, widen

if TYPE_CHECKING:
    from xopt.targets.base import Target


@dataclass
class Lowered:
    """A model as Relax: ``main(*inputs, weights)``, ``weights`` being the tuple of ``weights`` in order."""

    module: tvm.IRModule
    weights: list[tuple[str, Array]]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    limits: dict[str, int]
    empty: frozenset[str]
    segments: dict[str, str]


@dataclass
class Lowering(Emitting):
    """The walk over a graph, and the Relax function that it makes.

    Attributes:
        apart: names of first outputs of nodes that onnxruntime runs, whatever is there to compile them.
    """

    apart: frozenset[str] = frozenset()

    def walk(self, graph: ir.Graph) -> None:
        """Lower every node of a graph in order."""
        from xopt.targets.ops.call import label
        from xopt.targets.ops.fusion import emit_chain, plan_fusion

        plan = plan_fusion(graph, quantized=self.target.isa() is not None, apart=self.apart)
        layers = {chain.matmul: chain.quantized for chain in plan.values() if chain is not None}
        absorbed: set[ir.Node] = set()
        if self.target.isa() is not None:
            self.attentions = {node: found for node in graph if (found := parts(node)) is not None}
            stored = stored_formats(self.attentions)
            self.wanted, absorbed = plan_formats(graph, layers, self.target.precision, self.attentions, stored)
            if self.target.precision == "fp32":  # rows of a table are read as they are, not rounded like a matrix
                self.tied = tied_tables(graph)
        for node in graph:
            self.node = label(node)
            if node in absorbed or dequantized(node.outputs[0]) is not None:
                continue
            if node in plan:
                if (chain := plan[node]) is not None:
                    self.values[node.outputs[0]] = emit_chain(self, chain)
                continue
            self._lower(node)

    def inline(self, nodes: Iterable[ir.Node]) -> None:
        """Lower nodes one by one."""
        for node in nodes:
            self._lower(node)

    def _lower(self, node: ir.Node) -> None:
        """Lower one node: known results, else what its emitter makes of it, else the function that ONNX defines it by.

        Where the target may fall back, onnxruntime runs what neither is there for.

        Raises:
            InputError: E-UNSUPPORTED-OP, the emitter's.
        """
        results: Sequence[Value] | None = self._evaluated(node)
        if results is None:
            results = self._or_segment(node) if self.target.fallback else self._either(node)
        for output, result in zip(node.outputs, results):
            self.values[output] = result

    def _or_segment(self, node: ir.Node) -> Sequence[Value]:
        """What is compiled of a node, or a call of onnxruntime where nothing is."""
        if node.outputs[0].name in self.apart:
            return segment(
                self, node, unsupported(node, "TVM does not compile what it is in its operators", self.target)
            )
        before = self._noted()
        try:
            return self._either(node)
        except ImpossibleError:
            raise
        except InputError as error:
            self.dims.requirements, self.ranges, self.outside = before
            return segment(self, node, error)

    def _either(self, node: ir.Node) -> Sequence[Value]:
        """What an emitter makes of a node, or what comes of its function body when there is none that takes it."""
        from xopt.targets.ops import emit_node

        if not has_body(node):
            return emit_node(self, node)
        before = self._noted()
        try:
            return emit_node(self, node)
        except ImpossibleError:
            raise
        except InputError as error:
            self.dims.requirements, self.ranges, self.outside = before
            simpler = body(node, self.model.opset_imports[""])
            if simpler is None or any(inner.op_type == "Loop" for inner in simpler.graph):
                raise  # a loop step by step (Range's body) takes what makes no sense, too
            before = self._noted()
            try:
                return self._expanded(node, simpler)
            except InputError:
                self.dims.requirements, self.ranges, self.outside = before
                raise error from None

    def _noted(self) -> tuple[dict[str, list[Any]], dict[ir.Value, tuple[int, int]], list[tuple[relax.Var, str]]]:
        """Copies of what is noted about inputs, which an emitter that gives up has no say in."""
        requirements = {what: list(conditions) for what, conditions in self.dims.requirements.items()}
        return requirements, dict(self.ranges), list(self.outside)

    def _expanded(self, node: ir.Node, simpler: ir.Model) -> list[Value]:
        """The outputs of a node by the nodes of its function body."""
        given = {value.name: value for value in node.inputs if value is not None}
        for value in simpler.graph.inputs:
            self.values[value] = self.value(given[value.name])
        for inner in simpler.graph:
            self._lower(inner)
        results = {value.name: self.value(value) for value in simpler.graph.outputs}
        return [results.get(output.name) for output in node.outputs]

    def _evaluated(self, node: ir.Node) -> list[Value] | None:
        """The outputs of a node that shapes alone determine, or None."""
        dtype = node.outputs[0].dtype.numpy().name if node.outputs[0].dtype is not None else "int64"
        if op_of(node) in ("Shape", "Size"):
            return [known(self._shape_tensor(node), "int64")]
        if op_of(node) not in EVALUATED or not node.inputs:
            return None
        inputs = [self.known(value) for value in node.inputs]
        if any(known_ is None and value is not None for known_, value in zip(inputs, node.inputs)):
            return None
        if node.op_type not in STRUCTURAL and _is_fraction(node, inputs):
            return None
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        try:
            return [known(evaluate(node.op_type, inputs, attributes, self.dims), dtype)]
        except (UndecidedError, ArithmeticError, LookupError, TypeError, ValueError):
            return None  # the emitter computes it, or says what is wrong with it

    def _shape_tensor(self, node: ir.Node) -> Array:
        value = node.inputs[0]
        assert value is not None
        shape = self.shape(value)
        if node.op_type == "Size":
            return np.asarray(self.dims.product(shape), dtype=object)
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(shape))
        part = np.empty(len(shape[start:end]), dtype=object)
        part[:] = shape[start:end]
        return part

    # -- the function ----------------------------------------------------------------------------------------------
    def parameter(self, position: int, value: ir.Value) -> relax.Var:
        """The parameter of ``main`` for the graph input at ``position``."""
        if value.shape is None or value.dtype is None:
            raise InputError("E-FORMAT", "the input has no type or no rank", where=f"input {value.name}")
        shape = [self._dimension(value, axis, dim) for axis, dim in enumerate(value.shape)]
        name = identifier("input", position, value.name)
        return relax.Var(name, relax.TensorType(shape, storage(value.dtype)))

    def _dimension(self, value: ir.Value, axis: int, dim: int | ir.SymbolicDim) -> Dim:
        if isinstance(dim, int):
            return dim
        return self.dims.variable(dim.value) if dim.value else self.dims.unnamed(f"{value.name}_{axis}")

    def describe(self, value: ir.Value, tensor: relax.Expr) -> TensorInfo:
        """An input or output for the manifest."""
        shape = tuple(self.dims.readable(dim) for dim in self.shape_of(tensor))
        dtype = str(tensor.ty.dtype) if value.dtype is None else value.dtype.numpy().name
        return TensorInfo(value.name or "", dtype, shape, self.ranges.get(value))

    def finish(self, parameters: list[relax.Var]) -> tvm.IRModule:
        """The module; before everything else the sizes are checked and the weights bound from their tuple."""
        function = self.builder.get()["main"]
        checked = checks.check_sizes(self.builder, self.dims.requirements, parameters[:-1], self.target)
        blocks = [*checked, self.weights.bindings(parameters[-1]), *function.body.blocks]
        body = relax.SeqExpr(blocks, function.body.body)
        module = self.builder.get()
        pure = not checked and not self.outside
        module["main"] = relax.Function(function.params, body, function.ret_ty, pure, function.attrs)
        return module


def _is_fraction(node: ir.Node, inputs: Sequence[Array | None]) -> bool:
    """Whether floats are computed from sizes that are not known now: expressions in dimensions are integers."""
    floating = any(
        value is not None and value.dtype is not None and value.dtype.is_floating_point() for value in node.inputs
    )
    return floating and any(isinstance(x, tvm.ir.Expr) for array in inputs if array is not None for x in array.flat)


def lower(
    model: ir.Model,
    target: Target,
    store: Callable[[str, Array], Array] = in_memory,
    apart: frozenset[str] = frozenset(),
) -> Lowered:
    """Turn a canonical model into Relax.

    Args:
        model: canonical form; not changed.
        target: decides which kernels are used, and their precision.
        store: is given every weight by name, as soon as it is packed, and returns where it lies from then on.
        apart: nodes that run in onnxruntime, by the names of their first outputs; for a target that may fall back.

    Raises:
        InputError: E-UNSUPPORTED-OP names the node that cannot be compiled.
    """
    with refusing(uncompiled):
        lowering = Lowering(target, _prepared(model, target), weights=Weights(store), apart=apart)
    with refusing(lambda reason: uncompiled(reason, lowering.node)):
        return _lowered(lowering)


def _prepared(model: ir.Model, target: Target) -> ir.Model:
    """A copy in which functions without a kernel are their bodies, constants initializers, and no type is narrow."""
    from xopt.targets.ops import has_kernel

    model = model.clone()
    if InlinePass(criteria=lambda f: not has_kernel(target, f.domain, f.name))(model).modified:
        infer_shapes(model)  # the types of what the bodies compute
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    merge_islands(model)
    widen(model)
    return model


def _lowered(lowering: Lowering) -> Lowered:
    model = lowering.model
    lowering.dims.empty = may_be_empty(model)
    for name in symbolic_dims(model):  # before the dimensions that have none are called something
        lowering.dims.variable(name)
    parameters = [lowering.parameter(position, value) for position, value in enumerate(model.graph.inputs)]
    bundle = relax.Var("weights", relax.ObjectType())
    with function_scope(lowering.builder, "main", [*parameters, bundle]):
        with lowering.builder.dataflow():
            lowering.values.update(zip(model.graph.inputs, parameters))
            lowering.walk(model.graph)
            results = [lowering.tensor(value) for value in model.graph.outputs]
            output = lowering.builder.emit_output(relax.Tuple(results))
            counts = [(lowering.builder.emit_output(count), what) for count, what in lowering.outside]
        checks.check_indices(lowering.builder, counts, lowering.target)
        lowering.builder.emit_func_output(output)
    return Lowered(
        lowering.finish([*parameters, bundle]),
        lowering.weights.entries,
        tuple(lowering.describe(value, parameter) for value, parameter in zip(model.graph.inputs, parameters)),
        tuple(lowering.describe(value, result) for value, result in zip(model.graph.outputs, results)),
        lowering.dims.limits,
        lowering.dims.empty,
        lowering.segments,
    )
