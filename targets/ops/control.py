"""If, Loop and Scan: graphs inside nodes run as often as the data say.

A branch, or the body of a loop, is a function of the module (:mod:`xopt.targets.subgraphs`). If is Relax's own; loops
are run by :mod:`xopt.runtime.loops`, which calls the body once for each iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from tvm import ir as tvm_ir
from tvm import relax, tirx

from xopt.errors import InputError
from xopt.ir.edit import attribute, constant
from xopt.runtime.device import CPU
from xopt.targets import subgraphs
from xopt.targets.ops import recurrence
from xopt.targets.ops.bounds import inside
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim, Ints

if TYPE_CHECKING:
    from xopt.targets.emitting import Emitting, Value


# -- If ------------------------------------------------------------------------------------------------------------
def _if(call: Call) -> Value:
    condition = call.input(0)
    then, otherwise = call.attr("then_branch"), call.attr("else_branch")
    if (known := call.known(0)) is not None:
        return _inline(call, then if bool(known.reshape(-1)[0]) else otherwise)
    call.require(call.dims.same(call.dims.product(call.shape(0)), 1), "its condition is not one value")
    before = set(call.dims.variables)
    branches = [subgraphs.function(call.lowering, graph, "branch") for graph in (then, otherwise)]
    shapes = [_common(call, before, *pair) for pair in zip(*(branch.shapes for branch in branches), strict=True)]
    if branches[0].dtypes != branches[1].dtypes:
        raise call.unsupported("its branches give different types")
    test = call.lowering.reshape(call.lowering.tensor(condition), [])
    return call.lowering.typed(call.emit(_choice(call, test, branches)), shapes, branches[0].dtypes)


def _inline(call: Call, graph: ir.Graph) -> list[Value]:
    """The outputs of a graph that certainly runs, as part of the function around it."""
    call.lowering.inline(graph)
    return [call.lowering.value(value) for value in graph.outputs]


def _choice(call: Call, test: relax.Expr, branches: Sequence[subgraphs.Function]) -> relax.Call:
    """A call of the function that asks and calls one of the branches.

    In a dataflow block there is no If; a function may have one.
    """
    arguments = [test, *branches[0].given, *branches[1].given]
    parameters = [relax.Var(f"given_{place}", argument.ty) for place, argument in enumerate(arguments)]
    split = 1 + len(branches[0].given)
    sides = [
        relax.Call(branches[0].variable, parameters[1:split]),
        relax.Call(branches[1].variable, parameters[split:]),
    ]
    builder = relax.BlockBuilder()
    with builder.function("choice", parameters):
        chosen = builder.emit(relax.If(parameters[0], *(_sequence(side) for side in sides)))
        builder.emit_func_output(chosen)
    made = builder.get()["choice"]
    name = f"choice_{len(call.lowering.builder.get().functions)}"
    function = relax.utils.copy_with_new_vars(made).with_attr("global_symbol", name)
    return relax.Call(call.lowering.builder.add_func(function, name), arguments)


def _sequence(value: relax.Expr) -> relax.SeqExpr:
    result = relax.Var("result", value.op.ty.ret)
    return relax.SeqExpr([relax.BindingBlock([relax.VarBinding(result, value)])], result)


def _common(call: Call, before: set[str], one: list[Dim], other: list[Dim]) -> list[Dim]:
    """The shape of what is of one of two shapes: sizes that differ are decided while the model runs."""
    if len(one) != len(other):
        raise call.unsupported(
            f"its branches give results of {len(one)} and {len(other)} dimensions (--dim fixes a size that decides)"
        )
    return [
        a if _visible(a, before) and call.dims.equal(a, b) else call.dims.decided("decided by a branch")
        for a, b in zip(one, other)
    ]


def _visible(dim: Dim, before: set[str]) -> bool:
    """Whether a size is one of the graph around."""
    return isinstance(dim, int) or all(x.name in before for x in tirx.analysis.undefined_vars(dim))


# -- Loop and Scan -------------------------------------------------------------------------------------------------
Body = Callable[["Sequence[relax.Var]", "relax.Var", "relax.Var"], "subgraphs.Function"]


def _loop(call: Call) -> Value:
    graph: ir.Graph = call.attr("body")
    first = [call.x(place) for place in range(2, len(call.node.inputs))]
    if len(graph.inputs) != 2 + len(first) or len(graph.outputs) < 1 + len(first):
        raise call.unsupported("its body takes or gives another number of values than it should")
    if (found := _recurrence(call, graph, first)) is not None:
        return found
    trips = call.x(0) if call.has(0) else relax.const(np.iinfo(np.int64).max, "int64")
    going = call.x(1) if call.has(1) else relax.const(True, "bool")

    def body(own: Sequence[relax.Var], step: relax.Var, still: relax.Var) -> subgraphs.Function:
        inputs = dict(zip(graph.inputs, (step, still, *own)))
        return subgraphs.function(call.lowering, graph, "body", [step, still, *own], lambda inner: inputs)

    return _repeated(call, trips, going, first, body)


def _recurrence(call: Call, graph: ir.Graph, first: list[relax.Expr]) -> list[Value] | None:
    """The results of a loop over all of an axis that is a recurrence with a kernel; None for any other."""
    trips, going, goes_on = call.known(0), call.known(1), graph.outputs[0]
    while (node := goes_on.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        goes_on = node.inputs[0]
    always = constant(goes_on)
    if trips is None or (call.has(1) and (going is None or not going.reshape(-1)[0])):
        return None
    if goes_on is not graph.inputs[1] and (always is None or not always.all()):
        return None
    gathers = [node for node in graph if node.op_type == "Gather" and node.inputs[1] is graph.inputs[0]]
    scanned = {}
    for node in gathers:
        value = node.inputs[0]
        if value is None or (value.producer() is not None and value.producer().graph is graph):  # type: ignore[union-attr]
            return None
        shape = call.lowering.shape(value)
        axis = call.axes([int(attribute(node, "axis", 0) or 0)], len(shape))[0]
        if not call.dims.equal(shape[axis], trips.reshape(-1)[0]):
            return None
        scanned[node.outputs[0]] = recurrence.Scanned(value, axis)
    states = dict(zip(graph.inputs[2:], first))
    outputs = graph.outputs[1:]
    return recurrence.emit(call, graph, states, outputs[: len(first)], outputs[len(first) :], scanned)


def _repeated(call: Call, trips: relax.Expr, going: relax.Expr, first: list[relax.Expr], body: Body) -> list[Value]:
    """The states at the end, and what the iterations gave, stacked.

    Args:
        call: the node.
        trips: int64, one number: how many iterations at most.
        going: bool, one value: whether to begin.
        first: the states at the start.
        body: makes the function that gives whether to go on, the states, and what is stacked.
    """
    if call.lowering.target.device != CPU or call.lowering.target.host() is not None:
        raise call.unsupported("loops run on this machine's CPU only")
    before = set(call.dims.variables)
    shapes = [call.lowering.shape_of(tensor) for tensor in first]
    function, shapes = _settled(call, first, shapes, body)
    count = len(first)
    scans = function.shapes[1 + count :]
    empty = [relax.ShapeExpr([d if _visible(d, before) else 0 for d in shape]) for shape in scans]
    kinds = [relax.TensorType(dtype=d, ndim=len(s)) for s, d in zip(shapes, function.dtypes[1:])]
    kinds += [relax.TensorType(dtype=d, ndim=len(s) + 1) for s, d in zip(scans, function.dtypes[1 + count :])]
    packed = relax.op.call_pure_packed(
        "xopt.loop", tvm_ir.StringImm(function.variable.name_hint), trips, going,
        relax.Tuple(function.given), relax.Tuple(first), relax.Tuple(empty),
        tvm_ir.StringImm(" ".join(function.dtypes[1 + count :])), ty_args=relax.TupleType(kinds),
    )  # fmt: skip
    results = call.lowering.builder.emit(packed)
    steps = [call.dims.decided("iterations")] if scans else []
    ends = [_outer(call, shape, before) for shape in shapes]
    stacked = [[*steps, *_outer(call, shape, before)] for shape in scans]
    return list(call.lowering.typed(results, ends + stacked, function.dtypes[1:]))


def _outer(call: Call, shape: list[Dim], before: set[str]) -> list[Dim]:
    return [dim if _visible(dim, before) else call.dims.decided("decided by a loop") for dim in shape]


def _settled(
    call: Call, first: list[relax.Expr], shapes: list[list[Dim]], body: Body
) -> tuple[subgraphs.Function, list[list[Dim]]]:
    """The body for states of shapes that it keeps: those at the start, but for sizes that it changes."""
    dtypes = [str(tensor.ty.dtype) for tensor in first]
    changing: set[str] = set()
    wide = False
    while True:
        kinds = [relax.TensorType(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
        own = [relax.Var(f"state_{place}", kind) for place, kind in enumerate(kinds)]
        step, still = relax.Var("step", relax.TensorType([], "int64")), relax.Var("still", relax.TensorType([], "bool"))
        try:
            function = body(own, step, still)
        except InputError:
            if wide:
                raise
            wide = True
            shapes = [[_changing(call, changing) for _ in shape] for shape in shapes]
            continue
        if function.dtypes[1 : 1 + len(first)] != dtypes:
            raise call.unsupported("a state changes its type")
        kept = [_kept(call, mine, its, changing) for mine, its in zip(shapes, function.shapes[1:])]
        if all(a is b for mine, its in zip(shapes, kept) for a, b in zip(mine, its)):
            return function, shapes
        shapes = kept


def _kept(call: Call, mine: list[Dim], its: list[Dim], changing: set[str]) -> list[Dim]:
    """The shape of a state, given and left by an iteration, with variables for what is not the same."""
    if len(mine) != len(its):
        raise call.unsupported(f"a state has {len(mine)} dimensions, and {len(its)} after an iteration")
    return [
        a if (isinstance(a, tirx.Var) and a.name in changing) or call.dims.equal(a, b) else _changing(call, changing)
        for a, b in zip(mine, its)
    ]


def _changing(call: Call, known: set[str]) -> tirx.Var:
    """A new variable for a size of a state."""
    variable = call.dims.decided("size of a state")
    known.add(variable.name)
    return variable


def _scan(call: Call) -> Value:
    graph: ir.Graph = call.attr("body")
    count = int(call.attr("num_scan_inputs"))
    given = [call.input(place) for place in range(len(call.node.inputs))]
    scanned, first = given[-count:], [call.lowering.tensor(value) for value in given[:-count]]
    stacked = len(graph.outputs) - len(first)
    if not 0 < count <= len(given) or len(graph.inputs) != len(given) or stacked < 0:
        raise call.unsupported("its body takes or gives another number of values than it should")
    shapes = [call.lowering.shape(value) for value in scanned]
    axes = [call.axes([axis], len(shape))[0] for axis, shape in zip(_list(call, "scan_input_axes", count), shapes)]
    back = _list(call, "scan_input_directions", count)
    length = shapes[0][axes[0]]
    for axis, shape in zip(axes, shapes):
        call.require(call.dims.same(shape[axis], length), "what it goes over has different lengths")

    places = _list(call, "scan_output_axes", stacked), _list(call, "scan_output_directions", stacked)
    seen = {
        value: recurrence.Scanned(source, axis, bool(backward))
        for value, source, axis, backward in zip(graph.inputs[len(first) :], scanned, axes, back)
    }
    states, outputs = dict(zip(graph.inputs, first)), graph.outputs
    found = recurrence.emit(call, graph, states, outputs[: len(first)], outputs[len(first) :], seen)
    if found is not None:
        return found[: len(first)] + [_placed(call, *one, length) for one in zip(found[len(first) :], *places)]

    def body(own: Sequence[relax.Var], step: relax.Var, still: relax.Var) -> subgraphs.Function:
        def inputs(inner: Emitting) -> dict[ir.Value, Any]:
            parts = [_at(inner, *one, step) for one in zip(scanned, axes, back)]
            return dict(zip(graph.inputs, (*own, *parts)))

        return subgraphs.function(
            call.lowering, graph, "body", [step, still, *own], inputs, also=scanned, ahead=[still]
        )

    trips = call.lowering.materialized(Ints(np.asarray(length, dtype=object), "int64"))
    results = _repeated(call, trips, relax.const(True, "bool"), first, body)
    ends = results[: len(first)]
    return ends + [_placed(call, *one, length) for one in zip(results[len(first) :], *places)]


def _list(call: Call, name: str, count: int) -> list[int]:
    """An attribute of one integer each, 0 by default."""
    found = [int(x) for x in call.attr(name) or [0] * count]
    if len(found) != count:
        raise call.unsupported(f"{name} has {len(found)} numbers for {count}")
    return found


def _at(inner: Emitting, value: ir.Value, axis: int, backward: int, step: relax.Var) -> relax.Expr:
    """What an iteration reads of a tensor: all at a place on one of its axes."""
    tensor = inner.tensor(value)
    shape = inner.shape_of(tensor)
    last = shape[axis] - 1

    def element(x: Any, now: Any, *i: Any) -> Any:
        place = inside(now(), shape[axis])
        return x(*i[:axis], last - place if backward else place, *i[axis:])

    return inner.compute("part", shape[:axis] + shape[axis + 1 :], element, tensor, step)


def _placed(call: Call, tensor: relax.Expr, axis: int, backward: int, length: Dim) -> relax.Expr:
    """Stacked results with their first axis where it belongs, and in the order asked for."""
    shape = call.lowering.shape_of(tensor)
    tensor = call.lowering.recast(tensor, [length, *shape[1:]])
    axis = call.axes([axis], len(shape))[0]
    if axis == 0 and not backward:
        return tensor
    target = [*shape[1 : axis + 1], length, *shape[axis + 1 :]]
    return call.lowering.compute(
        "stacked",
        target,
        lambda x, *i: x(length - 1 - i[axis] if backward else i[axis], *i[:axis], *i[axis + 1 :]),
        tensor,
    )


OPS: dict[str, Emitter] = {"If": _if, "Loop": _loop, "Scan": _scan}
"""Emitters by operator type."""
