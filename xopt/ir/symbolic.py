"""What is known about every tensor of a graph: its dimensions, and the numbers in small integer tensors, as polynomials.

Exporters compute the targets of Reshape, Expand and Slice in the graph (Shape, Gather, Concat, Range, Where ...). Here that
arithmetic is carried out on symbols, so that a target reads ``[batch, seq, 12, 32]`` whatever the exporter wrote for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from xopt.ir.poly import ONE, Poly, product
from xopt.ir.edit import constant, input_at

Dims = tuple[Poly, ...]
Shapes = Sequence[Dims | None] | None
Numbers = tuple[Poly, ...]

LARGEST = 64
"""Elements beyond which an integer tensor is not followed."""


class Symbols:
    """Dimensions and integer contents of the values of ``graph``, found in one pass over its nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._dims: dict[ir.Value, Dims | None] = {}
        self._numbers: dict[ir.Value, Numbers | None] = {}
        for node in graph:
            self.visit(node)

    def visit(self, node: ir.Node) -> None:
        """Learn the outputs of a node whose inputs are known."""
        rule, evaluate = SHAPE_RULES.get(node.op_type), NUMBER_RULES.get(node.op_type)
        found: Shapes = None
        numbers: Numbers | None = None
        try:
            found = rule(self, node) if rule is not None and node.domain == "" else None
            for index, value in enumerate(node.outputs):
                self._dims[value] = found[index] if found is not None and index < len(found) else _declared(value)
            numbers = evaluate(self, node) if evaluate is not None and node.domain == "" else None
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
            pass  # a node that lacks an input or contradicts its shapes teaches nothing
        if numbers is not None and len(numbers) <= LARGEST:
            self._numbers[node.outputs[0]] = numbers

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Dimensions of a value, or None when even its rank is unknown."""
        if value is None:
            return None
        if value not in self._dims:
            self._dims[value] = _declared(value)
        return self._dims[value]

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes."""
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def numbers(self, value: ir.Value | None) -> Numbers | None:
        """Elements of a small integer (or boolean, as 0 and 1) scalar or vector."""
        if value is None:
            return None
        if value not in self._numbers:
            array = constant(value)
            small = array is not None and array.ndim <= 1 and array.size <= LARGEST and array.dtype.kind in "iub"
            self._numbers[value] = tuple(Poly.of(int(x)) for x in array.reshape(-1)) if small else None  # type: ignore[union-attr]
        return self._numbers[value]

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """Elements of a small integer tensor, all of them plain numbers."""
        numbers = self.numbers(value)
        found = None if numbers is None else [number.constant for number in numbers]
        return None if found is None or None in found else found  # type: ignore[return-value]


def name_dims(graph: ir.Graph) -> None:
    """Write the dimensions that are numbers, or dimensions of the graph's inputs, into shapes that lack them."""
    symbols = Symbols(graph)
    names = {dim.value for value in graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
    for node in graph:
        for value in node.outputs:
            dims = symbols.dims(value)
            if dims is None or (value.shape is not None and len(value.shape) != len(dims)):
                continue
            old = list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)] * len(dims)
            value.shape = ir.Shape([_named(have, dim, names) for have, dim in zip(old, dims)])


def _named(have: int | ir.SymbolicDim, dim: Poly, names: set[str | None]) -> int | ir.SymbolicDim | str:
    if isinstance(have, int) or have.value in names - {None}:
        return have
    if dim.constant is not None:
        return dim.constant
    return str(dim) if dim.is_name and str(dim) in names else have


def axes_of(symbols: Symbols, node: ir.Node) -> list[int] | None:
    """Axes of Squeeze, Unsqueeze, Slice or a reduction, as attribute or input; None when not written."""
    attr = node.attributes.get("axes")
    if attr is not None:
        return list(attr.as_ints())
    position = 3 if node.op_type == "Slice" else 1
    return symbols.integers(input_at(node, position))


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
    """The size that is not 1: a number before a named dimension, that before a composite one."""
    return min((size for size in sizes if size != ONE), key=lambda s: (s.constant is None, not s.is_name), default=ONE)


