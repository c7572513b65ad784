"""The few graph edits that passes and canonical rewrites share.

All of them work on ``onnx_ir`` objects directly; none of them keeps state, except that a sweep looks for the names of a
graph once. A *site* is the node before which something
new is put: new nodes are inserted right before it, so that a graph that was sorted stays sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from xopt.errors import InternalError
from xopt.ir.schema import unread

Array = npt.NDArray[np.generic]
AttributeValue = int | float | str | Sequence[int] | Sequence[float] | ir.TensorProtocol


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether ``node`` is one of the named ops of ``domain`` (ai.onnx unless told), and carries nothing unread."""
    if node is None or node.domain != domain or node.op_type not in op_types:
        return False
    return bool(domain) or not unread(node)


def producer(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """Node that computes ``value`` if it is one of the named ops, else None."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types, domain=domain) else None


def consumers(value: ir.Value, *op_types: str) -> list[ir.Node]:
    """Nodes that read ``value`` (each once, in graph order), of the named ops when any are named."""
    nodes = dict.fromkeys(use.node for use in value.uses())
    return [node for node in nodes if not op_types or is_op(node, *op_types)]


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of ``node``, or None when it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """Input ``index`` of ``node``, which the op requires to be there.

    Raises:
        InternalError: the input is absent; canonical graphs never lack a required one.
    """
    value = input_at(node, index)
    if value is None:
        raise InternalError("E-GRAPH", f"input {index} of {node.op_type} is missing", where=f"node {node.name}")
    return value


def constant(value: ir.Value | None) -> Array | None:
    """Contents of ``value`` when it is an initializer (not overridable by a caller) or a Constant node."""
    if value is None or value.is_graph_input() or value.const_value is None:
        node = producer(value, "Constant")
        return _written(node) if node is not None else None
    return value.const_value.numpy()


def _written(node: ir.Node) -> Array | None:
    """What a Constant node holds, in whichever attribute; None for strings and sparse tensors."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_int", "value_ints"):
            return np.asarray(attribute.value, np.int64)
        if name in ("value_float", "value_floats"):
            return np.asarray(attribute.value, np.float32)
    return None


def kind_of(array: Array) -> str:
    """Numpy's letter for what an array holds; bfloat16, which numpy does not know for a number, is a float ("f")."""
    return "f" if array.dtype == ir.DataType.BFLOAT16.numpy() else array.dtype.kind


def scalar(value: ir.Value | None) -> float | None:
    """The one number that ``value`` holds, when it is a constant of one element."""
    if value is None or (value.shape is not None and any(isinstance(d, int) and d != 1 for d in value.shape)):
        return None
    array = constant(value)
    if array is None or array.size != 1 or kind_of(array) not in "fiub":
        return None
    return float(array.reshape(()).astype(np.float64))


def attribute(node: ir.Node, name: str, default: float | int | str | None = None) -> float | int | str | None:
    """Scalar attribute ``name`` of ``node``, or ``default`` when it is not written."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value: float | int | str = found.value
    return value


def set_attributes(node: ir.Node, **attributes: AttributeValue) -> None:
    """Write attributes of ``node``, replacing those of the same name."""
    for attr in ir.convenience.convert_attributes(attributes):
        node.attributes[attr.name] = attr


class _Names:
    """The names of a graph's values and nodes, and how far the numbers after each stem have come."""

    def __init__(self, graph: ir.Graph) -> None:
        self._taken: set[str | None] = {*graph.initializers, *(value.name for value in graph.inputs)}
        for node in graph.all_nodes():
            self._taken.add(node.name)
            self._taken.update(output.name for output in node.outputs)
        self._counts: dict[str, int] = {}

    def free(self, stem: str) -> str:
        name, count = stem, self._counts.get(stem, 0)
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        self._counts[stem] = count
        return name


_NAMES: ContextVar[dict[ir.Graph, _Names] | None] = ContextVar("names of the graphs that are being rewritten")


@contextmanager
def names_remembered() -> Iterator[None]:
    """Look through a graph for its names once, not for every new one: where all new names are from `unique_name`."""
    token = _NAMES.set({})
    try:
        yield
    finally:
        _NAMES.reset(token)


def unique_name(graph: ir.Graph, stem: str) -> str:
    """``stem``, or ``stem_1``, ``stem_2``… : one that no value and no node of ``graph`` carries."""
    remembered = _NAMES.get(None)
    if remembered is None:
        return _Names(graph).free(stem)
    if graph not in remembered:
        remembered[graph] = _Names(graph)
    return remembered[graph].free(stem)


