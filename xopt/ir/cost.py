"""What a model costs: parameters, bytes, and multiply-accumulates by the model that the literature uses.

Counted are matrix products, convolutions and attention (for s queries, t keys and h heads of widths d and v:
``s*t*h*(d+v)``); not counted are norms, softmax, activations and, as in its paper, the matching inside
``xopt::MergeTokens``. For a plain encoder of width D this gives ``12*s*D^2 + 2*s^2*D`` per block: the counts of Kwon et
al. (2022) and of the published GFLOPs of DeiT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from xopt.errors import InputError
from xopt.ir import edit, quantized, walk
from xopt.ir.canonical import constants
from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.shapes import bind_dims, infer_shapes
from xopt.ir.structure import Block, transformer_blocks
from xopt.ir.symbolic import name_dims

DEFAULT_BATCH = 1
DEFAULT_LENGTH = 128


@dataclass(frozen=True)
class Cost:
    """The cost of one run.

    Attributes:
        parameters: elements of the initializers that hold numbers (not those that hold shapes or indices, nor the
            scales and zero points of quantized ones).
        bytes: size of all initializers.
        macs: multiply-accumulates at ``dims``.
        per_node: MACs of each node that has any, by node name.
        per_block: MACs of each block of :func:`xopt.ir.structure.transformer_blocks`.
        dims: the sizes that symbolic dimensions of the inputs were given.
        unknown: names of nodes that are not counted because a size stays unknown even then.
    """

    parameters: int
    bytes: int
    macs: int
    per_node: Mapping[str, int]
    per_block: tuple[int, ...]
    dims: Mapping[str, int]
    unknown: tuple[str, ...]


def cost(model: ir.Model, dims: Mapping[str, int] | None = None) -> Cost:
    """Count a canonical model; the model stays as it is.

    Args:
        model: any model; blocks are found in canonical ones.
        dims: sizes of symbolic input dimensions by name. The others are 1 where they are a first axis, else 128.

    Raises:
        InputError: ``E-OPTION`` for a name that no input has.
    """
    sizes, counts = _counted(model, dims or {})
    macs = {node: count for node in model.graph if (count := counts.get(node.outputs[0].name, 0))}
    unknown = [_label(node) for node in model.graph if counts.get(node.outputs[0].name, 0) is None]
    order = walk.Order(model.graph)
    weights = {v: v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    return Cost(
        parameters=sum(tensor.size for v, tensor in weights.items() if _is_number(tensor) and not quantized.is_grid(v)),
        bytes=sum(tensor.nbytes for tensor in weights.values()),
        macs=sum(macs.values()),
        per_node={_label(node): count for node, count in macs.items()},
        per_block=tuple(sum(macs.get(n, 0) for n in _nodes(b, order)) for b in transformer_blocks(model)),
        dims=sizes,
        unknown=tuple(unknown),
    )


def _counted(model: ir.Model, dims: Mapping[str, int]) -> tuple[dict[str, int], dict[str | None, int | None]]:
    """Sizes of all symbolic dimensions, and MACs at them: at shorter lengths where the model's tables are shorter."""
    refusals: list[tuple[dict[str, int], InputError]] = []
    length = DEFAULT_LENGTH
    while length:
        sizes = default_dims(model, length) | dict(dims)
        try:
            return sizes, _counts(bind_dims(model, sizes) if sizes else model.clone())
        except InputError as error:
            if error.code != "E-FORMAT":
                raise
            refusals.append((sizes, error))
        length = length // 2 if set(sizes) - set(dims) else 0
    sizes, refusal = refusals[0]
    what = f"the model does not take {', '.join(f'{name}={size}' for name, size in sizes.items())}: {refusal.what}"
    raise InputError("E-OPTION", what, cure="give other sizes of its axes") from refusal


