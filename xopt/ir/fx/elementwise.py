"""Ops that work element by element, with numpy broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

#: ONNX element types to torch's.
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}


def div(a: Tensor, b: Tensor) -> Tensor:
    """Quotient; of integers, truncated toward zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Power in the type of the base."""
    return torch.pow(base, exponent).to(base.dtype)


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the divisor, or of the dividend with ``fmod``."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """Limit to [min, max]; the gradient is that of the limits where they bind."""
    low = x if min is None else torch.maximum(x, torch.as_tensor(min, dtype=x.dtype, device=x.device))
    return low if max is None else torch.minimum(low, torch.as_tensor(max, dtype=x.dtype, device=x.device))


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to an ONNX element type."""
    return x.to(DTYPES[ir.DataType(to)])


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to the element type of ``like``."""
    return x.to(like.dtype)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x * Phi(x)``, or its tanh approximation."""
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Scaled exponential linear unit."""
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.minimum(x, torch.zeros_like(x))))


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """``clip(alpha * x + beta, 0, 1)``."""
    return (alpha * x + beta).clamp(0, 1)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """``x`` where positive, else ``slope * x`` (slope broadcast from the right)."""
    return torch.where(x >= 0, x, slope * x)


def round_even(x: Tensor) -> Tensor:
    """Nearest integer, halves to even."""
    return torch.round(x)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Whether elements are infinite, with the signs asked for."""
    return (torch.isposinf(x) & bool(detect_positive)) | (torch.isneginf(x) & bool(detect_negative))


def bit_shift(x: Tensor, count: Tensor, *, direction: str) -> Tensor:
    """Shift unsigned integers; in int64, which holds the types up to 32 bits."""
    wide, by = x.to(torch.int64), count.to(torch.int64)
    return (wide << by if direction == "LEFT" else wide >> by).to(x.dtype)


def variadic(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op of any number of operands from one of two."""

    def op(*operands: Tensor) -> Tensor:
        return functools.reduce(combine, operands)

    return op


def mean(*operands: Tensor) -> Tensor:
    """Mean of the operands."""
    return functools.reduce(torch.add, operands) / len(operands)


def dropout(x: Tensor, ratio: Any = None, training_mode: Any = None, *, seed: int = 0, outputs: int = 1) -> Any:
    """Identity: models are seen as they are deployed."""
    return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Move what is beyond ``lambd`` towards 0 by ``bias``, and make the rest 0."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


TABLE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": torch.add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitShift": bit_shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": torch.ceil,
    "Celu": lambda x, *, alpha=1.0: F.celu(x, alpha),
    "Clip": clip,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Div": div,
    "Dropout": dropout,
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": gelu,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsInf": is_inf,
    "IsNaN": torch.isnan,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": variadic(torch.maximum),
    "Mean": mean,
    "Min": variadic(torch.minimum),
    "Mish": F.mish,
    "Mod": mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": prelu,
    "Pow": power,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": round_even,
    "Selu": selu,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Shrink": shrink,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": variadic(torch.add),
    "Swish": swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ThresholdedRelu": lambda x, *, alpha=1.0: torch.where(x > alpha, x, torch.zeros_like(x)),
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
