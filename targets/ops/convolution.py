"""Convolutions: of floats and of integers, transposed, deformed; and the image that columns of windows add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from tvm import relax, te, tirx

from xopt.kernels.emit import i64
from xopt.targets.ops.bounds import inside
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.linear import require_inner
from xopt.targets.ops.parameters import sizes
from xopt.targets.ops.windows import attributes, explicit_pads, padded, sliding
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


def _conv(call: Call) -> Value:
    return _biased(call, _convolved(call, call.x(0), call.x(1)))


def _convolved(call: Call, x: relax.Expr, weight: relax.Expr) -> relax.Expr:
    rank = len(call.shape(0)) - 2
    call.pass_over("kernel_shape")  # the weight has it
    functions = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}
    if rank not in functions:
        raise call.unsupported(f"convolution over {rank} axes")
    strides, dilations = attributes(call, rank)
    groups = int(call.attr("group", 1))
    x, padding = _surrounded(call, x, rank)
    require_inner(call, call.shape(0)[1], call.dims.simplify(call.shape(1)[1] * groups))
    call.require(call.dims.same(call.shape(1)[0] % groups, 0), f"its outputs are not {groups} groups")
    for axis, (dim, size) in enumerate(zip(call.lowering.shape_of(x)[2:], call.shape(1)[2:])):
        room = dim + padding[axis] + padding[axis + rank]
        call.require(room >= (size - 1) * dilations[axis] + 1, f"axis {axis} of the image is shorter than the kernel")
    return call.emit(functions[rank](x, weight, strides=strides, padding=padding, dilation=dilations, groups=groups))


def _surrounded(call: Call, x: relax.Expr, rank: int) -> tuple[relax.Expr, list[int]]:
    """The image, and the padding before and after its axes; where sizes decide on that, it is in the image already."""
    if call.attr("auto_pad", "NOTSET") == "NOTSET":
        before, after = explicit_pads(call, rank)
        return x, before + after
    call.pass_over("pads")  # there are none beside another kind
    taps = call.shape(1)[2:]
    if not all(isinstance(size, int) for size in taps):
        raise call.unsupported("auto_pad with a dynamic kernel")
    windows = sliding(call, call.shape(0)[2:], taps)
    pads = [*(window.before for window in windows), *(window.after for window in windows)]
    if all(isinstance(pad, int) for pad in pads):
        return x, pads
    return padded(call, x, windows, 0)[0], [0] * 2 * rank


def _biased(call: Call, x: relax.Expr, index: int = 2) -> Value:
    """With the bias of each channel added, where input ``index`` gives one."""
    if not call.has(index):
        return x
    shape = call.lowering.shape_of(x)
    bias = call.lowering.recast(call.x(index), [shape[1]])
    return call.emit(relax.op.add(x, call.lowering.reshape(bias, [1, shape[1], *[1] * (len(shape) - 2)])))


def _conv_integer(call: Call) -> Value:
    """Of int32 differences from the zero points."""
    return _convolved(call, _centred(call, 0, 2), _centred(call, 1, 3))


def _centred(call: Call, index: int, zero: int) -> relax.Expr:
    """An input less its zero point, one for all or (of weights) one for each output."""
    shape, operands = call.shape(index), [call.x(index)]
    if call.has(zero):
        count = call.dims.product(call.shape(zero))
        one = call.dims.equal(count, 1)
        if not one and index == 0:
            raise call.unsupported("its input has several zero points")
        call.require(one or call.dims.same(count, shape[0]), "it has not one zero point for each output")
        operands.append(call.lowering.reshape(call.x(zero), [] if one else [count]))

    def element(x: Any, *rest: Any) -> Any:
        offsets, at = rest[: len(operands) - 1], rest[len(operands) - 1 :]
        value = x(*at).astype("int32")
        for offset in offsets:
            value = value - (offset(at[0]) if offset.shape else offset()).astype("int32")
        return value

    return call.lowering.compute("centred", shape, element, *operands)


# -- transposed ----------------------------------------------------------------------------------------------------
def _conv_transpose(call: Call) -> Value | None:
    """The forms in which the size of the result is asked for; None for the others."""
    shape, weights = call.shape(0), call.shape(1)
    rank, kind = len(shape) - 2, str(call.attr("auto_pad", "NOTSET"))
    wanted = call.attr("output_shape")
    if wanted is None and kind == "NOTSET":
        return None
    if kind not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise call.unsupported("there is no such auto_pad")
    (strides, dilations), more = attributes(call, rank), call.attr("output_padding", [0] * rank)
    call.pass_over("kernel_shape", "pads")
    if len(more) != rank or (wanted is not None and len(wanted) != rank):
        raise call.unsupported(f"its sizes do not fit {rank} axes")
    result, before = [], []
    for axis, (dim, size) in enumerate(zip(shape[2:], weights[2:])):
        full = (dim - 1) * strides[axis] + int(more[axis]) + (size - 1) * dilations[axis] + 1
        asked = int(wanted[axis]) if wanted is not None else full if kind == "VALID" else dim * strides[axis]
        total = tirx.max(i64(call.dims.simplify(full - asked)), i64(0))
        small = tirx.floordiv(total, i64(2))
        before.append(call.dims.simplify(small if kind == "SAME_UPPER" else total - small))
        result.append(call.dims.simplify(asked))
    call.dims.require_sizes(result, "ConvTranspose: its result")
    return _biased(call, _spread(call, result, strides, dilations, before))


def _spread(
    call: Call, result: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int], before: Sequence[Dim]
) -> relax.Expr:
    """Every element of the image times the kernel, added up where they lie over each other."""
    shape, weights, groups = call.shape(0), call.shape(1), int(call.attr("group", 1))
    require_inner(call, shape[1], weights[0])
    call.require(call.dims.same(shape[1] % groups, 0), f"its inputs are not {groups} groups")
    inner = call.dims.quotient([shape[1]], [groups])
    channel = te.reduce_axis((i64(0), i64(inner)), "channel")
    taps = [te.reduce_axis((i64(0), i64(size)), f"tap{axis}") for axis, size in enumerate(weights[2:])]

    def element(x: Any, w: Any, *index: Any) -> Any:
        group = tirx.floordiv(index[1], i64(weights[1]))
        source = group * i64(inner) + channel
        at, hit = _sources(index[2:], taps, strides, dilations, before, shape[2:])
        value = x(index[0], source, *at) * w(source, tirx.floormod(index[1], i64(weights[1])), *taps)
        return te.sum(tirx.if_then_else(hit, value, tirx.const(0, x.dtype)), axis=[channel, *taps])

    outputs = call.dims.simplify(weights[1] * groups)
    return call.lowering.compute("spread", [shape[0], outputs, *result], element, call.x(0), call.x(1))


def _sources(
    places: Sequence[Any], taps: Sequence[Any], strides: Sequence[Dim], dilations: Sequence[Dim],
    before: Sequence[Dim], counts: Sequence[Dim],
) -> tuple[list[Any], Any]:  # fmt: skip
    """Which window has its element ``tap`` at a place of the image: its indices, and whether there is one."""
    at, hits = [], []
    for place, tap, stride, dilation, pad, count in zip(places, taps, strides, dilations, before, counts):
        reach = place + i64(pad) - tap * i64(dilation)
        window = tirx.floordiv(reach, i64(stride))
        hits += [reach >= 0, tirx.EQ(tirx.floormod(reach, i64(stride)), i64(0)), window < i64(count)]
        at.append(inside(window, count))
    return at, reduce(tirx.And, hits)


def _col2im(call: Call) -> Value:
    """[N, C * elements of a block, windows] ─▶ [N, C, image]: every element where its window had it, added up."""
    image, block, shape = sizes(call, 1), sizes(call, 2), call.shape()
    rank = len(image)
    if len(shape) != 3 or len(block) != rank or not rank:
        raise call.unsupported("its image, its blocks and its input do not fit")
    (strides, dilations), (before, after) = attributes(call, rank), explicit_pads(call, rank)
    counts = []
    for axis, (dim, size) in enumerate(zip(image, block)):
        call.require(size >= 1, "a block has no elements")
        room = dim + before[axis] + after[axis] - (size - 1) * dilations[axis] - 1
        call.require(room >= 0, "an axis of the image is shorter than the block")
        counts.append(call.dims.simplify(tirx.floordiv(i64(room), i64(strides[axis])) + 1))
    whole = call.dims.product(block)
    call.require(call.dims.same(call.dims.product(counts), shape[2]), "it has not one column for each window")
    channels = call.dims.quotient([shape[1]], [whole])
    call.require(call.dims.same(channels * whole, shape[1]), "its columns are no whole blocks")
    taps = [te.reduce_axis((i64(0), i64(size)), f"tap{axis}") for axis, size in enumerate(block)]

    def element(x: Any, *index: Any) -> Any:
        at, hit = _sources(index[2:], taps, strides, dilations, before, counts)
        value = x(index[0], index[1] * i64(whole) + _flat(taps, block), _flat(at, counts))
        return te.sum(tirx.if_then_else(hit, value, tirx.const(0, x.dtype)), axis=taps)

    return call.lowering.compute("image", [shape[0], channels, *image], element, call.x())


def _flat(index: Sequence[Any], dims: Sequence[Dim]) -> Any:
    """The place of an element when all axes are one."""
    return reduce(lambda place, pair: place * i64(pair[1]) + pair[0], zip(index, dims), i64(0))


# -- deformed ------------------------------------------------------------------------------------------------------
def _deform_conv(call: Call) -> Value:
    """A convolution whose windows read beside their places, as far as offsets say, and as much as masks say."""
    shape, weights = call.shape(0), call.shape(1)
    if len(shape) != 4 or len(weights) != 4 or not all(isinstance(size, int) for size in weights[2:]):
        raise call.unsupported("it is not over two axes with a kernel of known size")
    call.pass_over("kernel_shape")
    windows, taps = sliding(call, shape[2:], weights[2:]), weights[2] * weights[3]
    groups, shifted = int(call.attr("group", 1)), int(call.attr("offset_group", 1))
    counts = [window.count for window in windows]
    require_inner(call, shape[1], call.dims.simplify(weights[1] * groups))
    for size, parts in ((shape[1], shifted), (weights[0], groups)):
        call.require(call.dims.same(size % parts, 0), f"its channels are not {parts} groups")
    operands = [call.x(0), call.lowering.recast(call.x(2), [shape[0], 2 * shifted * taps, *counts])]
    if call.has(4):
        operands.append(call.lowering.recast(call.x(4), [shape[0], shifted * taps, *counts]))
    width = call.dims.quotient([shape[1]], [shifted])

    def column(x: Any, offset: Any, *rest: Any) -> Any:
        masks, (image, channel, tap, *place) = rest[: len(operands) - 2], rest[len(operands) - 2 :]
        number = tirx.floordiv(channel, i64(width)) * taps + tap
        inner = [tirx.floordiv(tap, i64(weights[3])), tirx.floormod(tap, i64(weights[3]))]
        at = [
            window.place(i, t).astype(x.dtype) + offset(image, number * 2 + axis, *place)
            for axis, (window, i, t) in enumerate(zip(windows, place, inner))
        ]
        value = between(lambda *where: x(image, channel, *where), at, shape[2:], x.dtype)
        return reduce(lambda product, mask: product * mask(image, number, *place), masks, value)

    columns = call.lowering.compute("columns", [shape[0], shape[1], taps, *counts], column, *operands)
    channel, tap = (te.reduce_axis((i64(0), i64(n)), name) for n, name in ((weights[1], "channel"), (taps, "tap")))
    each = call.dims.quotient([weights[0]], [groups])

    def element(x: Any, w: Any, image: Any, output: Any, *place: Any) -> Any:
        source = tirx.floordiv(output, i64(each)) * i64(weights[1]) + channel
        return te.sum(x(image, source, tap, *place) * w(output, channel, tap), axis=[channel, tap])

    flat = call.lowering.reshape(call.x(1), [*weights[:2], taps])
    result = call.lowering.compute("deformed", [shape[0], weights[0], *counts], element, columns, flat)
    return _biased(call, result, 3)


def between(read: Callable[..., Any], at: Sequence[Any], dims: Sequence[Dim], dtype: str) -> Any:
    """The value at a place between the elements of two axes, by the four around it; 0 stands outside."""
    near = [tirx.And(p > tirx.const(-1, dtype), p < i64(d).astype(dtype)) for p, d in zip(at, dims)]
    seen = reduce(tirx.And, near)
    at = [tirx.Select(seen, place, tirx.const(0, dtype)) for place in at]
    low = [tirx.floor(place) for place in at]
    total: Any = tirx.const(0, dtype)
    for side in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner = [place.astype("int64") + step for place, step in zip(low, side)]
        exists = reduce(tirx.And, [tirx.And(c >= 0, c < i64(d)) for c, d in zip(corner, dims)])
        parts = [p - b if step else 1 - (p - b) for p, b, step in zip(at, low, side)]
        value = read(*[inside(c, d) for c, d in zip(corner, dims)]) * parts[0] * parts[1]
        total = total + tirx.Select(exists, value, tirx.const(0, dtype))
    return tirx.Select(seen, total, tirx.const(0, dtype))


OPS: dict[str, Emitter] = {
    "Conv": _conv, "ConvInteger": _conv_integer, "ConvTranspose": _conv_transpose, "Col2Im": _col2im,
    "DeformConv": _deform_conv,
}  # fmt: skip
"""Emitters by operator type; None from one means: use TVM's converter."""
