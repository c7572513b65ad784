"""Shape arithmetic out of the graph: targets of Reshape and the like written as constants where they can be.

    Reshape(x, Concat(Gather(Shape(y), 0), Gather(Shape(y), 1), 12, 32))     ->   Reshape(x, [0, 0, 12, 32])
    Range(0, Gather(Shape(y), 1), 1)                                         ->   Range(0, Shape(input_ids)[1], 1)
A number that is known becomes a constant, a dimension of the model's inputs is read off that input, and an axis that
a Reshape keeps is written 0 (as it is). What remains in the graph after this computes data, not shapes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import (
    attribute,
    constant,
    initializer,
    insert,
    is_op,
    names_remembered,
    remove_dead,
    replace_uses,
    unique_name,
)
from xopt.ir.poly import ONE, Poly
from xopt.ir.shape_rules import Dims, Numbers
from xopt.ir.symbolic import Symbols


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Simplify targets first, then whatever numbers are still computed."""
    symbols = Symbols(model.graph)
    nodes = list(model.graph)
    sources = _sources(model.graph)
    known: dict[object, ir.Value] = {}
    with names_remembered():
        for node in nodes:
            if is_op(node, "Reshape", "Expand"):
                report.rewrote("constant-target", _constant_target(symbols, node))
        for node in nodes:
            for value in node.outputs:
                if value.uses() and not value.is_graph_output() and not _is_read_off(node):
                    report.rewrote("constant-number", _simplified(symbols, node, value, sources, known))
    remove_dead(model)


def _constant_target(symbols: Symbols, node: ir.Node) -> bool:
    """Write the target of a Reshape or Expand as a constant."""
    source, target, result = node.inputs[0], node.inputs[1], symbols.dims(node.outputs[0])
    dims = symbols.dims(source)
    if dims is None or result is None or target is None or constant(target) is not None:
        return False
    numbers = _reshape_target(dims, result) if node.op_type == "Reshape" else _expand_target(dims, result)
    if numbers is None or not isinstance(node.graph, ir.Graph):
        return False
    node.replace_input_with(1, initializer(node.graph, f"{target.name}/constant", np.asarray(numbers, np.int64)))
    if attribute(node, "allowzero", 0):
        node.attributes.pop("allowzero")
    return True


def _reshape_target(dims: Dims, result: Dims) -> list[int] | None:
    """0 for an axis that stays, -1 for at most one other symbolic size."""
    target = []
    for place, size in enumerate(result):
        number = size.constant
        stays = place < len(dims) and dims[place] == size
        target.append(number if number is not None else 0 if stays else -1)
    return target if target.count(-1) <= 1 and not any(size.constant == 0 for size in result) else None


def _expand_target(dims: Dims, result: Dims) -> list[int] | None:
    """1 for an axis that has its size already."""
    padded = (ONE,) * (len(result) - len(dims)) + dims
    sizes = [1 if have == want else want.constant for have, want in zip(padded, result)]
    return None if None in sizes else sizes  # type: ignore[return-value]


def _sources(graph: ir.Graph) -> dict[Poly, tuple[ir.Value, int]]:
    """Where to read each symbolic dimension of the inputs off."""
    found: dict[Poly, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for place, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                found.setdefault(Poly.axis(dim.value), (value, place))
    return found


def _is_read_off(node: ir.Node) -> bool:
    """A node that this step (or an exporter) wrote to read one dimension of an input, and its Squeeze."""
    if is_op(node, "Squeeze") and node.inputs[0] is not None and node.inputs[0].producer() is not None:
        return _is_read_off(node.inputs[0].producer())  # type: ignore[arg-type]
    source = node.inputs[0] if is_op(node, "Shape") else None
    return source is not None and source.is_graph_input() and "end" in node.attributes


def _simplified(
    symbols: Symbols,
    node: ir.Node,
    value: ir.Value,
    sources: dict[Poly, tuple[ir.Value, int]],
    known: dict[object, ir.Value],
) -> bool:
    """Replace a computed number (or vector of numbers) by a constant or by a dimension read off an input."""
    numbers, rank = symbols.numbers(value), symbols.rank(value)
    dtype = value.dtype
    if numbers is None or rank is None or rank > 1 or dtype is None or not isinstance(node.graph, ir.Graph):
        return False
    if rank == 0 and len(numbers) != 1:  # a reshape that cannot be
        return False
    if all(number.constant is not None for number in numbers):
        plain = [number.constant for number in numbers]
        array = np.asarray(plain if rank == 1 else plain[0], dtype.numpy())
        replace_uses(value, initializer(node.graph, f"{value.name}/constant", array))
        return True
    if len(numbers) != 1 or numbers[0] not in sources or dtype != ir.DataType.INT64:
        return False
    replace_uses(value, _read_off(node, numbers, rank, sources, known))
    return True


def _read_off(
    site: ir.Node, numbers: Numbers, rank: int, sources: dict[Poly, tuple[ir.Value, int]], known: dict[object, ir.Value]
) -> ir.Value:
    """The dimension as a vector of one element or as a scalar; every place in the graph shares it."""
    source, place = sources[numbers[0]]
    graph = site.graph
    assert isinstance(graph, ir.Graph)
    first = next(iter(graph))
    if (place, source, 1) not in known:
        known[place, source, 1] = insert(
            first, "Shape", [source], {"start": place, "end": place + 1}, dtype=ir.DataType.INT64, shape=[1],
            name=f"{source.name}/size{place}",
        )  # fmt: skip
    if rank == 0 and (place, source, 0) not in known:
        vector = known[place, source, 1]
        squeeze = ir.node("Squeeze", [vector])
        graph.insert_after(vector.producer(), squeeze)  # type: ignore[arg-type]
        squeeze.outputs[0].name = unique_name(graph, f"{vector.name}/scalar")
        squeeze.outputs[0].type, squeeze.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
        known[place, source, 0] = squeeze.outputs[0]
    return known[place, source, rank]