def _counts(bound: ir.Model) -> dict[str | None, int | None]:
    """MACs by the name of a node's first output; arithmetic on shapes is folded where inference alone falls short."""
    name_dims(bound.graph)
    counts = {node.outputs[0].name: node_macs(node) for node in bound.graph}
    if None in counts.values():
        constants.rewrite(bound, CanonicalizeReport())
        infer_shapes(bound)
        counts = {node.outputs[0].name: node_macs(node) for node in bound.graph}
    return counts


def default_dims(model: ir.Model, length: int = DEFAULT_LENGTH) -> dict[str, int]:
    """Sizes for symbolic input dimensions: 1 for those that are a first axis, ``length`` for the others."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                sizes.setdefault(dim.value, length if axis else DEFAULT_BATCH)
    return sizes


def node_macs(node: ir.Node) -> int | None:
    """Multiply-accumulates of one node by the shapes of its operands; None when a size is unknown, 0 for other ops."""
    if edit.is_op(node, "MatMul", "MatMulInteger"):
        return _product(_sizes(node.outputs[0]), _sizes(node.inputs[0], -1))
    if edit.is_op(node, "Gemm"):
        inner = 0 if walk.int_attribute(node, "transA", 0) else 1
        return _product(_sizes(node.outputs[0]), _sizes(node.inputs[0], inner))
    if edit.is_op(node, "Conv"):
        kernel = walk.shape_of(node.inputs[1])
        return _product(_sizes(node.outputs[0]), kernel[1:] if kernel else None)
    if node.op_type == "Attention" and not node.domain:
        return _attention_macs(node)
    if edit.is_op(node, "Einsum"):
        return _einsum_macs(node)
    return 0


def _attention_macs(node: ir.Node) -> int | None:
    q, k, v = (walk.shape_of(value) for value in node.inputs[:3])
    if q is None or k is None or v is None:
        return None
    past = (0,) if (cache := edit.input_at(node, 4)) is None else (walk.shape_of(cache) or (None,) * 3)[2:3]
    keys = (_plus(k[-2], past[0]),)
    if len(q) == 4:
        return _product(q[:3], keys, (_plus(q[3], v[3]),))
    heads, kv_heads = (walk.int_attribute(node, f"{x}_num_heads", 1) for x in ("q", "kv"))
    values = None if v[2] is None else v[2] // kv_heads * heads
    return _product(q[:2], keys, (_plus(q[2], values),))


def _einsum_macs(node: ir.Node) -> int | None:
    """The product of all index sizes, for a product of two or more operands."""
    found = node.attributes.get("equation")
    terms = found.as_string().replace(" ", "").split("->")[0].split(",") if found is not None else []
    if len(terms) < 2 or any("." in term for term in terms):
        return 0 if len(terms) < 2 else None
    extents: dict[str, int | None] = {}
    for term, value in zip(terms, node.inputs):
        shape = walk.shape_of(value)
        if shape is None:
            return None
        extents.update(zip(term, shape))
    return _product(tuple(extents.values()))


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _sizes(value: ir.Value | None, axis: int | None = None) -> tuple[int | None, ...] | None:
    """The shape, or one axis of it."""
    shape = walk.shape_of(value)
    return shape if shape is None or axis is None else (shape[axis],)


def _product(*parts: tuple[int | None, ...] | None) -> int | None:
    """The product of all sizes, None when one is unknown."""
    sizes: list[int] = []
    for part in parts:
        if part is None or any(size is None for size in part):
            return None
        sizes += [size for size in part if size is not None]
    return math.prod(sizes)


def _nodes(block: Block, order: walk.Order) -> set[ir.Node]:
    """The nodes on the block's stretch of the stream, and projections of another stream (cross attention)."""
    found = set(order.between(block.input, block.output) or [])
    if block.attention is not None:
        found.add(block.attention.node)
        parts = (block.attention.q, block.attention.k, block.attention.v, block.attention.out)
        found.update(part.matmul for part in parts if part is not None)
    return found


def _is_number(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point() or (tensor.dtype.bitwidth <= 8 and tensor.dtype != ir.DataType.BOOL)


def _label(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)
