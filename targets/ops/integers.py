"""Arithmetic of integers by ONNX's rules, and remainders, where the processor's own differ or would end the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import relax, tirx

from xopt.targets.ops.bounds import refuse_rows
from xopt.targets.ops.call import Call

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


LARGEST_EXPONENT = 63
"""Of integers: whatever is raised higher has left every type, but for 0 and 1."""


def is_integer(tensor: relax.Expr) -> bool:
    """Whether a tensor holds integers."""
    return "int" in str(tensor.ty.dtype)


def quotient(call: Call) -> Value:
    """Div of integers: towards zero."""
    return _divided(call, "integer_quotient", tirx.truncdiv, lambda x: x * -1)


def _divided(
    call: Call, name: str, function: Callable[[Any, Any], Any], by_minus_one: Callable[[Any], Any]
) -> relax.Var:
    """A quotient or remainder of integers, where the processor would end the process: by 0, and the least by -1."""
    known, dtype = call.const(1), str(call.x(1).ty.dtype)
    signed, zero, one = not dtype.startswith("u"), tirx.const(0, dtype), tirx.const(1, dtype)
    if known is not None and (known == 0).any():
        raise call.unsupported("it divides integers by 0")
    if known is not None and not (signed and (known == -1).any()):
        return paired(call, name, lambda x, y: function(x, y).astype(dtype))
    if known is None:
        refuse_rows(call, 1, 1, lambda row: tirx.EQ(row[0], zero), "it divides integers by 0")

    def divide(x: Any, y: Any) -> Any:
        if not signed:
            return function(x, tirx.Select(tirx.EQ(y, zero), one, y)).astype(dtype)
        minus = tirx.EQ(y, tirx.const(-1, dtype))
        safe = function(x, tirx.Select(tirx.Or(tirx.EQ(y, zero), minus), one, y))  # narrow ones come back as int32
        return tirx.Select(minus, by_minus_one(x).astype(dtype), safe.astype(dtype))

    return paired(call, name, divide)


def paired(call: Call, name: str, function: Callable[[Any, Any], Any]) -> relax.Var:
    """``function`` of the elements of both inputs, which broadcast."""
    a, b = call.aligned(call.x(0), call.x(1))
    shape = call.dims.broadcast(call.lowering.shape_of(a), call.lowering.shape_of(b))
    a, b = (call.emit(relax.op.broadcast_to(x, shape)) for x in (a, b))
    return call.lowering.compute(name, shape, lambda x, y, *i: function(x(*i), y(*i)), a, b)


def remainder(call: Call) -> Value:
    """Mod: of integers, and of floats, with the sign of the divisor, or with ``fmod`` of what is divided."""
    truncated = bool(call.attr("fmod", 0))
    if is_integer(call.x()):
        return _divided(call, "remainder", tirx.truncmod if truncated else tirx.floormod, lambda x: x * 0)
    function = {"float32": "fmodf", "float64": "fmod"}.get(dtype := str(call.x().ty.dtype))
    if function is None:
        raise call.unsupported(f"remainders of {dtype}")
    zero = tirx.const(0.0, dtype)

    def floored(x: Any, y: Any) -> Any:
        rest = tirx.call_pure_extern(dtype, function, x, y)
        signed_zero = tirx.Select(y < zero, tirx.const(-0.0, dtype), zero)
        other = tirx.Select(rest < zero, tirx.Select(y < zero, rest, rest + y), tirx.Select(y < zero, rest + y, rest))
        return tirx.Select(tirx.EQ(rest, zero), signed_zero, other)

    if truncated:
        return paired(call, "remainder", lambda x, y: tirx.call_pure_extern(dtype, function, x, y))
    return paired(call, "remainder", floored)


def shift(call: Call) -> Value:
    """BitShift: to the right signs come in from the left; by more than there are bits, or less than 0, all are lost."""
    right, dtype = str(call.attr("direction")) == "RIGHT", str(call.x().ty.dtype)
    signed, bits = not dtype.startswith("u"), int("".join(c for c in dtype if c.isdigit()))
    zero = tirx.const(0, dtype)

    def moved(x: Any, by: Any) -> Any:
        all_lost = by >= tirx.const(bits, dtype)
        if signed:
            all_lost = tirx.Or(all_lost, by < zero)
        inside = tirx.Select(all_lost, zero, by)
        if right:
            gone = tirx.Select(x < zero, tirx.const(-1, dtype), zero) if signed else zero
            return tirx.Select(all_lost, gone, (x >> inside).astype(dtype))
        return tirx.Select(all_lost, zero, (x << inside).astype(dtype))

    return paired(call, "shift", moved)


def power(call: Call) -> Value:
    """Pow of integers, wrapping around as they do: by squaring; with exponents that are floats by way of double."""
    base, exponent = str(call.x(0).ty.dtype), str(call.x(1).ty.dtype)
    if "float" in exponent:
        return paired(call, "power", lambda x, y: tirx.pow(x.astype("float64"), y.astype("float64")).astype(base))
    one, zero = tirx.const(1, base), tirx.const(0, base)
    known = call.const(1)
    if known is None:
        refuse_rows(call, 1, 1, lambda row: row[0] > LARGEST_EXPONENT, f"an exponent is over {LARGEST_EXPONENT}")
    elif (known > LARGEST_EXPONENT).any():
        raise call.unsupported(f"an exponent is over {LARGEST_EXPONENT}")
    most = LARGEST_EXPONENT if known is None or not known.size else max(int(known.max()), 1)

    def squared(x: Any, y: Any) -> Any:
        result, square = one, x
        rest = y.astype("int64")
        for place in range(most.bit_length()):
            taken = ((rest >> place) & tirx.const(1, "int64")) == 1
            result = tirx.Select(taken, (result * square).astype(base), result)
            square = (square * square).astype(base)
        if known is not None and not (known < 0).any():
            return result
        odd = (rest & tirx.const(1, "int64")) == 1
        inverse = tirx.Select(x == 1, one, zero)
        if not base.startswith("u"):
            minus = tirx.const(-1, base)
            inverse = tirx.Select(tirx.EQ(x, minus), tirx.Select(odd, minus, one), inverse)
        return tirx.Select(rest < 0, inverse, result)

    return paired(call, "power", squared)
