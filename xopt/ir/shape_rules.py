"""Dimensions of what each operator computes, as polynomials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np
import onnx_ir as ir

from xopt.ir.edit import constant, input_at
from xopt.ir.poly import ONE, Poly, product

Dims = tuple[Poly, ...]
Shapes = Sequence[Dims | None] | None
Numbers = tuple[Poly, ...]


class Known(Protocol):
    """What is known about values: ``symbolic.Symbols``."""

    def dims(self, value: ir.Value | None) -> Dims | None: ...

    def rank(self, value: ir.Value | None) -> int | None: ...

    def numbers(self, value: ir.Value | None) -> Numbers | None: ...

    def integers(self, value: ir.Value | None) -> list[int] | None: ...


def axes_of(s: Known, node: ir.Node) -> list[int] | None:
    """Axes of Squeeze, Unsqueeze, Slice or a reduction, as attribute or input; None when not written.

    Raises:
        ValueError: only the data tells which.
    """
    attr = node.attributes.get("axes")
    if attr is not None:
        return list(attr.as_ints())
    return written(s, node, 3 if node.op_type == "Slice" else 1)


def written(s: Known, node: ir.Node, position: int) -> list[int] | None:
    """The integers of an optional input; None when it is not given. Raises ValueError when they are not known."""
    given = input_at(node, position)
    found = s.integers(given)
    if given is not None and found is None:
        raise ValueError(f"input {position} depends on the data")
    return found


def integer(node: ir.Node, name: str, default: int) -> int:
    """Integer attribute of a node."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def broadcast(*shapes: Dims) -> Dims:
    """Dimensions of an elementwise result."""
    rank = max(len(dims) for dims in shapes)
    columns = zip(*[(ONE,) * (rank - len(dims)) + dims for dims in shapes])
    return tuple(_common(column) for column in columns)


def _common(sizes: Sequence[Poly]) -> Poly:
    """The size that is not 1, of those that may be."""
    return reduce(_wider, dict.fromkeys(sizes), ONE)


def _wider(a: Poly, b: Poly) -> Poly:
    """What two sizes that broadcast give: the one that is surely it, else their maximum."""
    if ONE in (a, b):
        return a if b == ONE else b
    for size, other in ((a, b), (b, a)):
        if _covers(size, other):
            return size
    if a.constant is not None or b.constant is not None:
        return a if a.constant is not None else b
    return Poly.of(f"max({','.join(sorted({*operands(a, 'max'), *operands(b, 'max')}))})")


def _covers(size: Poly, other: Poly) -> bool:
    """Whether two sizes that broadcast, so that they are equal or one of them is 1, surely give the first."""
    if size.exactly(other) is not None or (size - other).at_least(1, 1) or str(other).startswith(f"floor(({size})/("):
        return True
    return str(size) in operands(other, "min") or set(operands(other, "max")) <= set(operands(size, "max"))


def operands(size: Poly, operation: str) -> list[str]:
    """What a size is the minimum or maximum of, as text; of nothing but itself when it is none."""
    text = str(size)
    if not size.is_symbol or not text.startswith(f"{operation}("):
        return [text]
    parts, depth = [""], 0
    for letter in text[len(operation) + 1 : -1]:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


# Shapes: (symbols, node) -> dimensions of each output, or None.


def _same(s: Known, node: ir.Node) -> Shapes:
    return [s.dims(node.inputs[0])] * len(node.outputs)


def _elementwise(s: Known, node: ir.Node) -> Shapes:
    shapes = [s.dims(value) for value in node.inputs if value is not None]
    return None if None in shapes else [broadcast(*shapes)]  # type: ignore[arg-type]


def _matmul(s: Known, node: ir.Node) -> Shapes:
    a, b = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return [(*broadcast(a[:-2] or (ONE,), b[:-2] or (ONE,))[: max(len(a), len(b)) - 2], a[-2], b[-1])]


def _gemm(s: Known, node: ir.Node) -> Shapes:
    a, b = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if a is None or b is None:
        return None
    return [(a[1] if integer(node, "transA", 0) else a[0], b[0] if integer(node, "transB", 0) else b[1])]


