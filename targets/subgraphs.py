"""Graphs inside nodes (the branches of If, the bodies of Loop and Scan) as functions of the compiled module.

    body(captured ..., weights ..., sizes, own ...) -> (outputs ...)

What a graph reads of the graph around it is handed to the function: tensors, weights, and the symbolic dimensions as
one shape. Sizes and indices of its own are checked inside of it: a branch that is not taken refuses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx
from tvm.tirx.analysis import undefined_vars

from xopt.ir.outlining import captured
from xopt.targets import checks
from xopt.targets.refusals import function_scope
from xopt.targets.symbolic import Dim, Ints

if TYPE_CHECKING:
    from xopt.targets.emitting import Emitting


@dataclass(frozen=True)
class Function:
    """A graph that has become a function.

    Attributes:
        variable: what it is called by.
        given: what it takes before its own parameters, in the terms of the graph around it.
        shapes: of its outputs, in the symbolic dimensions around it and ones of its own.
        dtypes: of its outputs.
    """

    variable: tvm.ir.GlobalVar
    given: list[relax.Expr]
    shapes: list[list[Dim]]
    dtypes: list[str]


class _Inner(relax.BlockBuilder):  # type: ignore[misc]
    """Builds the function ``name``; what else it makes goes to the builder of the module."""

    def __init__(self, outer: relax.BlockBuilder, name: str) -> None:
        super().__init__()
        self._outer = outer
        self._name = name
        self.made: relax.Function | None = None

    def add_func(self, function: Any, name: str) -> tvm.ir.GlobalVar:
        if name != self._name:
            return self._outer.add_func(function, name)
        self.made = function
        return tvm.ir.GlobalVar(name)

    def get(self) -> tvm.IRModule:
        return self._outer.get()


def function(
    lowering: Emitting,
    graph: ir.Graph,
    name: str,
    own: Sequence[relax.Var] = (),
    inputs: Callable[[Emitting], Mapping[ir.Value, Any]] = lambda inner: {},
    *,
    also: Sequence[ir.Value] = (),
    ahead: Sequence[relax.Var] = (),
) -> Function:
    """Lower a graph into a function of its own.

    Args:
        lowering: of the graph around it.
        graph: the graph inside a node.
        name: starts the name of the function.
        own: parameters behind what is given from around.
        inputs: says what the inputs of the graph are; it may emit into the function.
        also: values of the graph around that ``inputs`` reads.
        ahead: parameters that are returned before the outputs of the graph.

    Raises:
        InputError: E-UNSUPPORTED-OP, one of its nodes cannot be compiled.
    """
    given: list[tuple[relax.Expr, relax.Var]] = []
    values: dict[ir.Value, Any] = {}
    for value in dict.fromkeys((*captured(graph), *also)):
        content = lowering.value(value)
        if isinstance(content, (Ints, np.ndarray)):
            values[value] = content
            continue
        tensor = lowering.tensor(value)
        parameter = relax.Var(f"captured_{len(given)}", tensor.ty)
        given.append((tensor, parameter))
        values[value] = parameter
    inner = lowering.inside(_Inner(lowering.builder, name), values)
    with lowering.dims.apart(inner.check_now) as needs:
        results = _built(inner, graph, name, own, inputs, ahead)
    new = _lifted(inner, [parameter for _, parameter in given], own, needs, results)
    added = list(new.params)[len(given) : len(new.params) - len(own)]
    more = [relax.ShapeExpr(list(x.ty.values)) if isinstance(x.ty, relax.ShapeType) else x for x in added]
    around = [*(tensor for tensor, _ in given), *more]
    unique = f"{name}_{len(lowering.builder.get().functions)}"
    fresh = relax.utils.copy_with_new_vars(new).with_attr("global_symbol", unique)
    variable = lowering.builder.add_func(fresh, unique)
    return Function(
        variable, around, [inner.shape_of(result) for result in results], [str(result.ty.dtype) for result in results]
    )


def _built(
    inner: Emitting,
    graph: ir.Graph,
    name: str,
    own: Sequence[relax.Var],
    inputs: Callable[[Emitting], Mapping[ir.Value, Any]],
    ahead: Sequence[relax.Var],
) -> list[relax.Expr]:
    """Emit a graph into the inner builder; what the function returns."""
    with function_scope(inner.builder, name, list(own)):
        with inner.builder.dataflow():
            inner.values.update(inputs(inner))
            inner.walk(graph)
            results = [*ahead, *(inner.tensor(value) for value in graph.outputs)]
            output = inner.builder.emit_output(relax.Tuple(results))
            counts = [(inner.builder.emit_output(count), what) for count, what in inner.outside]
        checks.check_indices(inner.builder, counts, inner.target)
        inner.builder.emit_func_output(output)
    return results


def _lifted(
    inner: Emitting,
    given: Sequence[relax.Var],
    own: Sequence[relax.Var],
    needs: Mapping[str, Sequence[Any]],
    results: Sequence[relax.Expr],
) -> relax.Function:
    """The function with all that it reads as parameters, which checks its sizes before everything else."""
    assert isinstance(inner.builder, _Inner)
    built = inner.builder.made
    assert built is not None
    used = {variable.name: variable for found in needs.values() for one in found for variable in undefined_vars(one)}
    scope = relax.Var("scope", relax.TensorType(list(used.values()), "float32"))
    checked = checks.check_sizes(inner.builder, needs, [scope], inner.target)
    body = relax.SeqExpr([*checked, *built.body.blocks], built.body.body)
    attributes = tvm.ir.make_node("ir.DictAttrs", **{"relax.force_pure": True})
    closed = {*given, *own}
    free = [variable for variable in relax.analysis.free_vars(built) if variable not in closed]
    weights = [variable for variable in free if isinstance(variable.ty, relax.TensorType)]  # sizes are free too
    parameters = [*given, *weights]
    draft = relax.Function([*parameters, *own], body, built.ret_ty, True, attributes)
    if symbols := list(relax.analysis.free_symbolic_vars(draft)):
        parameters.append(relax.Var("sizes", relax.ShapeType(symbols)))
    parameters += own
    return relax.Function(parameters, body, _returned(parameters, results), True, attributes)


def _returned(parameters: Sequence[relax.Var], results: Sequence[relax.Expr]) -> relax.TupleType:
    """The type of what a function returns; sizes that its parameters do not tell are left open."""
    dims = [dim for x in parameters for dim in (x.ty.values if isinstance(x.ty, relax.ShapeType) else x.ty.shape)]
    told = {dim.name for dim in dims if isinstance(dim, tirx.Var)}
    kinds = []
    for result in results:
        shape = list(result.ty.shape)
        known = all({variable.name for variable in undefined_vars(dim)} <= told for dim in shape)
        form = {"shape": shape} if known else {"ndim": len(shape)}
        kinds.append(relax.TensorType(dtype=result.ty.dtype, **form))
    return relax.TupleType(kinds)
