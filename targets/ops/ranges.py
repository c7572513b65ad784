"""Range: of numbers that are known, or that sizes tell, as many elements as they say; of others as many as turn out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import tirx

from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.layout import FAR, ceil_quotient
from xopt.targets.ops.parameters import LARGEST, bounded
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def _range(call: Call) -> Value:
    bounds = _known(call)
    return _at_run_time(call) if bounds is None else _counted(call, bounds)


def _known(call: Call) -> list[Dim] | None:
    """Start, limit and step, if the length is one of ONNX's sizes: of integers a constant number apart."""
    arrays = [call.known(index) for index in range(3)]
    bounds = [array.reshape(-1)[0] for array in arrays if array is not None and array.size == 1]
    if len(bounds) < 3:
        return None
    numbers = [isinstance(bound, (int, float, np.number)) for bound in bounds]
    fractions = any(isinstance(bound, (float, np.floating)) and bound % 1 for bound in bounds)
    return bounds if all(numbers) or (not fractions and numbers[-1]) else None


def _counted(call: Call, bounds: Sequence[Dim]) -> Value:
    dtype = call.node.outputs[0].dtype
    name = "int64" if dtype is None else dtype.numpy().name
    start, limit, step = map(_whole, bounds)
    if step == 0:
        raise call.unsupported("its step is 0")
    if any(isinstance(x, float) for x in (start, limit, step)):
        count: Dim = max(math.ceil((limit - start) / step), 0)
    else:
        span = call.dims.simplify(limit - start if step > 0 else start - limit)
        count = ceil_quotient(call, span, abs(step))
    return call.lowering.compute(
        "range", [count], lambda i: tirx.Cast(name, start + i * step) if name != "int64" else start + i * step
    )


def _whole(number: Dim) -> Dim:
    """A float that is an integer as one: what is counted with it is exact."""
    return int(number) if isinstance(number, float) and number.is_integer() and abs(number) < FAR else number


def _at_run_time(call: Call) -> Value:
    tensors = [call.lowering.reshape(call.x(index), [1]) for index in range(3)]
    dtype = str(tensors[0].ty.dtype)
    zero = tirx.const(0, "int64")

    def length(start: Any, limit: Any, step: Any) -> Any:
        span, by = limit(zero) - start(zero), step(zero)
        if "float" in dtype:
            by = tirx.Select(by == 0, tirx.const(1, dtype), by)
            return tirx.ceil(span.astype("float64") / by.astype("float64")).astype("int64")
        by = tirx.Select(by == 0, tirx.const(1, dtype), by)
        return -tirx.floordiv(-span, by).astype("int64")

    def wrong(*arguments: Any) -> Any:
        *scalars, _ = arguments
        return tirx.Or(scalars[2](zero) == 0, length(*scalars) > LARGEST).astype("int64")

    count = call.lowering.compute("outside", [1], wrong, *tensors)
    call.lowering.outside.append((count, f"{call.lowering.node}: its step is 0, or its result would be too large"))
    sizes = call.lowering.compute("sizes", [1], lambda a, b, c, i: bounded([length(a, b, c)])[0], *tensors)
    dims = call.lowering.decide(sizes, 1)
    return call.lowering.compute(
        "range", dims, lambda start, step, i: start(zero) + i.astype(dtype) * step(zero), tensors[0], tensors[2]
    )


OPS: dict[str, Emitter] = {"Range": _range}
"""Emitters by operator type."""