def _transpose(s: Known, node: ir.Node) -> Shapes:
    dims = s.dims(node.inputs[0])
    return None if dims is None else [tuple(dims[axis] for axis in permutation(node, len(dims)))]


def permutation(node: ir.Node, rank: int) -> list[int]:
    """Axes order of a Transpose."""
    attr = node.attributes.get("perm")
    return list(attr.as_ints()) if attr is not None else list(range(rank))[::-1]


def _reshape(s: Known, node: ir.Node) -> Shapes:
    dims, target = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    if target is None:
        return None
    if dims is None:
        return None if any(t.constant in (0, -1) for t in target) else [target]
    keep = integer(node, "allowzero", 0) == 0
    result = [dims[i] if keep and t.constant == 0 and i < len(dims) else t for i, t in enumerate(target)]
    if any(t.constant == -1 for t in result):
        rest = product(t for t in result if t.constant != -1)
        total = product(dims)
        result = [_quotient(total, rest) if t.constant == -1 else t for t in result]
    return [tuple(result)]


def _quotient(total: Poly, rest: Poly) -> Poly:
    """The size that -1 stands for: an exact quotient, also where the divisor has several terms in common factors."""
    return total.exactly(rest) or Poly.of(f"floor(({total})/({rest}))")


def _squeeze(s: Known, node: ir.Node) -> Shapes:
    dims, axes = s.dims(node.inputs[0]), axes_of(s, node)
    if dims is None or (axes is None and any(d.constant is None for d in dims)):
        return None  # without axes every dimension goes that is 1 when the model runs
    gone = {axis % len(dims) for axis in axes} if axes is not None else {i for i, d in enumerate(dims) if d == ONE}
    return [tuple(dim for i, dim in enumerate(dims) if i not in gone)]


def _unsqueeze(s: Known, node: ir.Node) -> Shapes:
    dims, axes = s.dims(node.inputs[0]), axes_of(s, node)
    if dims is None or axes is None:
        return None
    new, rest = {axis % (len(dims) + len(axes)) for axis in axes}, iter(dims)
    return [tuple(ONE if i in new else next(rest) for i in range(len(dims) + len(axes)))]


def _gather(s: Known, node: ir.Node) -> Shapes:
    data, index = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if data is None or index is None or not data:
        return None
    axis = integer(node, "axis", 0) % len(data)
    return [data[:axis] + index + data[axis + 1 :]]


def _gather_nd(s: Known, node: ir.Node) -> Shapes:
    data, index = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    depth = index[-1].constant if index else None
    if data is None or index is None or depth is None:
        return None
    return [index[:-1] + data[integer(node, "batch_dims", 0) + depth :]]


def _concat(s: Known, node: ir.Node) -> Shapes:
    shapes = [s.dims(value) for value in node.inputs]
    if any(dims is None for dims in shapes) or not shapes[0]:
        return None
    axis = integer(node, "axis", 0) % len(shapes[0])
    total = Poly.of(0)
    for dims in shapes:
        total = total + dims[axis]  # type: ignore[index]
    others = broadcast(*[(*dims[:axis], ONE, *dims[axis + 1 :]) for dims in shapes])  # type: ignore[index]
    return [(*others[:axis], total, *others[axis + 1 :])]


def _split(s: Known, node: ir.Node) -> Shapes:
    dims = s.dims(node.inputs[0])
    if dims is None:
        return None
    axis = integer(node, "axis", 0) % len(dims)
    sizes = split_sizes(s, node, dims[axis])
    return [(*dims[:axis], size, *dims[axis + 1 :]) for size in sizes]


def split_sizes(s: Known, node: ir.Node, total: Poly) -> list[Poly]:
    """Sizes of the parts of a Split of an axis of ``total`` elements."""
    attr = node.attributes.get("split")
    written = [Poly.of(x) for x in attr.as_ints()] if attr is not None else s.numbers(input_at(node, 1))
    if written is not None:
        return list(written)
    count = len(node.outputs)
    if total.constant is None:
        return [total.exactly(count) or Poly.unknown()] * count
    return [Poly.of(size) for size in equal_parts(total.constant, count)]


