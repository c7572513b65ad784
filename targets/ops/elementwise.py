"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx

from xopt.targets.ops import integers
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.integers import is_integer

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def scalar(value: float, like: relax.Expr) -> relax.Expr:
    """A constant of the type of ``like``."""
    return relax.const(value, str(like.ty.dtype))


def _unary(function: Callable[[relax.Expr], relax.Expr]) -> Emitter:
    return lambda call: call.emit(function(call.x()))


def _binary(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Emitter:
    """Two operands or, for Min, Max, Sum and Mean, any number of them."""

    def emit(call: Call) -> Value:
        def step(a: relax.Expr, b: relax.Expr) -> relax.Expr:
            return call.emit(function(*call.aligned(a, b)))

        return reduce(step, call.xs())

    return emit


def _extreme(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Emitter:
    """Minimum or maximum of any number of operands; NaN when one of them is."""

    def emit(call: Call) -> Value:
        def step(a: relax.Expr, b: relax.Expr) -> relax.Expr:
            a, b = call.aligned(a, b)
            found = function(a, b)  # b where a comparison fails, as it does with NaN
            if is_integer(a) or isinstance(a, tvm.ir.GenericConst):
                return call.emit(found)
            return call.emit(relax.op.where(relax.op.isnan(a), a, found))

        return reduce(step, sorted(call.xs(), key=lambda x: not isinstance(x, tvm.ir.GenericConst)))

    return emit


def _equal(call: Call) -> Value:
    x = call.x()
    if str(x.ty.dtype) == "bool":  # LLVM compares booleans as floats, which fails on a constant one
        return _binary(lambda a, b: relax.op.equal(*(relax.op.astype(one, "int8") for one in (a, b))))(call)
    if call.input(0) is call.input(1) and not is_integer(x):
        return _negated(call, call.emit(relax.op.isnan(x)))  # TVM takes everything for equal to itself
    return _binary(relax.op.equal)(call)


def _divide(a: relax.Expr, b: relax.Expr) -> relax.Expr:
    return relax.op.divide(a, b)


def _division(call: Call) -> Value:
    return integers.quotient(call) if is_integer(call.x()) else _binary(_divide)(call)


def _power(call: Call) -> Value:
    exponent = call.const(1)
    base = call.x()
    if is_integer(base):
        return integers.power(call)
    if exponent is not None and exponent.size == 1 and exponent.ndim <= len(call.shape()):
        return call.emit(_constant_power(base, float(exponent.reshape(-1)[0])))
    return _binary(lambda a, b: relax.op.power(a, b if a.ty.dtype == b.ty.dtype else relax.op.astype(b, a.ty.dtype)))(
        call
    )


def _constant_power(base: relax.Expr, exponent: float) -> relax.Expr:
    if exponent == 2.0:
        return relax.op.multiply(base, base)
    if exponent == 0.5:
        return relax.op.sqrt(base)
    if exponent == -0.5:
        return relax.op.divide(scalar(1.0, base), relax.op.sqrt(base))
    if exponent == 3.0:
        return relax.op.multiply(base, relax.op.multiply(base, base))
    return relax.op.power(base, scalar(exponent, base))


def _mean(call: Call) -> Value:
    total = _binary(relax.op.add)(call)
    assert isinstance(total, relax.Expr)
    return call.emit(relax.op.divide(total, scalar(float(len(call.node.inputs)), total)))


def _where(call: Call) -> Value:
    condition, x, y = call.aligned(call.x(0), call.x(1), call.x(2))
    return call.emit(relax.op.where(condition, x, y))


def _gelu(call: Call) -> Value:
    tanh = call.attr("approximate", "none") == "tanh"
    return call.emit((relax.op.nn.gelu_tanh if tanh else relax.op.nn.gelu)(call.x()))


def _swish(call: Call) -> Value:
    x, alpha = call.x(), float(call.attr("alpha", 1.0))
    scaled = x if alpha == 1.0 else relax.op.multiply(x, scalar(alpha, x))
    return call.emit(relax.op.multiply(x, relax.op.sigmoid(scaled)))


def _clip(call: Call) -> Value:
    x = call.x()
    for index, function in ((1, relax.op.maximum), (2, relax.op.minimum)):
        if call.has(index):
            x = call.emit(function(call.x(index), x))  # of a comparison with NaN the second operand is taken
    return x


def _cast(call: Call) -> Value:
    import onnx_ir as ir

    x = call.x()
    call.pass_over("saturate", "round_mode")
    if call.node.op_type == "CastLike":
        dtype = str(call.x(1).ty.dtype)
    else:
        dtype = ir.DataType(call.attr("to")).numpy().name
    source = str(x.ty.dtype)
    if source == dtype:
        return x
    if dtype == "bool":
        return _negated(call, call.emit(relax.op.equal(x, scalar(0, x))))
    return call.emit(relax.op.astype(x, dtype))


def _not(call: Call) -> Value:
    return _negated(call, call.x())


def _negated(call: Call, x: relax.Expr) -> relax.Expr:
    """What is not true, as arithmetic: TVM makes of ``not a < b`` the opposite comparison, which NaN fails as well."""
    shape, one = call.lowering.shape_of(x), tirx.const(1, "int8")
    return call.lowering.compute("not", shape, lambda x, *i: (one - x(*i).astype("int8")).astype("bool"), x)


def _sign(x: relax.Expr) -> relax.Expr:
    return (
        relax.op.sign(x) if "float" not in str(x.ty.dtype) else relax.op.where(relax.op.isnan(x), x, relax.op.sign(x))
    )


def _celu(call: Call) -> Value:
    x, alpha = call.x(), scalar(float(call.attr("alpha", 1.0)), call.x())
    zero = scalar(0.0, x)
    below = op.multiply(alpha, op.subtract(op.exp(op.divide(op.minimum(zero, x), alpha)), scalar(1.0, x)))
    return call.emit(op.add(op.maximum(zero, x), below))


def _constant(call: Call) -> Value:
    """A constant that is an output of the model."""
    value = call.node.outputs[0].const_value
    call.pass_over(*call.node.attributes)
    if value is None:
        raise call.unsupported("its value is no tensor")
    return value.numpy()


def _is_infinite(call: Call) -> Value:
    x = call.x()
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    if positive and negative:
        return call.emit(relax.op.isinf(x))
    return call.emit(relax.op.equal(x, scalar(np.inf if positive else -np.inf, x)))


def _bit_cast(call: Call) -> Value:
    """The same bits as another type of as many."""
    kind, x = ir.DataType(int(call.attr("to"))), call.x()
    dtype, source = kind.numpy().name, str(x.ty.dtype)
    if "bool" in (dtype, source):  # stored as a byte of 0 or 1
        return call.emit(relax.op.astype(x, dtype))
    return call.lowering.compute("bits", call.shape(), lambda t, *i: tirx.reinterpret(dtype, t(*i)), x)


def _reciprocal(x: relax.Expr) -> relax.Expr:
    return relax.op.divide(scalar(1.0, x), x)


def _identity(call: Call) -> Value:
    return call.lowering.value(call.input(0))


def _dropout(call: Call) -> Value:
    """What a trained model does with it: nothing."""
    training = call.const(2)
    if call.has(2) and (training is None or training.any()):
        raise call.unsupported("it drops elements at random")
    call.pass_over(1, "seed")
    return _identity(call)


op = relax.op
OPS: dict[str, Emitter] = {
    "Abs": _unary(op.abs), "Neg": _unary(op.negative), "Exp": _unary(op.exp), "Log": _unary(op.log),
    "Sqrt": _unary(op.sqrt), "Erf": _unary(op.erf), "Tanh": _unary(op.tanh), "Sigmoid": _unary(op.sigmoid),
    "Relu": _unary(lambda x: op.maximum(scalar(0, x), x)), "Floor": _unary(op.floor),
    "Ceil": _unary(op.ceil), "Round": _unary(op.round),
    "Not": _not, "IsNaN": _unary(op.isnan), "IsInf": _is_infinite, "Sin": _unary(op.sin),
    "Cos": _unary(op.cos), "Sign": _unary(_sign), "Reciprocal": _unary(_reciprocal),
    "Gelu": _gelu, "Swish": _swish, "Clip": _clip, "Cast": _cast, "CastLike": _cast,
    "Identity": _identity, "Dropout": _dropout, "Celu": _celu, "Constant": _constant,
    "Add": _binary(op.add), "Sub": _binary(op.subtract), "Mul": _binary(op.multiply), "Div": _division,
    "Pow": _power, "Mod": integers.remainder, "BitShift": integers.shift,
    "Min": _extreme(op.minimum), "Max": _extreme(op.maximum),
    "Sum": _binary(op.add), "Mean": _mean, "And": _binary(op.logical_and), "Or": _binary(op.logical_or),
    "Xor": _binary(op.logical_xor), "BitCast": _bit_cast, "Equal": _equal, "Less": _binary(op.less),
    "LessOrEqual": _binary(op.less_equal), "Greater": _binary(op.greater),
    "GreaterOrEqual": _binary(op.greater_equal), "Where": _where,
}  # fmt: skip
"""Emitters by operator type."""