def _declared(value: ir.Value) -> Dims | None:
    if value.const_value is not None:
        return tuple(Poly.of(int(dim)) for dim in value.const_value.shape.numpy())
    if value.shape is None:
        return None
    return tuple(
        Poly.of(dim) if isinstance(dim, int) else Poly.of(dim.value) if dim.value else Poly.unknown()
        for dim in value.shape
    )


# Shapes: (symbols, node) -> dimensions of each output, or None.


def _same(s: Symbols, node: ir.Node) -> Shapes:
    return [s.dims(node.inputs[0])] * len(node.outputs)


def _elementwise(s: Symbols, node: ir.Node) -> Shapes:
    shapes = [s.dims(value) for value in node.inputs if value is not None]
    return None if None in shapes else [broadcast(*shapes)]  # type: ignore[arg-type]


def _matmul(s: Symbols, node: ir.Node) -> Shapes:
    a, b = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return [(*broadcast(a[:-2] or (ONE,), b[:-2] or (ONE,))[: max(len(a), len(b)) - 2], a[-2], b[-1])]


def _gemm(s: Symbols, node: ir.Node) -> Shapes:
    a, b = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if a is None or b is None:
        return None
    return [(a[1] if integer(node, "transA", 0) else a[0], b[0] if integer(node, "transB", 0) else b[1])]


def _transpose(s: Symbols, node: ir.Node) -> Shapes:
    dims = s.dims(node.inputs[0])
    return None if dims is None else [tuple(dims[axis] for axis in permutation(node, len(dims)))]


def permutation(node: ir.Node, rank: int) -> list[int]:
    """Axes order of a Transpose."""
    attr = node.attributes.get("perm")
    return list(attr.as_ints()) if attr is not None else list(range(rank))[::-1]


def _reshape(s: Symbols, node: ir.Node) -> Shapes:
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


def _squeeze(s: Symbols, node: ir.Node) -> Shapes:
    dims, axes = s.dims(node.inputs[0]), axes_of(s, node)
    if dims is None:
        return None
    gone = {axis % len(dims) for axis in axes} if axes is not None else {i for i, d in enumerate(dims) if d == ONE}
    return [tuple(dim for i, dim in enumerate(dims) if i not in gone)]


def _unsqueeze(s: Symbols, node: ir.Node) -> Shapes:
    dims, axes = s.dims(node.inputs[0]), axes_of(s, node)
    if dims is None or axes is None:
        return None
    new, rest = {axis % (len(dims) + len(axes)) for axis in axes}, iter(dims)
    return [tuple(ONE if i in new else next(rest) for i in range(len(dims) + len(axes)))]


def _gather(s: Symbols, node: ir.Node) -> Shapes:
    data, index = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if data is None or index is None or not data:
        return None
    axis = integer(node, "axis", 0) % len(data)
    return [data[:axis] + index + data[axis + 1 :]]


def _gather_nd(s: Symbols, node: ir.Node) -> Shapes:
    data, index = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    depth = index[-1].constant if index else None
    if data is None or index is None or depth is None:
        return None
    return [index[:-1] + data[integer(node, "batch_dims", 0) + depth :]]


def _concat(s: Symbols, node: ir.Node) -> Shapes:
    shapes = [s.dims(value) for value in node.inputs]
    if any(dims is None for dims in shapes) or not shapes[0]:
        return None
    axis = integer(node, "axis", 0) % len(shapes[0])
    total = Poly.of(0)
    for dims in shapes:
        total = total + dims[axis]  # type: ignore[index]
    others = broadcast(*[dims[:axis] + (ONE,) + dims[axis + 1 :] for dims in shapes])  # type: ignore[index]
    return [others[:axis] + (total,) + others[axis + 1 :]]


