"""Numbers that shape arithmetic computes, as polynomials."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import input_at
from xopt.ir.poly import ONE, ZERO, Poly, product
from xopt.ir.schema import op_of
from xopt.ir.shape_rules import (
    Known,
    Numbers,
    axes_of,
    integer,
    permutation,
    python_slice,
    shape_numbers,
)

LARGEST = 64
"""Elements beyond which an integer tensor is not followed."""
WIDE = frozenset(ir.DataType[name] for name in ("INT32", "INT64", "UINT32", "UINT64", "FLOAT", "DOUBLE"))
"""Types that hold the size of any axis (in float32, up to 16 million)."""


def _pass_on(s: Known, node: ir.Node) -> Numbers | None:
    dims = s.dims(node.outputs[0])
    return s.numbers(node.inputs[0]) if dims is not None and len(dims) <= 1 else None


def _reshaped_numbers(s: Known, node: ir.Node) -> Numbers | None:
    """Also of a vector that was a matrix on the way: exporters turn the order of pads by that."""
    if s.rank(node.outputs[0]) != 1 or s.rank(node.inputs[0]) in (0, 1):
        return _pass_on(s, node)
    matrix = _matrix(s, node.inputs[0])
    return None if matrix is None else tuple(matrix.reshape(-1))


def _matrix(s: Known, value: ir.Value | None, nodes: int = 4) -> np.ndarray | None:
    """The numbers of a vector that was reshaped, turned and cut."""
    numbers, node = s.numbers(value), value.producer() if value is not None else None
    if numbers is not None:
        return np.array(numbers, object)
    if node is None or not nodes or op_of(node) not in ("Reshape", "Transpose", "Slice"):
        return None
    before, sizes = _matrix(s, node.inputs[0], nodes - 1), [dim.constant for dim in s.dims(value) or ()]
    if before is None:
        return None
    if op_of(node) == "Transpose":
        return before.transpose(permutation(node, before.ndim))
    if op_of(node) == "Reshape":
        return before.reshape([size for size in sizes if size is not None]) if None not in sizes else None
    starts, ends, axes, steps = (s.integers(input_at(node, place)) for place in range(1, 5))
    if starts is None or ends is None:
        return None
    for axis, start, end, by in zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts)):
        kept = python_slice(start, end, by, before.shape[axis])
        before = before.take(range(before.shape[axis])[kept], axis)
    return before


def _cast_numbers(s: Known, node: ir.Node) -> Numbers | None:
    """Sizes fit every type that is wide enough for them; a bool, or a narrow integer, holds only few numbers."""
    numbers, target = s.numbers(node.inputs[0]), ir.DataType(int(node.attributes["to"].as_int()))
    if numbers is None or target in WIDE:
        return numbers
    if target == ir.DataType.BOOL:
        known = [ONE if n.at_least(1, 1) else ZERO if n.constant == 0 else None for n in numbers]
        return None if None in known else tuple(known)  # type: ignore[arg-type]
    exact = target.is_integer() and all(n.constant in range(1 << (target.bitwidth - 1)) for n in numbers)
    return numbers if exact else None


def _quotient(s: Known, node: ir.Node) -> Numbers | None:
    """Integers are divided with a rest; other numbers only where none is left."""
    return _binary(_exact if any(_is_float(value) for value in node.inputs) else _whole)(s, node)


def _is_float(value: ir.Value | None) -> bool:
    """Numbers that are followed are integers, until a Cast makes floats of them."""
    dtype, node = (value.dtype, value.producer()) if value is not None else (None, None)
    if dtype is None and node is not None and op_of(node) == "Cast":
        dtype = ir.DataType(int(node.attributes["to"].as_int()))
    return dtype is not None and dtype.is_floating_point()


def _exact(a: Poly, b: Poly) -> Poly | None:
    return a.exactly(b)


def _whole(a: Poly, b: Poly) -> Poly | None:
    return None if (a.constant or 0) < 0 or (b.constant or 0) < 0 or b.constant == 0 else a // b


def _rest(a: Poly, b: Poly) -> Poly | None:
    """Of natural numbers, where Mod and fmod agree; it may be 0, so its name begins like those of any sign."""
    if not a.at_least(0) or not b.at_least(1, 1):
        return None
    known = a.constant is not None and b.constant is not None
    return Poly.of(a.constant % b.constant if known else f"!mod({a},{b})")  # type: ignore[operator]


def _rounded_down(s: Known, node: ir.Node) -> Numbers | None:
    """``Floor``, which makes of a quotient what an integer division gives."""
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    return _binary(_whole)(s, inner) if op_of(inner) == "Div" and inner is not None else _pass_on(s, node)


def _gather_numbers(s: Known, node: ir.Node) -> Numbers | None:
    data, index = s.numbers(node.inputs[0]), s.integers(node.inputs[1])
    if data is None or index is None or s.rank(node.inputs[0]) != 1:
        return None
    return tuple(data[i] for i in index) if all(-len(data) <= i < len(data) for i in index) else None


def _slice_numbers(s: Known, node: ir.Node) -> Numbers | None:
    data, starts, ends = (s.numbers(node.inputs[0]), s.integers(input_at(node, 1)), s.integers(input_at(node, 2)))
    steps = [1] if input_at(node, 4) is None else s.integers(input_at(node, 4))
    if data is None or starts is None or ends is None or steps is None:
        return None
    return data[python_slice(starts[0], ends[0], steps[0], len(data))]


def _concat_numbers(s: Known, node: ir.Node) -> Numbers | None:
    parts = [s.numbers(value) for value in node.inputs]
    if any(part is None for part in parts) or any(s.rank(value) != 1 for value in node.inputs):
        return None
    return tuple(number for part in parts for number in part)  # type: ignore[union-attr]


def _binary(operation: Callable[[Poly, Poly], Poly | None]) -> Callable[[Known, ir.Node], Numbers | None]:
    def evaluate(s: Known, node: ir.Node) -> Numbers | None:
        a, b = s.numbers(node.inputs[0]), s.numbers(node.inputs[1])
        if a is None or b is None:
            return None
        size = max(len(a), len(b))
        pairs = zip(a * size if len(a) == 1 else a, b * size if len(b) == 1 else b)
        found = [operation(x, y) for x, y in list(pairs)[:size]]
        return None if None in found else tuple(found)  # type: ignore[arg-type]

    return evaluate


def _equal(a: Poly, b: Poly) -> Poly | None:
    if a == b:
        return ONE
    difference = a - b
    apart = difference.constant is not None or difference.at_least(1, 1) or (b - a).at_least(1, 1)
    return Poly.of(0) if apart else None


def _where_numbers(s: Known, node: ir.Node) -> Numbers | None:
    condition, a, b = (s.numbers(value) for value in node.inputs)
    if condition is None or a is None or b is None:
        return None
    size = max(len(condition), len(a), len(b))
    columns = [x * size if len(x) == 1 else x for x in (condition, a, b)]
    chosen = [x if c.constant else y for c, x, y in zip(*columns) if c.constant is not None]
    return tuple(chosen) if len(chosen) == size else None


def _filled(s: Known, node: ir.Node) -> Numbers | None:
    shape = s.integers(node.inputs[0])
    attr = node.attributes.get("value")
    value = attr.as_tensor().numpy() if attr is not None else np.zeros(1, np.float32)
    if shape is None or len(shape) > 1 or math.prod(shape) > LARGEST or value.dtype.kind not in "iub":
        return None
    return (Poly.of(int(value.reshape(-1)[0])),) * math.prod(shape)


def _reduce_prod(s: Known, node: ir.Node) -> Numbers | None:
    numbers = s.numbers(node.inputs[0])
    if numbers is None or (not axes_of(s, node) and integer(node, "noop_with_empty_axes", 0)):
        return numbers
    return (product(numbers),)


def _size(s: Known, node: ir.Node) -> Numbers | None:
    dims = s.dims(node.inputs[0])
    return None if dims is None else (product(dims),)


def _extreme(name: str) -> Callable[[Poly, Poly], Poly | None]:
    def choose(a: Poly, b: Poly) -> Poly | None:
        if (a - b).at_least(0, 1):
            return a if name == "max" else b
        if (b - a).at_least(0, 1):
            return b if name == "max" else a
        return Poly.of(f"{name}({','.join(sorted((str(a), str(b))))})")

    return choose


def _expand_numbers(s: Known, node: ir.Node) -> Numbers | None:
    data, shape = s.numbers(node.inputs[0]), s.integers(node.inputs[1])
    if data is None or len(data) != 1 or shape is None or len(shape) != 1 or not 0 <= shape[0] <= LARGEST:
        return None
    return data * shape[0]


NUMBER_RULES: dict[str, Callable[[Known, ir.Node], Numbers | None]] = {
    "Shape": shape_numbers,
    "Size": _size,
    "Gather": _gather_numbers,
    "Slice": _slice_numbers,
    "Concat": _concat_numbers,
    "ConstantOfShape": _filled,
    "Expand": _expand_numbers,
    "Where": _where_numbers,
    "ReduceProd": _reduce_prod,
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _quotient,
    "Mod": _binary(_rest),
    "Floor": _rounded_down,
    "Cast": _cast_numbers,
    "Equal": _binary(_equal),
    "Min": _binary(_extreme("min")),
    "Max": _binary(_extreme("max")),
    **dict.fromkeys(("Identity", "Squeeze", "Unsqueeze"), _pass_on),
    "Reshape": _reshaped_numbers,
}
