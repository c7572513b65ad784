"""MatMul, Gemm, Einsum and Det."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from tvm import relax, te, tirx

from xopt.kernels import determinant
from xopt.kernels.emit import i64
from xopt.runtime.device import CPU
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
    """The sum, over the letters that the result lacks, of the product of the operands."""
    terms, arrow, right = call.attr("equation").replace(" ", "").partition("->")
    tensors, lowering = call.xs(), call.lowering
    letters = [_labels(term, len(lowering.shape_of(x))) for term, x in zip(terms.split(","), tensors, strict=True)]
    sizes: dict[Any, Dim] = {}
    for names, x in zip(letters, tensors):
        for label, dim in zip(names, lowering.shape_of(x), strict=True):
            if call.dims.equal(sizes.get(label, 1), 1):
                sizes[label] = dim
    dots = sorted(label for label in sizes if isinstance(label, int))
    found = [label for names in letters for label in names]
    once = sorted(label for label in sizes if isinstance(label, str) and found.count(label) == 1)
    wanted = _labels(right, len(right.replace("...", "")) + len(dots)) if arrow else [*dots, *once]
    if len(set(wanted)) != len(wanted) or not set(wanted) <= sizes.keys():
        raise call.unsupported("its result has letters twice, or others than its operands")
    operands = []
    for names, x in zip(letters, tensors):
        shape = lowering.shape_of(x)
        operands.append(lowering.recast(x, [d if call.dims.equal(d, 1) else sizes[k] for k, d in zip(names, shape)]))
    gone = {label: te.reduce_axis((i64(0), i64(dim)), f"sum_{place}")
            for place, (label, dim) in enumerate(sizes.items()) if label not in wanted}  # fmt: skip

    def element(*arguments: Any) -> Any:
        at = {**gone, **dict(zip(wanted, arguments[len(operands) :]))}
        factors = []
        for x, names in zip(arguments, letters):
            ones = [isinstance(dim, tirx.IntImm) and dim.value == 1 for dim in x.shape]
            factors.append(x(*[i64(0) if one else at[label] for one, label in zip(ones, names)]))
        product = reduce(lambda a, b: a * b, factors)
        return te.sum(product, axis=list(gone.values())) if gone else product

    return lowering.compute("einsum", [sizes[label] for label in wanted], element, *operands)


def _labels(letters: str, rank: int) -> list[Any]:
    """What an equation calls each axis of an operand; those of an ellipsis are numbered from the end."""
    before, dots, after = letters.partition("...")
    return [*before, *(range(len(before) + len(after) - rank, 0) if dots else ()), *after]


def _determinant(call: Call) -> Value:
    shape, dtype, lowering = call.shape(), str(call.x().ty.dtype), call.lowering
    if len(shape) < 2 or dtype not in ("float32", "float64") or lowering.target.device != CPU:
        raise call.unsupported("it is not of matrices of floats, or the target is no CPU")
    call.require(call.dims.same(shape[-2], shape[-1]), "its matrices are not square")
    count = call.dims.product(shape[:-2])
    flat = lowering.reshape(call.x(), [count, shape[-1], shape[-1]])
    found = lowering.call(determinant.name(dtype), lambda: determinant.build(dtype), [flat], [count], dtype)
    return lowering.reshape(found, shape[:-2])


OPS: dict[str, Emitter] = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Det": _determinant}
"""Emitters by operator type."""