def _split(s: Symbols, node: ir.Node) -> Shapes:
    dims = s.dims(node.inputs[0])
    if dims is None:
        return None
    axis = integer(node, "axis", 0) % len(dims)
    sizes = split_sizes(s, node, dims[axis])
    return [dims[:axis] + (size,) + dims[axis + 1 :] for size in sizes]


def split_sizes(s: Symbols, node: ir.Node, total: Poly) -> list[Poly]:
    """Sizes of the parts of a Split of an axis of ``total`` elements."""
    attr = node.attributes.get("split")
    written = [Poly.of(x) for x in attr.as_ints()] if attr is not None else s.numbers(input_at(node, 1))
    if written is not None:
        return list(written)
    count = len(node.outputs)
    if total.constant is None:
        return [total.exactly(count) or Poly.unknown()] * count
    chunk = math.ceil(total.constant / count)
    return [Poly.of(min(chunk, total.constant - chunk * i)) for i in range(count)]


def _slice(s: Symbols, node: ir.Node) -> Shapes:
    dims, spans = s.dims(node.inputs[0]), spans_of(s, node)
    if dims is None:
        return None
    if spans is None:
        return [tuple(Poly.unknown() for _ in dims)]
    return [tuple(spans[i].size if i in spans else dim for i, dim in enumerate(dims))]


class Span:
    """The part ``start, start + step, ...`` of an axis, ``size`` elements long."""

    def __init__(self, start: Poly, step: int, size: Poly) -> None:
        self.start, self.step, self.size = start, step, size


def spans_of(s: Symbols, node: ir.Node) -> dict[int, Span] | None:
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
    axes = axes_of(s, node)
    steps = s.integers(input_at(node, 4)) or [1] * len(starts)
    named = axes if axes is not None else range(len(starts))
    spans = [_span(dims[axis], start, end, step) for axis, start, end, step in zip(named, starts, ends, steps)]
    return {axis % len(dims): span for axis, span in zip(named, spans)}