def equal_parts(total: int, count: int) -> list[int]:
    """Sizes of the parts of a Split that names none: equal, but for the last; negative where there are too many."""
    part = -(-total // count)
    return [min(part, total - part * index) for index in range(count)]


def _slice(s: Known, node: ir.Node) -> Shapes:
    dims, spans = s.dims(node.inputs[0]), spans_of(s, node)
    if dims is None:
        return None
    if spans is None:
        return [tuple(Poly.unknown() for _ in dims)]
    return [tuple(spans[i].size if i in spans else dim for i, dim in enumerate(dims))]


@dataclass(frozen=True)
class Span:
    """The part ``start, start + step, ...`` of an axis, ``size`` elements long."""

    start: Poly
    step: int
    size: Poly


def spans_of(s: Known, node: ir.Node) -> dict[int, Span] | None:
    """What a Slice keeps of each axis it names; None when that is not understood."""
    dims = s.dims(node.inputs[0])
    if dims is None:
        return None
    if "starts" in node.attributes:
        starts: Numbers | None = tuple(Poly.of(x) for x in node.attributes["starts"].as_ints())
        ends: Numbers | None = tuple(Poly.of(x) for x in node.attributes["ends"].as_ints())
    else:
        starts, ends = s.numbers(node.inputs[1]), s.numbers(input_at(node, 2))
    if starts is None or ends is None:
        return None
    try:
        axes, steps = axes_of(s, node), written(s, node, 4) or [1] * len(starts)
    except ValueError:
        return None
    named = axes if axes is not None else range(len(starts))
    spans = [_span(dims[axis], start, end, step) for axis, start, end, step in zip(named, starts, ends, steps)]
    return {axis % len(dims): span for axis, span in zip(named, spans)}


def _span(size: Poly, start: Poly, end: Poly, step: int) -> Span:
    if step < 1:
        return Span(Poly.unknown(), step, Poly.unknown())
    first, last = _bound(size, start), _bound(size, end)
    length = last - first if (last - first).constant is None else Poly.of(max((last - first).constant or 0, 0))
    return Span(first, step, length if step == 1 else (length + (step - 1)) // step)


def _bound(size: Poly, bound: Poly) -> Poly:
    """A slice bound, counted from the front and clamped to the size where that can be decided."""
    number = bound.constant
    if number is not None and number < 0:
        counted = size + number
        if counted.constant is not None:
            return Poly.of(max(counted.constant, 0))
        return counted if counted.at_least(0, 1) else Poly.of(f"max(0,{counted})")
    if (bound - size).at_least(0, 1) or (number is not None and number >= np.iinfo(np.int32).max):
        return size
    if (size - bound).at_least(0, 1):
        return bound
    return Poly.of(f"min({','.join(sorted((str(size), str(bound))))})")


def python_slice(start: int, end: int, step: int, size: int) -> slice:
    """What ONNX means by ``start:end:step``: backwards, a start before the first element is the first."""
    return slice(max(start, -size) if step < 0 else start, end, step)


def _expand(s: Known, node: ir.Node) -> Shapes:
    dims, target = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    return None if dims is None or target is None else [broadcast(dims, target)]


def _tile(s: Known, node: ir.Node) -> Shapes:
    dims, repeats = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    return None if dims is None or repeats is None else [tuple(d * r for d, r in zip(dims, repeats))]


def shape_numbers(s: Known, node: ir.Node) -> Numbers | None:
    """Elements of what a Shape node computes."""
    dims = s.dims(node.inputs[0])
    if dims is None:
        return None
    end = node.attributes.get("end")
    return dims[integer(node, "start", 0) : end.as_int() if end is not None else None]


def _shape_of(s: Known, node: ir.Node) -> Shapes:
    numbers = shape_numbers(s, node)
    return None if numbers is None else [(Poly.of(len(numbers)),)]


def _range_shape(s: Known, node: ir.Node) -> Shapes:
    start, limit, step = (s.numbers(value) for value in node.inputs)
    if start is None or limit is None or step is None or step[0] != ONE:
        return [(Poly.unknown(),)]
    return [(limit[0] - start[0],)]


def _constant_of_shape(s: Known, node: ir.Node) -> Shapes:
    return [s.numbers(node.inputs[0])]


def _reduce(s: Known, node: ir.Node) -> Shapes:
    dims, axes = s.dims(node.inputs[0]), axes_of(s, node)
    if dims is None:
        return None
    if node.op_type in ("ArgMax", "ArgMin"):
        axes = [integer(node, "axis", 0)]
    if not axes and integer(node, "noop_with_empty_axes", 0):
        return [dims]
    gone = {axis % len(dims) for axis in axes} if axes else set(range(len(dims)))
    keep = integer(node, "keepdims", 1)
    return [tuple(ONE if i in gone else dim for i, dim in enumerate(dims) if keep or i not in gone)]


def _attention(s: Known, node: ir.Node) -> Shapes:
    q, v = s.dims(node.inputs[0]), s.dims(node.inputs[2])
    if q is None or v is None:
        return None
    if len(q) == 4:
        return [(*q[:3], v[3])]
    width = v[2] // integer(node, "kv_num_heads", 1) * integer(node, "q_num_heads", 1)
    return [(q[0], q[1], width)]


def _constant(s: Known, node: ir.Node) -> Shapes:
    array = constant(node.outputs[0])
    return None if array is None else [tuple(Poly.of(size) for size in array.shape)]


def _flatten(s: Known, node: ir.Node) -> Shapes:
    dims = s.dims(node.inputs[0])
    axis = integer(node, "axis", 1)
    return None if dims is None else [(product(dims[:axis]), product(dims[axis:]))]


def _einsum(s: Known, node: ir.Node) -> Shapes:
    found = einsum_terms(node)
    if found is None:
        return None
    sizes: dict[str, Poly] = {}
    for letters, value in zip(found[0], node.inputs):
        dims = s.dims(value)
        if dims is None or len(dims) != len(letters):
            return None
        for letter, dim in zip(letters, dims):
            sizes[letter] = broadcast((sizes.get(letter, ONE),), (dim,))[0]
    return [tuple(sizes[letter] for letter in found[1])]


def einsum_terms(node: ir.Node) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result; None for an ellipsis, or a letter that one operand has twice."""
    equation = node.attributes.get("equation")
    text = equation.as_string().replace(" ", "") if equation is not None else ""
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    plain = all(term.isalpha() and len({*term}) == len(term) for term in terms)
    if not arrow or not plain or len(terms) != len(node.inputs) or len({*result}) != len(result):
        return None
    return (terms, result) if {*result} <= {*left} - {","} else None


SAME_SHAPE = (
    "Identity", "Cast", "Softmax", "LogSoftmax", "Relu", "Gelu", "Erf", "Tanh", "Sigmoid", "Sqrt",
    "Reciprocal", "Exp", "Log", "Neg", "Abs", "Not", "IsNaN", "IsInf", "Floor", "Ceil", "Round", "Sign",
    "Cos", "Sin", "Trilu", "CumSum", "Dropout", "Clip", "Softplus", "Swish", "HardSwish", "LeakyRelu", "Elu",
    "BatchNormalization", "RMSNormalization", "LpNormalization", "ScatterND", "ScatterElements",
    "RotaryEmbedding", "BitwiseNot", "CastLike", "Hardmax", "InstanceNormalization", "GroupNormalization",
    "Selu", "Celu", "Mish", "HardSigmoid", "ThresholdedRelu", "Softsign",
)  # fmt: skip
BROADCASTING = (
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Where", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "PRelu",
)  # fmt: skip
REDUCING = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ArgMax", "ArgMin",
)  # fmt: skip

Rule = Callable[[Known, ir.Node], Shapes]
SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME_SHAPE, _same),
    **dict.fromkeys(BROADCASTING, _elementwise),
    **dict.fromkeys(REDUCING, _reduce),
    "LayerNormalization": lambda s, node: [s.dims(node.inputs[0])],
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _same),
    "DynamicQuantizeLinear": lambda s, node: [s.dims(node.inputs[0]), (), ()],
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "GatherElements": lambda s, node: [s.dims(node.inputs[1])],
    "GatherND": _gather_nd,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Expand": _expand,
    "Tile": _tile,
    "Shape": _shape_of,
    "Size": lambda s, node: [()],
    "Range": _range_shape,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Attention": _attention,
    "Flatten": _flatten,
    "Einsum": _einsum,
}
