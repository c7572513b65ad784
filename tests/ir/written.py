"""Quantized files in the arithmetic that they write: double precision between exact integers.

onnxruntime's own integer kernels saturate on CPUs without VNNI, and its fusions round elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = np.ndarray


def real(x: Array, scale: Array, zero: Array | None = None, axis: int = 1) -> Array:
    """Numbers that integers stand for; a vector of scales belongs to an axis."""
    s, z = np.float64(scale), np.int64(0 if zero is None else zero)
    return (x.astype(np.int64) - _along(z, x.ndim, axis)) * _along(s, x.ndim, axis)


def levels(y: Array, scale: Array, zero: Array | None = None, axis: int = 1) -> Array:
    """The nearest integers, ties to even."""
    zero = np.zeros((), np.uint8) if zero is None else np.asarray(zero)
    ends = np.iinfo(zero.dtype)
    steps = np.rint(np.float64(y) / _along(np.float64(scale), np.ndim(y), axis)) + _along(zero, np.ndim(y), axis)
    return np.clip(steps, ends.min, ends.max).astype(zero.dtype)


def _along(grid: Any, rank: int, axis: int) -> Any:
    grid = np.asarray(grid)
    if grid.size == 1:
        return grid.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return grid.reshape(shape)


def _matmul(a: Array, sa: Array, za: Array, b: Array, sb: Array, zb: Array, sy: Array, zy: Array) -> Array:
    return levels(real(a, sa, za, -2) @ real(b, sb, zb, -1), sy, zy)


def _gemm(
    a: Array, sa: Array, za: Array, b: Array, sb: Array, zb: Array, c: Any = None, sy: Any = None, zy: Any = None,
    alpha: float = 1.0, transA: int = 0, transB: int = 0,
) -> Array:  # fmt: skip
    left, right = real(a, sa, za), real(b, sb, zb, 0 if transB else 1)
    product = (left.T if transA else left) @ (right.T if transB else right)
    if c is not None:
        product = product + c * np.float64(sa) * np.float64(sb)
    product = product * alpha
    return product.astype(np.float32) if sy is None else levels(product, sy, zy)


def _conv(
    x: Array, sx: Array, zx: Array, w: Array, sw: Array, zw: Array, sy: Array, zy: Array, b: Any = None, **form: Any
) -> Array:
    import torch

    bias = None if b is None else torch.from_numpy(np.float64(b) * np.float64(sx) * np.float64(sw))
    pads = form.get("pads") or [0] * 4
    assert pads[:2] == pads[2:]
    result = torch.nn.functional.conv2d(
        torch.from_numpy(real(x, sx, zx)), torch.from_numpy(real(w, sw, zw, 0)), bias,
        form.get("strides") or 1, pads[:2], form.get("dilations") or 1, form.get("group") or 1,
    )  # fmt: skip
    return levels(result.numpy(), sy, zy)


def _of_two(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    return lambda a, sa, za, b, sb, zb, sy, zy: levels(function(real(a, sa, za), real(b, sb, zb)), sy, zy)


def _of_one(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, sx, zx, sy, zy, **form: levels(function(real(x, sx, zx), **form), sy, zy)


def _softmax(x: Array, axis: int = -1, opset: int = 13) -> Array:
    weights = np.exp(x - x.max(axis, keepdims=True))
    result: Array = weights / weights.sum(axis, keepdims=True)
    return result


def _concat(sy: Array, zy: Array, *parts: Array, axis: int) -> Array:
    return levels(np.concatenate([real(*parts[k : k + 3]) for k in range(0, len(parts), 3)], axis), sy, zy)


def _where(
    choice: Array, x: Array, sx: Array, zx: Array, y: Array, sy: Array, zy: Array, sz: Array, zz: Array
) -> Array:
    return levels(np.where(choice, real(x, sx, zx), real(y, sy, zy)), sz, zz)


def _integer_product(a: Array, b: Array, za: Any = None, zb: Any = None) -> Array:
    left, right = (x.astype(np.int64) - np.int64(0 if z is None else z) for x, z in ((a, za), (b, zb)))
    return (left @ right).astype(np.int32)


MICROSOFT: dict[str, Callable[..., Array]] = {
    "QGemm": _gemm,
    "QLinearAdd": _of_two(np.add),
    "QLinearMul": _of_two(np.multiply),
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "QLinearSoftmax": _of_one(_softmax),
    "QLinearSigmoid": _of_one(lambda x: 1 / (1 + np.exp(-x))),
    "QLinearLeakyRelu": _of_one(lambda x, alpha=0.01: np.where(x < 0, alpha * x, x)),
    "QLinearGlobalAveragePool": _of_one(lambda x, channels_last=0: x.mean((2, 3), keepdims=True)),
    "QuantizeLinear": lambda *given, axis=1, **rest: levels(*given, axis=axis),
    "DequantizeLinear": lambda *given, axis=1, **rest: real(*given, axis=axis).astype(np.float32),
}
STANDARD: dict[str, Callable[..., Array]] = {
    "MatMulInteger": _integer_product, "QLinearMatMul": _matmul, "QLinearConv": _conv,
    **{name: MICROSOFT[name] for name in ("QuantizeLinear", "DequantizeLinear")},
}  # fmt: skip


def _operator(domain: str, name: str, function: Callable[..., Array]) -> type[OpRun]:
    def run(self: OpRun, *inputs: Array, **form: Any) -> tuple[Array]:
        return (function(*inputs, **{key: value for key, value in form.items() if value is not None}),)

    return type(name, (OpRun,), {"op_domain": domain, "_run": run})


def as_written(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs of a model."""
    own = [
        _operator(domain, name, function)
        for domain, table in (("", STANDARD), ("com.microsoft", MICROSOFT))
        for name, function in table.items()
    ]
    results: list[Array] = ReferenceEvaluator(model, new_ops=own).run(None, dict(feeds))
    return results