def _span(size: Poly, start: Poly, end: Poly, step: int) -> Span:
    if step < 1:
        return Span(Poly.unknown(), step, Poly.unknown())
    first, last = _bound(size, start), _bound(size, end)
    length = last - first
    return Span(first, step, length if step == 1 else (length + (step - 1)) // step)


def _bound(size: Poly, bound: Poly) -> Poly:
    """A slice bound, counted from the front and clamped to the size where that can be decided."""
    number = bound.constant
    if number is not None and number < 0:
        return size + number
    if (bound - size).at_least(0) or (number is not None and number >= np.iinfo(np.int32).max):
        return size
    if (size - bound).at_least(0):
        return bound
    return Poly.of(f"min({','.join(sorted((str(size), str(bound))))})")


def _expand(s: Symbols, node: ir.Node) -> Shapes:
    dims, target = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    return None if dims is None or target is None else [broadcast(dims, target)]


def _tile(s: Symbols, node: ir.Node) -> Shapes:
    dims, repeats = s.dims(node.inputs[0]), s.numbers(node.inputs[1])
    return None if dims is None or repeats is None else [tuple(d * r for d, r in zip(dims, repeats))]


def _shape_of(s: Symbols, node: ir.Node) -> Shapes:
    numbers = _shape_numbers(s, node)
    return None if numbers is None else [(Poly.of(len(numbers)),)]


def _range_shape(s: Symbols, node: ir.Node) -> Shapes:
    start, limit, step = (s.numbers(value) for value in node.inputs)
    if start is None or limit is None or step is None or step[0] != ONE:
        return [(Poly.unknown(),)]
    return [(limit[0] - start[0],)]


def _constant_of_shape(s: Symbols, node: ir.Node) -> Shapes:
    return [s.numbers(node.inputs[0])]


def _reduce(s: Symbols, node: ir.Node) -> Shapes:
    dims, axes = s.dims(node.inputs[0]), axes_of(s, node)
    if dims is None:
        return None
    if node.op_type in ("ArgMax", "ArgMin"):
        axes = [integer(node, "axis", 0)]
    gone = {axis % len(dims) for axis in axes} if axes else set(range(len(dims)))
    keep = integer(node, "keepdims", 1)
    return [tuple(ONE if i in gone else dim for i, dim in enumerate(dims) if keep or i not in gone)]


def _conv(s: Symbols, node: ir.Node) -> Shapes:
    x, w = s.dims(node.inputs[0]), s.dims(node.inputs[1])
    if x is None or w is None:
        return None
    spatial = len(x) - 2
    strides = _ints(node, "strides", [1] * spatial)
    dilations = _ints(node, "dilations", [1] * spatial)
    pads = _ints(node, "pads", [0] * 2 * spatial)
    if node.attributes.get("auto_pad") is not None and node.attributes["auto_pad"].as_string() not in (
        "NOTSET",
        "VALID",
    ):
        return None
    sizes = []
    for i in range(spatial):
        kernel = w[2 + i].constant
        if kernel is None:
            return None
        covered = x[2 + i] + (pads[i] + pads[spatial + i] - dilations[i] * (kernel - 1) - 1)
        sizes.append(covered // strides[i] + 1)
    return [(x[0], w[0], *sizes)]


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attr = node.attributes.get(name)
    return default if attr is None else list(attr.as_ints())


def _attention(s: Symbols, node: ir.Node) -> Shapes:
    q, v = s.dims(node.inputs[0]), s.dims(node.inputs[2])
    if q is None or v is None:
        return None
    if len(q) == 4:
        return [(*q[:3], v[3])]
    width = v[2] // integer(node, "kv_num_heads", 1) * integer(node, "q_num_heads", 1)
    return [(q[0], q[1], width)]


def _flatten(s: Symbols, node: ir.Node) -> Shapes:
    dims = s.dims(node.inputs[0])
    axis = integer(node, "axis", 1)
    return None if dims is None else [(product(dims[:axis]), product(dims[axis:]))]


# Numbers: (symbols, node) -> elements of the output, or None.


def _shape_numbers(s: Symbols, node: ir.Node) -> Numbers | None:
    dims = s.dims(node.inputs[0])
    if dims is None:
        return None
    end = node.attributes.get("end")
    return dims[integer(node, "start", 0) : end.as_int() if end is not None else None]


def _pass_on(s: Symbols, node: ir.Node) -> Numbers | None:
    dims = s.dims(node.outputs[0])
    return s.numbers(node.inputs[0]) if dims is not None and len(dims) <= 1 else None


def _gather_numbers(s: Symbols, node: ir.Node) -> Numbers | None:
    data, index = s.numbers(node.inputs[0]), s.integers(node.inputs[1])
    if data is None or index is None or s.rank(node.inputs[0]) != 1:
        return None
    return tuple(data[i] for i in index) if all(-len(data) <= i < len(data) for i in index) else None


def _slice_numbers(s: Symbols, node: ir.Node) -> Numbers | None:
    data, starts, ends = (s.numbers(node.inputs[0]), s.integers(input_at(node, 1)), s.integers(input_at(node, 2)))
    steps = s.integers(input_at(node, 4)) or [1]
    if data is None or starts is None or ends is None:
        return None
    return data[slice(starts[0], ends[0], steps[0])]


def _concat_numbers(s: Symbols, node: ir.Node) -> Numbers | None:
    parts = [s.numbers(value) for value in node.inputs]
    if any(part is None for part in parts) or any(s.rank(value) != 1 for value in node.inputs):
        return None
    return tuple(number for part in parts for number in part)  # type: ignore[union-attr]


def _binary(operation: Callable[[Poly, Poly], Poly | None]) -> Callable[[Symbols, ir.Node], Numbers | None]:
    def evaluate(s: Symbols, node: ir.Node) -> Numbers | None:
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
    apart = difference.constant is not None or difference.at_least(1) or (b - a).at_least(1)
    return Poly.of(0) if apart else None


def _where_numbers(s: Symbols, node: ir.Node) -> Numbers | None:
    condition, a, b = (s.numbers(value) for value in node.inputs)
    if condition is None or a is None or b is None:
        return None
    size = max(len(condition), len(a), len(b))
    columns = [x * size if len(x) == 1 else x for x in (condition, a, b)]
    chosen = [x if c.constant else y for c, x, y in zip(*columns) if c.constant is not None]
    return tuple(chosen) if len(chosen) == size else None


def _filled(s: Symbols, node: ir.Node) -> Numbers | None:
    shape = s.integers(node.inputs[0])
    attr = node.attributes.get("value")
    value = attr.as_tensor().numpy() if attr is not None else np.zeros(1, np.float32)
    if shape is None or len(shape) > 1 or math.prod(shape) > LARGEST or value.dtype.kind not in "iub":
        return None
    return (Poly.of(int(value.reshape(-1)[0])),) * math.prod(shape)


def _reduce_prod(s: Symbols, node: ir.Node) -> Numbers | None:
    numbers = s.numbers(node.inputs[0])
    return None if numbers is None else (product(numbers),)


def _size(s: Symbols, node: ir.Node) -> Numbers | None:
    dims = s.dims(node.inputs[0])
    return None if dims is None else (product(dims),)


def _extreme(name: str) -> Callable[[Poly, Poly], Poly | None]:
    def choose(a: Poly, b: Poly) -> Poly | None:
        if (a - b).at_least(0):
            return a if name == "max" else b
        if (b - a).at_least(0):
            return b if name == "max" else a
        return Poly.of(f"{name}({','.join(sorted((str(a), str(b))))})")

    return choose


Rule = Callable[[Symbols, ir.Node], Shapes]
SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "Identity Cast Softmax LogSoftmax Relu Gelu Erf Tanh Sigmoid Sqrt Reciprocal Exp Log Neg Abs Not IsNaN IsInf Floor Ceil "
        "Round Sign Cos Sin Trilu CumSum Dropout Clip Softplus Swish HardSwish LeakyRelu Elu BatchNormalization "
        "RMSNormalization LpNormalization ScatterND ScatterElements RotaryEmbedding BitwiseNot CastLike Hardmax".split(),
        _same,
    ),
    **dict.fromkeys(
        "Add Sub Mul Div Pow Mod Min Max Sum Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor BitwiseAnd "
        "BitwiseOr PRelu".split(),
        _elementwise,
    ),
    **dict.fromkeys("ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL2 ArgMax ArgMin".split(), _reduce),
    "LayerNormalization": lambda s, node: [s.dims(node.inputs[0])],
    "MatMul": _matmul,
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
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Attention": _attention,
    "Flatten": _flatten,
}
NUMBER_RULES: dict[str, Callable[[Symbols, ir.Node], Numbers | None]] = {
    "Shape": _shape_numbers,
    "Size": _size,
    "Gather": _gather_numbers,
    "Slice": _slice_numbers,
    "Concat": _concat_numbers,
    "ConstantOfShape": _filled,
    "Expand": lambda s, node: _expand_numbers(s, node),
    "Where": _where_numbers,
    "ReduceProd": _reduce_prod,
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _binary(lambda a, b: a // b),
    "Equal": _binary(_equal),
    "Min": _binary(_extreme("min")),
    "Max": _binary(_extreme("max")),
    **dict.fromkeys(("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Floor"), _pass_on),
}


def _expand_numbers(s: Symbols, node: ir.Node) -> Numbers | None:
    data, shape = s.numbers(node.inputs[0]), s.integers(node.inputs[1])
    if data is None or len(data) != 1 or shape is None or len(shape) != 1 or not 0 <= shape[0] <= LARGEST:
        return None
    return data * shape[0]
