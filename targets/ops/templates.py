"""Calls of our kernel templates; each returns None where the target has none or the node does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xopt.targets.ops.call import Call
from xopt.targets.ops.fusion import static

if TYPE_CHECKING:
    from xopt.targets.lowering import Value


def _norm(call: Call) -> Value | None:
    from xopt.kernels import norm

    isa = call.lowering.target.isa()
    shape = call.shape()
    constants = [call.const(index) for index in range(1, 3) if call.has(index)]
    if isa is None or call.axis(-1, len(shape)) != len(shape) - 1 or str(call.x().ty.dtype) != "float32":
        return None
    if not isinstance(shape[-1], int) or any(c is None or c.shape != (shape[-1],) for c in constants):
        return None
    workload = norm.Workload(
        rows=static(shape[:-1]),
        width=shape[-1],
        epsilon=float(call.attr("epsilon", 1e-5)),
        rms=call.node.op_type == "RMSNormalization",
        bias=call.has(2),
    )
    config = norm.heuristic(workload, isa)
    vectors = [
        call.lowering.packed(call.input(index), ("vector", isa.lanes), lambda v: norm.pack_vector(v, isa))
        for index in range(1, 3)
        if call.has(index)
    ]
    name = norm.name(workload, config, isa)
    return call.lowering.call(name, lambda: norm.build(workload, config, isa), [call.x(), *vectors], shape)


KERNELS: dict[tuple[str, str], Callable[[Call], Value | None]] = {
    ("", "LayerNormalization"): _norm,
    ("", "RMSNormalization"): _norm,
}
"""Emitters by (domain, operator type)."""