def initializer(graph: ir.Graph, stem: str, array: npt.ArrayLike | ir.TensorProtocol) -> ir.Value:
    """New initializer of ``graph`` named ``stem`` (made unique) that holds ``array``."""
    name = unique_name(graph, stem)
    if isinstance(array, ir.TensorProtocol):
        tensor: ir.TensorProtocol = array
    else:
        tensor = ir.tensor(np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace_initializer(graph: ir.Graph, old: ir.Value, array: npt.ArrayLike) -> ir.Value:
    """Give every reader of initializer ``old`` new contents (another shape is fine), under the same name."""
    name = old.name or "weight"
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    new = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers.pop(name)
    graph.register_initializer(new)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    return new


def insert(
    site: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    domain: str = "",
    name: str | None = None,
    dtype: ir.DataType | None = None,
    shape: Iterable[int | str | ir.SymbolicDim | None] | None = None,
) -> ir.Value:
    """Put a node with one output right before ``site``; returns its output.

    Args:
        name: stem of the output's name; ``<site>/<op>`` when not given.
        dtype: element type of the output; that of the first input when not given.
        shape: of the output, when known (``infer_shapes`` finds it otherwise).
    """
    return insert_many(site, op_type, inputs, attributes, 1, domain=domain, name=name, dtype=dtype, shape=shape)[0]


def insert_many(
    site: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, AttributeValue] | None,
    outputs: int,
    *,
    domain: str = "",
    name: str | None = None,
    dtype: ir.DataType | None = None,
    shape: Iterable[int | str | ir.SymbolicDim | None] | None = None,
) -> tuple[ir.Value, ...]:
    """Like ``insert``, for a node with several outputs (all of one type and shape)."""
    graph = site.graph
    if graph is None:
        raise InternalError("E-GRAPH", "a node that is in no graph cannot be a site", where=f"node {site.name}")
    node = ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes or {}), num_outputs=outputs)
    stem = name or f"{site.name}/{op_type}"
    if dtype is None and inputs and inputs[0] is not None:
        dtype = inputs[0].dtype
    owner = graph.graph if isinstance(graph, ir.Function) else graph
    node.name = unique_name(owner, stem)
    for index, value in enumerate(node.outputs):
        value.name = node.name if outputs == 1 else unique_name(owner, f"{node.name}/{index}")
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape) if shape is not None else None
    graph.insert_before(site, node)
    return tuple(node.outputs)


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``; a graph output keeps the name that callers know.

    Where ``new`` cannot take the name (a graph input, an initializer, itself an output), an Identity is put between.
    """
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    graph, node, name = old.graph, old.producer(), old.name
    if graph is None or node is None:
        raise InternalError("E-GRAPH", "only a computed value can be replaced as an output", where=f"value {name}")
    if new.producer() is None or new.is_graph_output() or new.graph is not graph:
        new = _identity_of(new, node)
    old.name = unique_name(graph, f"{name}/replaced")
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name
    if new.shape is None:
        new.shape, new.type = old.shape, old.type


def same_form(old: ir.Value, new: ir.Value) -> bool:
    """Whether readers of ``old`` find the same type, rank and sizes in ``new``, as far as they are known.

    A constant of one element is a number to `scalar`, whatever its rank; as an operand it may still add axes, or repeat
    one of size 1.
    """
    if None not in (old.dtype, new.dtype) and old.dtype != new.dtype:
        return False
    if old.shape is None or new.shape is None:
        return True
    return len(old.shape) == len(new.shape) and all(map(_same_size, old.shape, new.shape))


def _same_size(old: int | ir.SymbolicDim, new: int | ir.SymbolicDim) -> bool:
    """Sizes that inference has left open may be any."""
    if isinstance(old, int):
        return old == new if isinstance(new, int) else new.value is None or new.value.startswith("unk__")
    return True


def replace(old: ir.Value, new: ir.Value) -> bool:
    """Let every reader of ``old`` read ``new`` where both have the same form; whether they do.

    Rewrites that drop a node, or put another in its place, go through here, before they change anything else.
    """
    if not same_form(old, new):
        return False
    replace_uses(old, new)
    return True


def _identity_of(value: ir.Value, site: ir.Node) -> ir.Value:
    """Output of a new Identity: right after the node that computes ``value``, or before ``site`` if none of its graph
    does.
    """
    source = value.producer() if value.graph is site.graph else None
    result = insert(site if source is None else source, "Identity", [value], shape=value.shape)
    node = result.producer()
    if source is not None and source.graph is not None and node is not None:
        source.graph.remove(node)
        source.graph.insert_after(source, node)
    return result


def remove_dead(model: ir.Model) -> int:
    """Remove nodes, initializers and functions that nothing reads; returns the number of nodes removed."""
    before = sum(1 for _ in model.graph.all_nodes())
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return before - sum(1 for _ in model.graph.all_nodes())


def sweep(model: ir.Model, op_types: Sequence[str], rewrite_node: Callable[[ir.Node], bool]) -> int:
    """Call ``rewrite_node`` on every node of the named ops (ai.onnx), subgraphs included; count the ``True``.

    The list of nodes is taken beforehand, and nodes that an earlier call made useless are passed over.
    """
    nodes = [node for node in model.graph.all_nodes() if is_op(node, *op_types)]
    count = 0
    with names_remembered():
        for node in nodes:
            if node.graph is None or not any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            count += rewrite_node(node)
    return count
