"""Tokens of a batch without its padding: ``xopt::PackTokens``, ``xopt::UnpackTokens`` and ``xopt::PackedAttention``.

    PackTokens(x [B, S, C], mask [B, S]) -> [T, C]           the T tokens that the mask shows, sequence by sequence
    UnpackTokens(x [T, C], mask [B, S]) -> [B, S, C]         back, zeros where there is padding
    PackedAttention(q, k, v [T, heads * d], mask [B, S])     each token attends to the tokens of its own sequence

The mask is bool, True for a token. Attention has attributes of the standard's: q_num_heads, kv_num_heads, scale and
is_causal. In other runtimes attention unpacks and packs again, so its cost is that of the padded batch.

Source  Zhai et al. (IPDPS 2023), ByteTransformer: padding-free computation of variable-length batches.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import build_function

from xopt.ir.ops.matching import OPSET, Op, ints, number, scalar

LOWEST = -3.4e38
"""Score of a key that is hidden."""


def pack_tokens() -> ir.Function:
    """Body of ``xopt::PackTokens``."""
    return _function("PackTokens", _pack, ("x", "mask"))


def unpack_tokens() -> ir.Function:
    """Body of ``xopt::UnpackTokens``."""
    return _function("UnpackTokens", _unpack, ("x", "mask"))


def packed_attention() -> ir.Function:
    """Body of ``xopt::PackedAttention``."""
    function = _function("PackedAttention", _attention, ("q", "k", "v", "mask"))
    for name in ("q_num_heads", "kv_num_heads", "is_causal"):
        function.attributes[name] = ir.Attr(name, ir.AttributeType.INT, None)
    function.attributes["scale"] = ir.Attr("scale", ir.AttributeType.FLOAT, None)
    return function


def _function(name: str, body: Any, inputs: tuple[str, ...]) -> ir.Function:
    values = [ir.Value(name=value) for value in inputs]
    function: ir.Function = build_function(body, values, domain="xopt", name=name, opset_imports={"": OPSET})
    return function


def _places(op: Op, mask: ir.Value) -> ir.Value:
    """Sequence and position of each token, [T, 2]."""
    return op.Transpose(op.NonZero(mask), perm=[1, 0])


def _pack(op: Op, x: ir.Value, mask: ir.Value) -> ir.Value:
    return op.GatherND(x, _places(op, mask))


def _unpack(op: Op, x: ir.Value, mask: ir.Value) -> ir.Value:
    shape = op.Concat(op.Shape(mask), op.Shape(x, start=1), axis=0)
    return op.ScatterND(op.Expand(number(op, 0.0), shape), _places(op, mask), x)


def _attention(op: Op, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> ir.Value:
    heads, kv_heads = (_attribute(op, name) for name in ("q_num_heads", "kv_num_heads"))
    group = op.Div(heads, kv_heads)
    q = op.Reshape(_unpack(op, q, mask), op.Concat(ints(op, 0, 0), kv_heads, group, ints(op, -1), axis=0))
    k, v = (
        op.Reshape(_unpack(op, x, mask), op.Concat(ints(op, 0, 0), kv_heads, ints(op, 1, -1), axis=0)) for x in (k, v)
    )
    q, v = (op.Transpose(x, perm=[0, 2, 3, 1, 4]) for x in (q, v))
    scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 2, 3, 4, 1])), scale)
    weights = op.Softmax(op.Where(_visible(op, mask), scores, number(op, LOWEST)), axis=-1)
    mixed = op.Transpose(op.MatMul(weights, v), perm=[0, 3, 1, 2, 4])
    return _pack(op, op.Reshape(mixed, ints(op, 0, 0, -1)), mask)


def _visible(op: Op, mask: ir.Value) -> ir.Value:
    """Keys that a query may read, [B, 1, 1, 1 or S, S]: what the mask shows, up to itself if attention is causal."""
    # Tokens keep their order, so the triangle over the padded batch is that of the packed one.
    length = op.Squeeze(op.Shape(mask, start=1, end=2))
    position = op.Range(scalar(op, 0), length, scalar(op, 1))
    before = op.LessOrEqual(op.Unsqueeze(position, ints(op, 0)), op.Unsqueeze(position, ints(op, 1)))
    anywhere = op.Equal(_attribute(op, "is_causal"), ints(op, 0))
    return op.And(op.Unsqueeze(mask, ints(op, 1, 2, 3)), op.Or(before, anywhere))


def _attribute(op: Op, name: str) -> ir.Value:
    """An integer attribute as int64 [1]."""
    number = op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
    return op.Unsqueeze(number, ints(op, 0))
