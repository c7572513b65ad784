"""Norms, and RotaryEmbedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from tvm import relax, te, tirx

from xopt.targets.ops.bounds import check_indices, valid
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.layout import expand, strided
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def _layer_norm(call: Call) -> Value:
    """The normalized tensor and, where they are read, the mean and the inverse deviation of what is normalized."""
    x, shape = call.x(), call.shape()
    axes, epsilon = list(range(call.axis(-1, len(shape)), len(shape))), float(call.attr("epsilon", 1e-5))
    scale = _parameter(call, 1, shape[axes[0] :])
    if call.has(2):
        bias = _parameter(call, 2, shape[axes[0] :])
    else:
        bias = call.emit(relax.op.zeros(call.lowering.shape_of(scale), str(scale.ty.dtype)))
    dtype, stash = str(x.ty.dtype), _stash(call)
    if dtype == "float32" and not any(output.uses() or output.is_graph_output() for output in call.node.outputs[1:]):
        return call.emit(relax.op.nn.layer_norm(x, scale, bias, axes, epsilon))
    op = relax.op
    mean = call.emit(op.mean(x, axes, True))
    centered = call.emit(op.subtract(x, mean))
    inverse = _inverse_root(call, centered, axes, epsilon)
    y = call.emit(op.add(op.multiply(op.multiply(centered, inverse), scale), bias))
    return [y, _cast(call, mean, stash), _cast(call, inverse, stash)]


def _rms_norm(call: Call) -> Value:
    x, shape = call.x(), call.shape()
    axes, epsilon = list(range(call.axis(-1, len(shape)), len(shape))), float(call.attr("epsilon", 1e-5))
    scale, dtype = _parameter(call, 1, shape[axes[0] :]), str(x.ty.dtype)
    _stash(call)
    if dtype == "float32" and axes[0] > 0 and str(scale.ty.dtype) == dtype:
        return call.emit(relax.op.nn.rms_norm(x, scale, axes, epsilon))
    normal = call.emit(relax.op.multiply(x, _inverse_root(call, x, axes, epsilon)))
    wanted = str(scale.ty.dtype)
    return call.emit(relax.op.multiply(_cast(call, normal, wanted), scale))


def _stash(call: Call) -> str:
    """The type of mean and deviation, which are computed in that of the input."""
    kind = ir.DataType(int(call.attr("stash_type", 1)))
    if not kind.is_floating_point():
        raise call.unsupported(f"statistics of type {kind.name}")
    return kind.numpy().name


def _inverse_root(call: Call, x: relax.Expr, axes: list[int], epsilon: float) -> relax.Expr:
    """1 / sqrt(mean(x ** 2) + epsilon)."""
    op, one, number = relax.op, *(relax.const(value, str(x.ty.dtype)) for value in (1.0, epsilon))
    return call.emit(op.divide(one, op.sqrt(op.add(op.mean(_squared(x), axes, True), number))))


def _lp_norm(call: Call) -> Value:
    """Divided by the sum of magnitudes, or by the root of the sum of squares; zeros stay."""
    op, shape, order = relax.op, call.shape(), int(call.attr("p", 2))
    if order not in (1, 2):
        raise call.unsupported(f"a norm of order {order}")
    dtype, axis = str(call.x().ty.dtype), call.axis(-1, len(shape))
    x = call.x()
    total = call.emit(op.sum(op.abs(x) if order == 1 else _squared(x), [axis], True))
    norm = call.emit(op.sqrt(total)) if order == 2 else total
    none = call.emit(op.equal(norm, relax.const(0.0, dtype)))
    return call.emit(op.divide(x, op.where(none, relax.const(1.0, dtype), norm)))


def _local_norm(call: Call) -> Value:
    """Each element by the squares of its channel and those nearby, of which an even size has one more behind."""
    op, shape, size = relax.op, call.shape(), int(call.attr("size", 0))
    if size < 1 or len(shape) < 2:
        raise call.unsupported(f"{size} channels of a tensor of rank {len(shape)}")
    dtype, channels = str(call.x().ty.dtype), shape[1]
    most = channels - 1 if isinstance(channels, int) else size
    before, behind = min((size - 1) // 2, most), min(size // 2, most)
    x = call.x()

    def squares(data: Any, *index: Any) -> Any:
        step = te.reduce_axis((0, before + behind + 1), "step")
        channel = index[1] + step - before
        value = data(index[0], channel, *index[2:])
        inside = tirx.all(channel >= 0, channel < channels)
        return te.sum(tirx.if_then_else(inside, value * value, tirx.const(0, data.dtype)), axis=step)

    total = call.lowering.compute("squares_nearby", shape, squares, x)
    alpha, beta, bias = (
        relax.const(float(call.attr(name, default)) / divisor, dtype)
        for name, default, divisor in (("alpha", 1e-4, size), ("beta", 0.75, 1), ("bias", 1.0, 1))
    )
    return call.emit(op.divide(x, op.power(op.add(bias, op.multiply(alpha, total)), beta)))


def _batch_norm(call: Call) -> list[Value]:
    """By stored statistics, or in training mode by those of the batch, with which the stored ones are updated."""
    op, shape = relax.op, call.shape()
    if len(shape) < 2:
        raise call.unsupported(f"its input has rank {len(shape)}")
    dtype = str(call.x().ty.dtype)
    x, *columns = (_cast(call, call.x(index), dtype) for index in range(5))
    scale, bias, mean, variance = (
        call.lowering.reshape(call.lowering.recast(column, [shape[1]]), [1, shape[1], *[1] * (len(shape) - 2)])
        for column in columns
    )
    stored, momentum = (mean, variance), float(call.attr("momentum", 0.9))
    if call.attr("training_mode", 0):
        axes = [0, *range(2, len(shape))]
        mean = call.emit(op.mean(x, axes, True))
        variance = call.emit(op.mean(_squared(op.subtract(x, mean)), axes, True))
    root = op.sqrt(op.add(variance, relax.const(float(call.attr("epsilon", 1e-5)), dtype)))
    factor = call.emit(op.divide(scale, root))
    y = call.emit(op.add(op.multiply(op.subtract(x, mean), factor), bias))
    if not call.attr("training_mode", 0):
        return [y]

    def running(index: int, old: relax.Expr, new: relax.Expr) -> relax.Expr:
        parts = (
            op.multiply(value, relax.const(share, dtype)) for value, share in ((old, momentum), (new, 1 - momentum))
        )
        return _cast(call, op.reshape(op.add(*parts), [shape[1]]), str(call.x(index).ty.dtype))

    return [y, running(3, stored[0], mean), running(4, stored[1], variance)]


def _squared(x: relax.Expr) -> relax.Expr:
    return relax.op.multiply(x, x)


def _cast(call: Call, x: relax.Expr, dtype: str) -> relax.Expr:
    x = x if isinstance(x, relax.Var) else call.emit(x)
    return x if str(x.ty.dtype) == dtype else call.emit(relax.op.astype(x, dtype))


def _parameter(call: Call, index: int, shape: list[Dim]) -> relax.Expr:
    """A scale or a bias as large as what is normalized."""
    if len(call.shape(index)) > len(shape):
        raise call.unsupported(f"input {index} has more axes than are normalized")
    return expand(call, call.x(index), shape)


def _rotary(call: Call) -> Value:
    """The ONNX definition in Relax operators, for inputs [B, S, H*d] and [B, H, S, d]."""
    x, shape = call.x(), call.shape()
    lowering, dims = call.lowering, call.dims
    if len(shape) == 3:
        heads = int(call.attr("num_heads", 0))
        size = dims.quotient([shape[2]], [heads])
        x = lowering.reshape(x, [shape[0], shape[1], heads, size])
    else:
        size = shape[3]
        x = call.emit(relax.op.permute_dims(x, [0, 2, 1, 3]))
    width = int(call.attr("rotary_embedding_dim", 0)) or size
    cos, sin = (_angles(call, index, lowering.shape_of(x)[:2], width // 2) for index in (1, 2))
    turned = strided(call, x, {3: (0, width, 1)})
    rest = strided(call, x, {3: (width, dims.simplify(size - width), 1)}) if width != size else None
    interleaved = bool(call.attr("interleaved", 0))
    first, second = ((0, 2), (1, 2)) if interleaved else ((0, 1), (width // 2, 1))
    a, b = (strided(call, turned, {3: (start, width // 2, step)}) for start, step in (first, second))
    op = relax.op
    real = op.subtract(op.multiply(a, cos), op.multiply(b, sin))
    imaginary = op.add(op.multiply(b, cos), op.multiply(a, sin))
    if interleaved:
        half = [*lowering.shape_of(a), 1]
        pair = op.concat([op.reshape(real, half), op.reshape(imaginary, half)], 4)
        result = call.emit(op.reshape(pair, lowering.shape_of(turned)))
    else:
        result = call.emit(op.concat([real, imaginary], 3))
    if rest is not None:
        result = call.emit(op.concat([result, rest], 3))
    if len(shape) == 3:
        return lowering.reshape(result, shape)
    return call.emit(op.permute_dims(result, [0, 2, 1, 3]))


def _angles(call: Call, index: int, tokens: list[Dim], half: int) -> relax.Expr:
    """The cosines or sines as [B or 1, S, 1, half], gathered by position when positions are given."""
    table, shape = call.x(index), call.shape(index)
    if call.has(3):
        positions, rows = call.x(3), shape[0]
        check_indices(call, 3, [rows])
        shape = [*call.shape(3), shape[-1]]
        table = call.lowering.compute(
            "angles", shape, lambda data, where, b, s, d: data(valid(where(b, s), rows), d), table, positions
        )
    table = call.lowering.reshape(table, [shape[0], shape[1], 1, half])
    batch = 1 if call.dims.equal(shape[0], 1) else tokens[0]
    return call.lowering.recast(table, [batch, tokens[1], 1, half])


OPS: dict[str, Emitter] = {
    "BatchNormalization": _batch_norm, "LRN": _local_norm, "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm, "RMSNormalization": _rms_norm, "RotaryEmbedding": _rotary,
}  # fmt: skip
"""Emitters by operator type."""
