"""Regions of images: grids of places, pooling over regions, and boxes that hide each other."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, te, tirx

from xopt.kernels import suppression
from xopt.kernels.emit import i64
from xopt.runtime.device import CPU
from xopt.targets.ops.bounds import check_indices, inside, refuse_rows, valid
from xopt.targets.ops.call import Call, Emitter
from xopt.targets.ops.layout import strided
from xopt.targets.ops.parameters import sizes, vector
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value


# -- grids ---------------------------------------------------------------------------------------------------------
def _affine_grid(call: Call) -> Value:
    """[N, D, H, W, 3] or [N, H, W, 2]: where each element of an image comes from, from -1 to 1."""
    theta, wanted = call.shape(0), sizes(call, 1)
    rank = len(wanted) - 2
    if rank not in (2, 3) or len(theta) != 3:
        raise call.unsupported("it is not over two or three axes")
    for given, asked in zip(theta, (wanted[0], rank, rank + 1)):
        call.require(call.dims.same(given, asked), "its matrices do not fit the size that is asked for")
    corners, dtype = bool(call.attr("align_corners", 0)), str(call.x(0).ty.dtype)

    def place(index: Any, size: Dim) -> Any:
        number, count = index.astype(dtype), i64(size).astype(dtype)
        if not corners:
            return (number * 2 + 1) / count - 1
        step = number * 2 / tirx.max(count - 1, tirx.const(1, dtype)) - 1
        return tirx.Select(count > 1, step, tirx.const(0, dtype))

    def element(matrix: Any, *index: Any) -> Any:
        image, *inner, axis = index
        at = [place(i, size) for i, size in zip(inner, wanted[2:])][::-1]
        terms = [matrix(image, axis, i64(k)) * value for k, value in enumerate(at)]
        return reduce(lambda a, b: a + b, terms) + matrix(image, axis, i64(rank))

    return call.lowering.compute("affine_grid", [wanted[0], *wanted[2:], rank], element, call.x(0))


# -- regions -------------------------------------------------------------------------------------------------------
def _roi_align(call: Call) -> Value | None:
    """The largest of weighted neighbours in each part of a region; None for means, which TVM's converter takes."""
    if call.attr("mode", "avg") != "max":
        return None
    samples = int(call.attr("sampling_ratio", 0))
    transform = str(call.attr("coordinate_transformation_mode", "half_pixel"))
    if transform not in ("half_pixel", "output_half_pixel"):
        raise call.unsupported(f"there is no transformation {transform!r}")
    shape, regions = call.shape(0), call.shape(1)
    call.require(call.dims.same(regions[1], 4), "its regions are not four numbers each")
    call.require(call.dims.same(regions[0], call.shape(2)[0]), "inputs 1 and 2 do not fit")
    check_indices(call, 2, [shape[0]])
    result = [int(call.attr(name, 1)) for name in ("output_height", "output_width")]
    scale, shift = float(call.attr("spatial_scale", 1.0)), 0.5 if transform == "half_pixel" else 0.0
    most = [i64(samples) if samples > 0 else i64(d) // n + 1 for d, n in zip(shape[2:], result)]
    taps = [te.reduce_axis((i64(0), count), f"sample{axis}") for axis, count in enumerate(most)]
    dtype = str(call.x(0).ty.dtype)

    def extent(start: Any, end: Any) -> Any:
        return end - start if shift else tirx.max(end - start, tirx.const(1, dtype))

    def count(step: Any) -> Any:
        return tirx.const(samples, dtype) if samples > 0 else tirx.ceil(step)

    def too_large(row: list[Any]) -> Any:
        steps = [extent(row[1 - axis] * scale, row[3 - axis] * scale) / n for axis, n in enumerate(result)]
        fits = [tirx.ceil(step) <= one.astype(dtype) for step, one in zip(steps, most)]
        return tirx.Not(tirx.And(*fits))

    if samples < 1:
        refuse_rows(call, 1, 4, too_large, "a region is larger than the image")

    def coordinate(rois: Any, region: Any, part: Any, axis: int) -> tuple[Any, Any]:
        start, end = (rois(region, i64(1 - axis + 2 * side)) * scale - shift for side in range(2))
        step = extent(start, end) / result[axis]
        place = start + part.astype(dtype) * step + (taps[axis].astype(dtype) + 0.5) * step / count(step)
        return place, taps[axis].astype(dtype) < count(step)

    def element(x: Any, rois: Any, images: Any, region: Any, channel: Any, *parts: Any) -> Any:
        at, taken = zip(*(coordinate(rois, region, part, axis) for axis, part in enumerate(parts)))
        image = valid(images(region), shape[0])
        corners = _weighted_corners(lambda *where: x(image, channel, *where), [*at], shape[2:], dtype)
        return te.max(tirx.Select(tirx.And(*taken), reduce(tirx.max, corners), tirx.min_value(dtype)), axis=taps)

    def without_samples(y: Any, rois: Any, region: Any, *rest: Any) -> Any:
        steps = [
            extent(*(rois(region, i64(1 - axis + 2 * side)) * scale - shift for side in range(2))) for axis in range(2)
        ]
        found = tirx.And(*(step > tirx.const(0, dtype) for step in steps))
        return tirx.Select(found, y(region, *rest), tirx.const(0, dtype))

    operands, size = [call.x(0), call.x(1), call.x(2)], [regions[0], shape[1], *result]
    largest = call.lowering.compute("regions", size, element, *operands)
    return largest if samples > 0 else call.lowering.compute("filled", size, without_samples, largest, call.x(1))


def _max_roi_pool(call: Call) -> Value:
    """The largest element in each part of a region [image, x1, y1, x2, y2]; 0 where there is none."""
    shape, regions = call.shape(0), call.shape(1)
    result, scale = [int(size) for size in call.attr("pooled_shape")], float(call.attr("spatial_scale", 1.0))
    if len(shape) != 4 or len(regions) != 2 or len(result) != 2 or min(result) < 1:
        raise call.unsupported("it is not over two axes of images and a list of regions")
    call.require(call.dims.same(regions[1], 5), "its regions are not five numbers each")
    dtype = str(call.x(0).ty.dtype)
    zero, half = tirx.const(0, dtype), tirx.const(0.5, dtype)
    images = i64(shape[0]).astype(dtype)
    refuse_rows(call, 1, 5, lambda row: tirx.Not(tirx.And(row[0] >= zero, row[0] < images)), "an image is outside")
    places = [te.reduce_axis((i64(0), i64(size)), f"place{axis}") for axis, size in enumerate(shape[2:])]

    def corner(rois: Any, region: Any, place: int) -> Any:
        number = rois(region, i64(place)) * scale
        return tirx.Select(number < zero, tirx.ceil(number - half), tirx.floor(number + half))

    def bounds(rois: Any, region: Any, part: Any, axis: int) -> tuple[Any, Any]:
        """Ends of a part, within the image."""
        first, last = corner(rois, region, 2 - axis), corner(rois, region, 4 - axis)
        step = tirx.max(last - first + 1, tirx.const(1, dtype)) / result[axis]
        most = i64(shape[2 + axis]).astype(dtype)
        ends = (tirx.floor(part.astype(dtype) * step), tirx.ceil((part.astype(dtype) + 1) * step))
        low, high = (tirx.max(tirx.min(first + end, most), zero) for end in ends)
        return low, high

    def element(x: Any, rois: Any, region: Any, channel: Any, *parts: Any) -> Any:
        taken = []
        for axis, (part, place) in enumerate(zip(parts, places)):
            low, high = bounds(rois, region, part, axis)
            taken.append(tirx.And(place.astype(dtype) >= low, place.astype(dtype) < high))
        image = inside(rois(region, i64(0)).astype("int64"), shape[0])
        return te.max(tirx.Select(tirx.And(*taken), x(image, channel, *places), tirx.min_value(dtype)), axis=places)

    def filled(y: Any, rois: Any, region: Any, channel: Any, *parts: Any) -> Any:
        ends = [bounds(rois, region, part, axis) for axis, part in enumerate(parts)]
        found = tirx.And(*(low < high for low, high in ends))
        return tirx.Select(found, y(region, channel, *parts), zero)

    size = [regions[0], shape[1], *result]
    largest = call.lowering.compute("regions", size, element, call.x(0), call.x(1))
    return call.lowering.compute("filled", size, filled, largest, call.x(1))


def _weighted_corners(read: Any, at: list[Any], dims: list[Dim], dtype: str) -> list[Any]:
    """The four elements around a place, each as much as it is near; those at the border stand outside, too."""
    zero, one = tirx.const(0, dtype), tirx.const(1, dtype)
    seen = reduce(tirx.And, [tirx.And(p >= -one, p <= i64(d).astype(dtype)) for p, d in zip(at, dims)])
    near = [tirx.max(tirx.min(p, (i64(d) - 1).astype(dtype)), zero) for p, d in zip(at, dims)]
    low = [inside(place.astype("int64"), d) for place, d in zip(near, dims)]
    corners = []
    for side in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weights = [p - b.astype(dtype) if step else one - (p - b.astype(dtype)) for p, b, step in zip(near, low, side)]
        value = read(*[inside(b + step, d) for b, step, d in zip(low, side, dims)])
        corners.append(tirx.Select(seen, value * weights[0] * weights[1], zero))
    return corners


# -- boxes ---------------------------------------------------------------------------------------------------------
def _non_max_suppression(call: Call) -> Value:
    """int64 [count, 3]: batch, class and number of the boxes that are taken."""
    boxes, scores, lowering = call.shape(0), call.shape(1), call.lowering
    if len(boxes) != 3 or len(scores) != 3 or lowering.target.device != CPU:
        raise call.unsupported("its boxes or scores have another rank than 3, or the target is no CPU")
    wanted = [*(call.dims.same(a, b) for a, b in zip(boxes, (scores[0], scores[2]))), call.dims.same(boxes[2], 4)]
    for condition in wanted:
        call.require(condition, "its boxes and scores do not fit")
    centred = bool(call.attr("center_point_box", 0))
    if not call.has(2):  # none are asked for
        call.pass_over(3, 4)
        return call.emit(relax.op.zeros([0, 3], "int64"))
    numbers = [vector(call, 2)]
    for index, default in ((3, 0.0), (4, float("-inf"))):
        given = call.x(index) if call.has(index) else relax.const(np.array([default], np.float32))
        numbers.append(lowering.reshape(given, [1]))
    most = call.dims.product(scores)
    inputs = [call.x(0), call.x(1), *numbers]
    taken, count = lowering.call_for_all(
        suppression.name(centred), lambda: suppression.build(centred), inputs, [[most, 3], [1]], ["int64", "int64"]
    )
    return strided(call, taken, {0: (0, lowering.decide(count, 1)[0], 1)})


OPS: dict[str, Emitter] = {
    "AffineGrid": _affine_grid, "MaxRoiPool": _max_roi_pool, "RoiAlign": _roi_align,
    "NonMaxSuppression": _non_max_suppression,
}  # fmt: skip
"""Emitters by operator type; None from one means: use TVM's converter."""
