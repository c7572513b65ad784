"""Where each operator leaves the batch axis of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import onnx_ir as ir

from xopt.ir.edit import input_at
from xopt.ir.poly import ONE, Poly, product
from xopt.ir.shape_rules import BROADCASTING, REDUCING, Dims, axes_of, integer, permutation, spans_of
from xopt.ir.symbolic import Symbols


@dataclass(frozen=True)
class Place:
    """Where the batch lies in a shape: axis ``axis`` has ``outer * batch * inner`` places, of which ``inner`` in a row
    are of one sample.
    """

    axis: int
    outer: Poly = ONE
    inner: Poly = ONE

    def at(self, axis: int) -> Place:
        """The same on another axis."""
        return replace(self, axis=axis)

    @property
    def alone(self) -> bool:
        """Whether the axis is the batch and nothing else."""
        return self.outer == ONE and self.inner == ONE


class SamplesMeetError(Exception):
    """A node computes one sample from another; the message is the reason."""


class NotFollowedError(Exception):
    """What a node does to the batch axis is not understood; the message is the reason."""


class Walk(Protocol):
    """What rules may ask: ``batch.Follow``."""

    symbols: Symbols
    size: Poly
    places: dict[ir.Value, Place]


Followed = Sequence[Place | None]
Rule = Callable[[Walk, ir.Node], Followed]


def place_of(w: Walk, value: ir.Value | None) -> Place | None:
    """Where the batch lies in an operand."""
    return None if value is None else w.places.get(value)


def dims_of(w: Walk, value: ir.Value | None) -> Dims:
    """Dimensions of an operand; NotFollowedError where the rank is unknown."""
    dims = w.symbols.dims(value)
    if dims is None:
        raise NotFollowedError("shape-not-known")
    return dims


def agreed(places: Iterable[Place | None]) -> Place | None:
    """The one place that all operands that run over the batch share."""
    found = {place for place in places if place is not None}
    if len(found) > 1:
        raise SamplesMeetError("batch-on-two-axes")
    return next(iter(found), None)


def aligned(w: Walk, node: ir.Node, operands: Iterable[ir.Value | None]) -> Place | None:
    """The place in the result of operands that broadcast; none may repeat the batch."""
    values = [value for value in operands if value is not None]
    rank = max(len(dims_of(w, value)) for value in values)
    shifted = [
        place.at(place.axis + rank - len(dims_of(w, value))) if (place := place_of(w, value)) is not None else None
        for value in values
    ]
    result = agreed(shifted)
    if result is not None:
        whole = result.outer * w.size * result.inner
        for value, place in zip(values, shifted):
            axis = result.axis - rank + len(dims_of(w, value))
            if place is None and axis >= 0 and _repeats(dims_of(w, value)[axis], whole):
                raise SamplesMeetError("repeated-along-the-batch")
    return result


def _repeats(dim: Poly, whole: Poly) -> bool:
    """Whether an axis, beside one that runs over the batch, is surely another one."""
    other_axis = dim.constant is None and dim.is_of_axes
    return dim not in (ONE, whole) and (whole == ONE or other_axis)


def away(place: Place, axes: Iterable[int], rank: int) -> Place:
    """The place, which must be on none of the axes that a node works along."""
    if place.axis in {axis % rank for axis in axes}:
        raise SamplesMeetError("along-the-batch")
    return place


def _first(w: Walk, node: ir.Node) -> Place:
    place = place_of(w, node.inputs[0])
    if place is None:
        raise NotFollowedError("batch-in-a-parameter")
    return place


def _same(w: Walk, node: ir.Node) -> Followed:
    if any(place_of(w, value) is not None for value in node.inputs[1:]):
        raise NotFollowedError("batch-in-a-parameter")
    return [_first(w, node)] * len(node.outputs)


def _broadcast(w: Walk, node: ir.Node) -> Followed:
    return [aligned(w, node, node.inputs)]


def _matmul(w: Walk, node: ir.Node) -> Followed:
    left, right = node.inputs[:2]
    a, b = dims_of(w, left), dims_of(w, right)
    p, q = place_of(w, left), place_of(w, right)
    if (p is not None and p.axis == len(a) - 1) or (q is not None and q.axis == max(len(b) - 2, 0)):
        raise SamplesMeetError("summed-along-the-batch")
    rank = max(len(a), len(b))
    shift_a, shift_b = (rank - len(a), rank - len(b)) if min(len(a), len(b)) > 1 else (0, 0)
    if len(a) == 1 and q is not None:
        q = q.at(q.axis - int(q.axis == len(b) - 1))
    return [agreed([p and p.at(p.axis + shift_a), q and q.at(q.axis + shift_b)])]


def _gemm(w: Walk, node: ir.Node) -> Followed:
    p, q = place_of(w, node.inputs[0]), place_of(w, node.inputs[1])
    rows, columns = integer(node, "transA", 0), 1 - integer(node, "transB", 0)
    if (p is not None and p.axis != rows) or (q is not None and q.axis != columns):
        raise SamplesMeetError("summed-along-the-batch")
    bias = input_at(node, 2)
    r = place_of(w, bias)
    if r is not None:
        r = r.at(r.axis + 2 - len(dims_of(w, bias)))
    return [agreed([p and p.at(0), q and q.at(1), r])]


def _along_axis(default: int) -> Rule:
    def rule(w: Walk, node: ir.Node) -> Followed:
        place = _first(w, node)
        rank = len(dims_of(w, node.inputs[0]))
        return [away(place, [integer(node, "axis", default)], rank)] * len(node.outputs)

    return rule


def _normalized(w: Walk, node: ir.Node) -> Followed:
    place, rank = _first(w, node), len(dims_of(w, node.inputs[0]))
    axis = integer(node, "axis", -1) % rank
    return [away(place, range(axis, rank), rank)] * len(node.outputs)


def _per_channel(w: Walk, node: ir.Node) -> Followed:
    """Affine by axis 1, with stored statistics."""
    if integer(node, "training_mode", 0):
        raise SamplesMeetError("statistics-of-the-batch")
    return [away(_first(w, node), [1], len(dims_of(w, node.inputs[0])))]


def _images(w: Walk, node: ir.Node) -> Followed:
    """Works on channels and spatial axes: only the first axis is left alone."""
    place = _first(w, node)
    if place.axis != 0:
        raise SamplesMeetError("along-the-batch")
    return [place] * len(node.outputs)


def _reduce(w: Walk, node: ir.Node) -> Followed:
    place, rank = _first(w, node), len(dims_of(w, node.inputs[0]))
    axes = [integer(node, "axis", 0)] if node.op_type in ("ArgMax", "ArgMin") else axes_of(w.symbols, node)
    if not axes and integer(node, "noop_with_empty_axes", 0):
        return [place]
    along = {axis % rank for axis in axes} if axes else set(range(rank))
    away(place, along, rank)
    keep = integer(node, "keepdims", 1)
    return [place if keep else place.at(place.axis - sum(axis < place.axis for axis in along))]


def _transpose(w: Walk, node: ir.Node) -> Followed:
    place = _first(w, node)
    return [place.at(permutation(node, len(dims_of(w, node.inputs[0]))).index(place.axis))]


def _squeeze(w: Walk, node: ir.Node) -> Followed:
    place, dims, axes = _first(w, node), dims_of(w, node.inputs[0]), axes_of(w.symbols, node)
    gone = {axis % len(dims) for axis in axes} if axes is not None else {i for i, d in enumerate(dims) if d == ONE}
    if place.axis in gone:
        raise NotFollowedError("batch-squeezed")
    return [place.at(place.axis - sum(axis < place.axis for axis in gone))]


def _unsqueeze(w: Walk, node: ir.Node) -> Followed:
    place, rank = _first(w, node), len(dims_of(w, node.inputs[0]))
    axes = axes_of(w.symbols, node) or []
    new = {axis % (rank + len(axes)) for axis in axes}
    kept = [axis for axis in range(rank + len(axes)) if axis not in new]
    return [place.at(kept[place.axis])]


def _reshape(w: Walk, node: ir.Node) -> Followed:
    before, after = dims_of(w, node.inputs[0]), dims_of(w, node.outputs[0])
    return [reshaped(_first(w, node), before, after, w.size)]


def reshaped(place: Place, before: Dims, after: Dims, size: Poly) -> Place:
    """Where the batch lies after a Reshape: the axis that has its stride and holds it whole.

    Raises:
        NotFollowedError: it lies in several axes, or sizes are not known.
    """
    stride = product(before[place.axis + 1 :]) * place.inner
    found = []
    for axis, dim in enumerate(after):
        inner = stride.exactly(product(after[axis + 1 :]))
        outer = dim.exactly(size * inner) if inner is not None else None
        if inner is not None and outer is not None:
            found.append(Place(axis, outer, inner))
    same = [one for one in found if one.axis == place.axis]
    if not found:
        raise NotFollowedError("reshape-splits-the-batch")
    return same[0] if same else found[0]


def _concat(w: Walk, node: ir.Node) -> Followed:
    place = agreed(place_of(w, value) for value in node.inputs)
    assert place is not None
    return [away(place, [integer(node, "axis", 0)], len(dims_of(w, node.inputs[0])))]


def _slice(w: Walk, node: ir.Node) -> Followed:
    place, dims = _first(w, node), dims_of(w, node.inputs[0])
    axes = axes_of(w.symbols, node)
    if place.axis not in {axis % len(dims) for axis in (range(len(dims)) if axes is None else axes)}:
        return [place]
    spans = spans_of(w.symbols, node) or {}
    span = spans.get(place.axis)
    if span is None or span.step != 1 or span.size != dims[place.axis]:
        raise SamplesMeetError("cut-along-the-batch")
    return [place]


def _gather(w: Walk, node: ir.Node) -> Followed:
    data, index = place_of(w, node.inputs[0]), place_of(w, node.inputs[1])
    rank, inner = len(dims_of(w, node.inputs[0])), len(dims_of(w, node.inputs[1]))
    axis = integer(node, "axis", 0) % rank
    if data is None:
        assert index is not None
        return [index.at(axis + index.axis)]
    away(data, [axis], rank)
    shifted = data.at(data.axis + (inner - 1 if data.axis > axis else 0))
    return [agreed([shifted, index and index.at(axis + index.axis)])]


def _elements(w: Walk, node: ir.Node) -> Followed:
    """GatherElements and ScatterElements: all operands run over the batch, and none looks along it."""
    places = [place_of(w, value) for value in node.inputs]
    if None in places:
        raise NotFollowedError("index-without-batch")
    place = agreed(places)
    assert place is not None
    return [away(place, [integer(node, "axis", 0)], len(dims_of(w, node.inputs[0])))]


def _expand(w: Walk, node: ir.Node) -> Followed:
    place, dims, after = _first(w, node), dims_of(w, node.inputs[0]), dims_of(w, node.outputs[0])
    moved = place.at(place.axis + len(after) - len(dims))
    if after[moved.axis] != dims[place.axis]:
        raise SamplesMeetError("repeated-along-the-batch")
    return [moved]


def _tile(w: Walk, node: ir.Node) -> Followed:
    place = _first(w, node)
    repeats = w.symbols.numbers(node.inputs[1])
    if repeats is None:
        raise NotFollowedError("repeats-not-known")
    if repeats[place.axis] != ONE:
        raise SamplesMeetError("repeated-along-the-batch")
    return [place]


def _pad(w: Walk, node: ir.Node) -> Followed:
    place, rank = _first(w, node), len(dims_of(w, node.inputs[0]))
    pads, axes = w.symbols.integers(input_at(node, 1)), w.symbols.integers(input_at(node, 3))
    if pads is None or (axes is None and input_at(node, 3) is not None):
        raise NotFollowedError("pads-not-known")
    along = [axis % rank for axis in axes] if axes is not None else list(range(rank))
    amounts = zip(along, zip(pads, pads[len(along) :]))
    if any(axis == place.axis and amount != (0, 0) for axis, amount in amounts):
        raise SamplesMeetError("padded-along-the-batch")
    return [place]


def _attention(w: Walk, node: ir.Node) -> Followed:
    places = [place_of(w, value) for value in (*node.inputs[:3], *node.inputs[4:])]
    mask = place_of(w, input_at(node, 3))
    if mask is not None:
        places.append(mask.at(mask.axis + 4 - len(dims_of(w, node.inputs[3]))))
    place = agreed(places)
    if place is None or place.axis != 0:
        raise SamplesMeetError("attends-along-the-batch")
    return [place] * len(node.outputs)


def _rotary(w: Walk, node: ir.Node) -> Followed:
    places = [place_of(w, value) for value in node.inputs]
    place = agreed(places)
    if places[0] is None or place is None or place.axis != 0:
        raise NotFollowedError("batch-in-a-parameter")
    return [place]


def _running(w: Walk, node: ir.Node) -> Followed:
    axis = w.symbols.integers(node.inputs[1])
    if not axis:
        raise NotFollowedError("axis-not-known")
    return [away(_first(w, node), axis, len(dims_of(w, node.inputs[0])))]


def _one_hot(w: Walk, node: ir.Node) -> Followed:
    place, rank = _first(w, node), len(dims_of(w, node.inputs[0]))
    axis = integer(node, "axis", -1) % (rank + 1)
    return [place.at(place.axis + int(axis <= place.axis))]


def _triangle(w: Walk, node: ir.Node) -> Followed:
    return [away(_first(w, node), [-2, -1], len(dims_of(w, node.inputs[0])))]


def _einsum(w: Walk, node: ir.Node) -> Followed:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    operands, _, result = equation.partition("->")
    if "." in equation or "->" not in equation:
        raise NotFollowedError("equation-not-read")
    places = []
    for letters, value in zip(operands.split(","), node.inputs):
        place = place_of(w, value)
        if place is not None:
            if letters[place.axis] not in result:
                raise SamplesMeetError("summed-along-the-batch")
            places.append(place.at(result.index(letters[place.axis])))
    return [agreed(places)]


def _recurrent(w: Walk, node: ir.Node) -> Followed:
    """LSTM, GRU and RNN over X [steps, batch, width]: Y [steps, directions, batch, width], Y_h [directions, ...]."""
    place = _first(w, node)
    if integer(node, "layout", 0) or place.axis != 1 or not place.alone:
        raise SamplesMeetError("along-the-batch")
    return [place.at(2), place.at(1), place.at(1)]


def _no_number(w: Walk, node: ir.Node) -> Followed:
    """Sizes are numbers of the graph, and no samples."""
    return [None]


_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign
    Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu QuantizeLinear DequantizeLinear
"""
_ON_IMAGES = """
    AveragePool Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization InstanceNormalization LRN LpPool MaxPool Resize SpaceToDepth
"""
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(_ON_IMAGES.split(), _images),
    **dict.fromkeys((*BROADCASTING, "Mean", "BitwiseXor", "BitShift"), _broadcast),
    **dict.fromkeys((*REDUCING, "ReduceL1", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"), _reduce),
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalized),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "TopK"), _along_axis(-1)),
    **dict.fromkeys(("GatherElements", "ScatterElements"), _elements),
    **dict.fromkeys(("CumSum", "CumProd"), _running),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("Shape", "Size"), _no_number),
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    "Attention": _attention,
    "BatchNormalization": _per_channel,
    "CastLike": lambda w, node: [place_of(w, node.inputs[0])],
    "Concat": _concat,
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "OneHot": _one_hot,
    "Pad": _pad,
    "RotaryEmbedding": _rotary,
    "Slice": _slice,
    "Split": _along_axis(0),
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
}
_OF_XOPT: dict[str, Rule] = dict.fromkeys(("MergeTokens", "MergeTokensMCTF"), _images)

RULES: dict[tuple[str, str], Rule] = {
    **{("", op_type): rule for op_type, rule in _RULES.items()},
    **{("xopt", op_type): rule for op_type, rule in _OF_XOPT.items()},
}
"""By domain and operator; what is missing is not followed."""
