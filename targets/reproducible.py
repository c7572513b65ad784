"""The same model gives the same library, byte for byte.

The compiler writes the sizes of dynamic tensors in the order of a hash table that is keyed by addresses, which differ
from process to process: H[5] = 17408 * H[0]; H[4] = ... Such stores do not read each other, so they can be sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import tirx


def in_order(module: tvm.IRModule) -> tvm.IRModule:
    """The module with the stores of each function that computes sizes sorted by what they write."""
    result = tvm.IRModule(module.functions, attrs=module.attrs)
    for variable, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and _independent(function):
            result[variable] = function.with_body(tirx.SeqStmt(sorted(function.body.seq, key=_place)))
    return result


def _independent(function: tirx.PrimFunc) -> bool:
    """Whether a function does nothing but store to places of one buffer that no other of its stores reads."""
    stores = list(function.body.seq) if isinstance(function.body, tirx.SeqStmt) else []
    if not stores or not all(isinstance(store, tirx.BufferStore) and _fixed(store) for store in stores):
        return False
    written = [_place(store) for store in stores]
    read = [load for store in stores for load in _loads(store.value)]
    one_buffer = all(store.buffer.same_as(stores[0].buffer) for store in stores)
    apart = all(_fixed(load) and _place(load) not in written for load in read)
    return one_buffer and apart and len(set(written)) == len(written)


def _loads(part: Any) -> Iterator[Any]:
    """All that an expression reads from buffers."""
    if isinstance(part, tvm.ir.TensorLoad):
        yield part
    for name in ("a", "b", "value", "condition", "true_value", "false_value"):
        if (operand := getattr(part, name, None)) is not None and isinstance(operand, tvm.ir.Expr):
            yield from _loads(operand)
    for operand in getattr(part, "args", ()):
        yield from _loads(operand)


def _fixed(access: Any) -> bool:
    return len(access.indices) == 1 and isinstance(access.indices[0], tirx.IntImm)


def _place(access: Any) -> int:
    return int(access.indices[0].value)
