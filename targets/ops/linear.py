"""MatMul, Gemm, Einsum and Conv."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import relax

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def require_inner(call: Call, left: Dim, right: Dim) -> None:
    """The axis that a product sums over is as long on both sides."""
    call.require(call.dims.same(left, right), "the sizes that it sums over differ")


def _matmul(call: Call) -> Value:
    a, b = call.x(0), call.x(1)
    require_inner(call, call.shape(0)[-1], call.shape(1)[-2:][0])
    if len(call.shape(0)) > 2 and len(call.shape(1)) > 2:
        a, b = _batched(call, a, b)
    return call.emit(relax.op.matmul(a, b))


def _batched(call: Call, a: relax.Expr, b: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    """Operands whose batch and inner dimensions are provably equal."""
    x, y = call.lowering.shape_of(a), call.lowering.shape_of(b)
    wanted = [*y[:-2], x[-1], y[-1]]
    for place in range(3, min(len(x), len(y)) + 1):
        if not call.dims.equal(x[-place], 1) and not call.dims.equal(y[-place], 1):
            wanted[-place] = x[-place]
    return a, call.lowering.recast(b, wanted)


def _gemm(call: Call) -> Value:
    op = relax.op
    a, b = call.x(0), call.x(1)
    require_inner(
        call, call.shape(0)[0 if call.attr("transA", 0) else 1], call.shape(1)[1 if call.attr("transB", 0) else 0]
    )
    a = op.permute_dims(a) if call.attr("transA", 0) else a
    b = op.permute_dims(b) if call.attr("transB", 0) else b
    alpha, beta = float(call.attr("alpha", 1.0)), float(call.attr("beta", 1.0))
    dtype = str(call.x(0).ty.dtype)
    result = call.emit(op.matmul(a, b))
    if alpha != 1.0:
        result = call.emit(op.multiply(result, relax.const(alpha, dtype)))
    if call.has(2):
        c = call.x(2) if beta == 1.0 else op.multiply(call.x(2), relax.const(beta, dtype))
        result = call.emit(op.add(*call.aligned(result, call.emit(c))))
    return result


def _einsum(call: Call) -> Value:
    equation = call.attr("equation").replace(" ", "")
    sizes: dict[Any, Dim] = {}
    operands = []
    for x, letters in zip(call.xs(), equation.split("->")[0].split(","), strict=True):
        shape = call.lowering.shape_of(x)
        wanted = []
        for label, dim in zip(_labels(letters, len(shape)), shape, strict=True):
            wanted.append(dim if call.dims.equal(dim, 1) else sizes.setdefault(label, dim))
        operands.append(call.lowering.recast(x, wanted))
    return call.emit(relax.op.einsum(tuple(operands), equation))


def _labels(letters: str, rank: int) -> list[Any]:
    """What an equation calls each axis of an operand; those of an ellipsis are numbered from the end."""
    before, dots, after = letters.partition("...")
    return [*before, *(range(len(before) + len(after) - rank, 0) if dots else ()), *after]


def _padding(call: Call, rank: int) -> list[int]:
    """Padding before and after each spatial axis, ``auto_pad`` resolved."""
    kind = call.attr("auto_pad", "NOTSET")
    call.pass_over("pads")  # there are none beside another kind
    if kind in ("NOTSET", "VALID"):
        return [int(p) for p in call.attr("pads", [0] * (2 * rank))] if kind == "NOTSET" else [0] * (2 * rank)
    before, after = [], []
    strides, dilations = call.attr("strides", [1] * rank), call.attr("dilations", [1] * rank)
    for dim, size, stride, dilation in zip(call.shape(0)[2:], call.shape(1)[2:], strides, dilations):
        if not isinstance(dim, int):
            raise call.unsupported("auto_pad on a dynamic dimension")
        total = max((-(-dim // stride) - 1) * stride + (int(size) - 1) * dilation + 1 - dim, 0)
        small, large = total // 2, total - total // 2
        before.append(small if kind == "SAME_UPPER" else large)
        after.append(large if kind == "SAME_UPPER" else small)
    return before + after


def _conv(call: Call) -> Value:
    rank = len(call.shape(0)) - 2
    call.pass_over("kernel_shape")  # the weight has it
    functions = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}
    if rank not in functions:
        raise call.unsupported(f"convolution over {rank} axes")
    strides = [int(x) for x in call.attr("strides", [1] * rank)]
    dilations = [int(x) for x in call.attr("dilations", [1] * rank)]
    groups = int(call.attr("group", 1))
    padding = _padding(call, rank)
    x, weight = call.x(0), call.x(1)
    require_inner(call, call.shape(0)[1], call.dims.simplify(call.shape(1)[1] * groups))
    call.require(call.dims.same(call.shape(1)[0] % groups, 0), f"its outputs are not {groups} groups")
    for axis, (dim, size) in enumerate(zip(call.shape(0)[2:], call.shape(1)[2:])):
        room = dim + padding[axis] + padding[axis + rank]
        call.require(room >= (size - 1) * dilations[axis] + 1, f"axis {axis} of the image is shorter than the kernel")
    result = call.emit(functions[rank](x, weight, strides=strides, padding=padding, dilation=dilations, groups=groups))
    if not call.has(2):
        return result
    bias = call.lowering.recast(call.x(2), [call.shape(1)[0]])
    bias = call.lowering.reshape(bias, [1, call.shape(1)[0], *[1] * rank])
    return call.emit(relax.op.add(result, bias))


OPS: dict[str, Emitter] = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Conv": _conv}
"""Emitters by operator type."""
