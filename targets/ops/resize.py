"""Resize: every axis by itself, from some neighbours of the place that a result comes from.

    place o of an axis ─▶ coordinate in the input ─▶ first neighbour [out], weights [out, taps] ─▶ sum over the taps
The tables depend on sizes and scales alone; where those are known the compiler computes them. As ONNX has it, a
coordinate that is a whole number belongs to the interval on its left: its last tap but one half is the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, te, tirx

from xopt.kernels.emit import i64
from xopt.targets.emitting import pick
from xopt.targets.ops.bounds import inside
from xopt.targets.ops.call import Call, Emitter, label
from xopt.targets.ops.parameters import bounded, numbers, vector
from xopt.targets.symbolic import Dim

if TYPE_CHECKING:
    from xopt.targets.emitting import Value

AT_ONCE = 16
"""Taps of all axes together up to which they are summed in one kernel; with more, one axis goes after the other."""
TRANSFORMS = frozenset((
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize",
))  # fmt: skip
ROUNDING = frozenset(("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"))


def _float(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return tirx.const(float(value), "float64")
    return value.astype("float64")


@dataclass(frozen=True)
class Axis:
    """One axis that is resized.

    Attributes:
        place: of the tensor's axes.
        size, result: how many elements it has, and shall have.
        scale: result over size: a number, or what a run-time tensor holds at a place.
        start, end: of the region of interest, as fractions of the axis, likewise.
    """

    place: int
    size: Dim
    result: Dim
    scale: Any
    start: Any = 0.0
    end: Any = 1.0


class _Resize:
    """One node: its axes, its interpolation, and its kernels."""

    def __init__(self, call: Call) -> None:
        self.call, self.lowering, self.shape = call, call.lowering, call.shape()
        self.mode = str(call.attr("mode", "nearest"))
        self.transform = str(call.attr("coordinate_transformation_mode", "half_pixel"))
        self.nearest = str(call.attr("nearest_mode", "round_prefer_floor"))
        self.cubic = float(call.attr("cubic_coeff_a", -0.75))
        self.exclude = bool(call.attr("exclude_outside", 0))
        self.outside = float(call.attr("extrapolation_value", 0.0))
        self.antialias = bool(call.attr("antialias", 0))
        self.policy = str(call.attr("keep_aspect_ratio_policy", "stretch"))
        known = self.mode in ("nearest", "linear", "cubic") and self.transform in TRANSFORMS
        if not known or self.nearest not in ROUNDING or self.policy not in ("stretch", "not_larger", "not_smaller"):
            raise call.unsupported("there is no such mode")
        given = call.attr("axes")
        self.places = call.axes(range(len(self.shape)) if given is None else given, len(self.shape))
        self.tensors: list[relax.Expr] = []

    # -- sizes -----------------------------------------------------------------------------------------------------
    def axes(self) -> list[Axis]:
        """The axes that change, or are cropped."""
        sizes = (self.call.has(3) and self.call.const(3) is None) or self._given(3)
        found = self._by_sizes() if sizes else self._by_scales()
        found = self._with_regions(found)
        cropped = self.transform == "tf_crop_and_resize"
        return [axis for axis in found if cropped or not self._stays(axis)]

    def _given(self, index: int) -> bool:
        return self.call.has(index) and not self.call.dims.equal(self.call.dims.product(self.call.shape(index)), 0)

    def _stays(self, axis: Axis) -> bool:
        same = self.call.dims.equal(axis.size, axis.result)
        return same and ((isinstance(axis.scale, float) and axis.scale == 1.0) or not isinstance(axis.scale, float))

    def _by_sizes(self) -> list[Axis]:
        known = self.call.known(3)
        if known is None:
            if self.policy != "stretch":
                return self._keeping_ratio_of_data()
            wanted = self._decided(lambda row: row, vector(self.call, 3))
        else:
            wanted = [int(x) if isinstance(x, float) else x for x in known.reshape(-1)]
        if len(wanted) != len(self.places):
            raise self.call.unsupported(f"{len(wanted)} sizes do not fit {len(self.places)} axes")
        before = [self.shape[place] for place in self.places]
        self.call.dims.require_sizes(wanted, f"{label(self.call.node)}: its result")
        for dim in before:
            self.call.require(dim >= 1, "it enlarges nothing")
        if self.policy != "stretch":
            return self._keeping_ratio(before, wanted)
        return [
            Axis(place, size, new, new / size if isinstance(size, int) and isinstance(new, int) else None)
            for place, size, new in zip(self.places, before, wanted)
        ]

    def _keeping_ratio(self, before: Sequence[Dim], wanted: Sequence[Dim]) -> list[Axis]:
        if not all(isinstance(dim, int) for dim in (*before, *wanted)):
            raise self.call.unsupported("it keeps the ratio of dynamic axes")
        choose = min if self.policy == "not_larger" else max
        scale = choose(new / size for size, new in zip(before, wanted))
        return [Axis(place, size, math.floor(scale * size + 0.5), scale) for place, size in zip(self.places, before)]

    def _keeping_ratio_of_data(self) -> list[Axis]:
        """One scale for all axes, the smallest or the largest that the sizes ask for."""
        choose = tirx.min if self.policy == "not_larger" else tirx.max
        before = [self.shape[place] for place in self.places]

        def ratio(tensor: Any, _: Any) -> Any:
            return reduce(choose, [_float(tensor(i64(k))) / _float(i64(size)) for k, size in enumerate(before)])

        table = self.lowering.compute("ratio", [len(before)], ratio, vector(self.call, 3))
        return self._by_table(table, lambda scale, size: tirx.floor(scale * size + _float(0.5)))

    def _by_scales(self) -> list[Axis]:
        if not self._given(2):
            raise self.call.unsupported("it has neither sizes nor scales")
        if (count := self.call.dims.product(self.call.shape(2))) != len(self.places):
            raise self.call.unsupported(f"{count} scales do not fit {len(self.places)} axes")
        scales = self.call.const(2)
        if scales is None:
            return self._by_table(self._float_vector(2), lambda scale, size: tirx.floor(scale * size))
        return [
            Axis(place, self.shape[place], self._scaled(self.shape[place], float(scale)), float(scale))
            for place, scale in zip(self.places, scales.reshape(-1))
        ]

    def _by_table(self, table: relax.Expr, result: Callable[[Any, Any], Any]) -> list[Axis]:
        """Axes whose scales are the numbers of a run-time tensor; ``result(scale, size)`` is a new size."""
        before = [self.shape[place] for place in self.places]

        def sizes(row: Sequence[Any]) -> list[Any]:
            return [result(_float(scale), _float(i64(size))) for scale, size in zip(row, before)]

        results, position = self._decided(sizes, table), self._tensor(table)
        return [
            Axis(place, size, new, (position, k))
            for k, (place, size, new) in enumerate(zip(self.places, before, results))
        ]

    def _scaled(self, size: Dim, scale: float) -> Dim:
        if not 0 < scale < math.inf:
            raise self.call.unsupported(f"a scale is {scale:g}")
        if isinstance(size, int):
            return math.floor(scale * size)
        ratio = Fraction(scale).limit_denominator(1 << 10)
        if np.float32(ratio.numerator / ratio.denominator) != np.float32(scale):
            raise self.call.unsupported(f"it scales a dynamic axis by {scale:g}")
        return self.call.dims.simplify(tirx.floordiv(size * ratio.numerator, i64(ratio.denominator)))

    def _decided(self, sizes: Callable[[Sequence[Any]], Sequence[Any]], table: relax.Expr) -> list[Dim]:
        """Results' sizes that the data decide, within bounds."""
        count = len(self.places)

        def element(tensor: Any) -> list[Any]:
            return bounded([i64(size) for size in sizes([tensor(i64(k)) for k in range(count)])])

        dims: list[Dim] = list(self.lowering.decide(numbers(self.call, "sizes", count, element, table), count))
        declared = self.call.node.outputs[0].shape
        for k, place in enumerate(self.places):
            self.call.require(dims[k] >= 1, "its result would have no elements, or too many")
            if declared is not None and isinstance(told := declared[place], int):
                self.call.require(self.call.dims.same(dims[k], told), f"its result would not have the declared {told}")
                dims[k] = told
        return dims

    def _float_vector(self, index: int) -> relax.Expr:
        x = self.call.x(index)
        count = self.call.dims.product(self.call.shape(index))
        flat = self.lowering.reshape(x, [count])
        return flat if str(x.ty.dtype) == "float32" else self.call.emit(relax.op.astype(flat, "float32"))

    def _tensor(self, tensor: relax.Expr) -> int:
        """Have a tensor given to the kernels of the tables; where it stands among those."""
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _with_regions(self, axes: list[Axis]) -> list[Axis]:
        if self.transform != "tf_crop_and_resize":
            self.call.has(1)  # a region that this transformation does not look at
            return axes
        region, count = self.call.const(1), len(self.places)
        if not self._given(1):
            raise self.call.unsupported("it crops, and has no region")
        if self.call.dims.product(self.call.shape(1)) != 2 * count:
            raise self.call.unsupported("its region does not fit its axes")
        if region is not None:
            bounds: list[Any] = [float(bound) for bound in region.reshape(-1)]
        else:
            position = self._tensor(self._float_vector(1))
            bounds = [(position, k) for k in range(2 * count)]
        return [
            Axis(axis.place, axis.size, axis.result, axis.scale, bounds[k], bounds[count + k])
            for k, axis in enumerate(axes)
        ]

    # -- coordinates and weights -----------------------------------------------------------------------------------
    def _number(self, axis: Axis, value: Any, tensors: Sequence[Any]) -> Any:
        """A scale or a bound as a float64 expression."""
        if value is None:
            return _float(i64(axis.result)) / _float(i64(axis.size))
        if isinstance(value, tuple):
            return _float(tensors[value[0]](i64(value[1])))
        return _float(value)

    def _coordinate(self, axis: Axis, place: Any, tensors: Sequence[Any]) -> Any:
        """Where the result at ``place`` comes from, in elements of the input (float64)."""
        scale = self._number(axis, axis.scale, tensors)
        o, size = _float(place), _float(i64(axis.size))
        width = scale * size
        one, half = _float(1), _float(0.5)
        centred = self._shrunk(axis, o + half, scale) - half
        if self.transform == "half_pixel":
            return centred
        if self.transform == "asymmetric":
            return self._shrunk(axis, o, scale)
        if self.transform == "half_pixel_symmetric":
            return size / 2.0 * (one - _float(i64(axis.result)) / width) + centred
        if self.transform == "pytorch_half_pixel":
            return tirx.Select(_float(i64(axis.result)) == one, _float(0), centred)
        over = tirx.Select(width == one, one, width - one)
        if self.transform == "align_corners":
            return tirx.Select(width == one, _float(0), o * (size - one) / over)
        start, end = (self._number(axis, bound, tensors) for bound in (axis.start, axis.end))
        inside = tirx.Select(width == one, (end - start) * (size - one) / 2.0, o * (end - start) * (size - one) / over)
        return inside + start * (size - one)

    def _shrunk(self, axis: Axis, place: Any, scale: Any) -> Any:
        """A place over the scale; exact where sizes give it."""
        if axis.scale is None:
            return place * _float(i64(axis.size)) / _float(i64(axis.result))
        return place / scale

    def taps(self, axis: Axis) -> int:
        """How many neighbours a result is summed up from."""
        if self.mode == "nearest":
            return 1
        reach = 1 if self.mode == "linear" else 2
        if not self.antialias:
            return 2 * reach
        if not isinstance(axis.scale, float) and not (isinstance(axis.size, int) and isinstance(axis.result, int)):
            raise self.call.unsupported("antialias with a scale that is not known")
        least = axis.scale if isinstance(axis.scale, float) else axis.result / axis.size  # results are rounded down
        return 2 * -math.floor(-reach / min(least, 1.0))

    def _first(self, axis: Axis, place: Any, tensors: Sequence[Any]) -> Any:
        """The first neighbour; for nearest the one that is taken."""
        x = self._coordinate(axis, place, tensors)
        left = tirx.ceil(x) - _float(1)
        if self.mode != "nearest":
            return left.astype("int64") + (1 - self.taps(axis) // 2)
        ratio = x - left
        to_left = {
            "round_prefer_floor": ratio <= 0.5,
            "round_prefer_ceil": ratio < 0.5,
            "floor": ratio < 1.0,
            "ceil": tirx.const(False, "bool"),
        }[self.nearest]
        return tirx.Select(to_left, left, left + _float(1)).astype("int64")

    def _weight(self, axis: Axis, place: Any, tap: int, tensors: Sequence[Any]) -> Any:
        """The weight of a neighbour before they are made to add up to 1 (float64)."""
        x = self._coordinate(axis, place, tensors)
        ratio = x - (tirx.ceil(x) - _float(1))
        shrink = tirx.min(self._number(axis, axis.scale, tensors), _float(1)) if self.antialias else _float(1)
        distance = tirx.abs((_float(1 - self.taps(axis) // 2 + tap) - ratio) * shrink)
        if self.mode == "linear":
            weight = tirx.max(_float(1) - distance, _float(0))
        else:
            a, d = _float(self.cubic), distance
            near = ((a + 2.0) * d - (a + 3.0)) * d * d + _float(1)
            far = ((a * d - a * 5.0) * d + a * 8.0) * d - a * 4.0
            weight = tirx.Select(d <= 1.0, near, tirx.Select(d < 2.0, far, _float(0)))
        if not self.exclude:
            return weight
        index = self._first(axis, place, tensors) + tap
        return tirx.Select(tirx.all(index >= 0, index < i64(axis.size)), weight, _float(0))

    def tables(self, axis: Axis) -> list[relax.Expr]:
        """First neighbour int64 [out], and weights float32 [out, taps]; for nearest the former alone."""
        compute, count = self.lowering.compute, len(self.tensors)
        firsts = compute("neighbours", [axis.result], lambda *a: self._first(axis, a[count], a[:count]), *self.tensors)
        if self.mode == "nearest":
            return [firsts]
        taps = self.taps(axis)

        def weight(*arguments: Any) -> Any:
            tensors, place, tap = arguments[:count], arguments[count], arguments[count + 1]
            every = [self._weight(axis, place, k, tensors) for k in range(taps)]
            total = reduce(lambda a, b: a + b, every) if self.antialias or self.exclude else _float(1)
            return (pick(tap, every) / total).astype("float32")

        return [firsts, compute("weights", [axis.result, taps], weight, *self.tensors)]

    # -- kernels ---------------------------------------------------------------------------------------------------
    def run(self) -> Value:
        x = self.call.x()
        dtype = str(x.ty.dtype)
        if self.mode != "nearest" and "float" not in dtype:
            raise self.call.unsupported(f"it interpolates {dtype}")
        axes = self.axes()
        if self.mode != "nearest" and dtype != "float32":
            x = self.call.emit(relax.op.astype(x, "float32"))
        groups = [axes] if math.prod(self.taps(axis) for axis in axes) <= AT_ONCE else [[axis] for axis in axes]
        for group in groups if axes else []:
            x = self._resampled(x, group)
        if self.transform == "tf_crop_and_resize":
            x = self._extrapolated(x, axes)
        return x if str(x.ty.dtype) == dtype else self.call.emit(relax.op.astype(x, dtype))

    def _resampled(self, x: relax.Expr, axes: list[Axis]) -> relax.Expr:
        shape = self.lowering.shape_of(x)
        result = list(shape)
        for axis in axes:
            result[axis.place] = axis.result
        tables = [self.tables(axis) for axis in axes]
        if len(axes) == 1 and self.taps(axes[0]) > AT_ONCE:
            return self._summed(x, axes[0], tables[0], result)
        per = len(tables[0])

        def element(data: Any, *rest: Any) -> Any:
            given, index = rest[: per * len(axes)], list(rest[per * len(axes) :])

            def value(left: int, where: list[Any]) -> Any:
                if left == len(axes):
                    return data(*where)
                axis = axes[left]
                out, first = index[axis.place], given[per * left](index[axis.place])
                parts = []
                for tap in range(self.taps(axis)):
                    at = list(where)
                    at[axis.place] = inside(first + tap, axis.size)
                    part = value(left + 1, at)
                    parts.append(part if per == 1 else given[per * left + 1](out, i64(tap)) * part)
                return reduce(lambda a, b: a + b, parts)

            return value(0, index)

        return self.lowering.compute("resize", result, element, x, *[t for pair in tables for t in pair])

    def _summed(self, x: relax.Expr, axis: Axis, tables: list[relax.Expr], result: list[Dim]) -> relax.Expr:
        tap = te.reduce_axis((i64(0), i64(self.taps(axis))), "tap")

        def element(data: Any, firsts: Any, weights: Any, *index: Any) -> Any:
            at = list(index)
            at[axis.place] = inside(firsts(index[axis.place]) + tap, axis.size)
            return te.sum(weights(index[axis.place], tap) * data(*at), axis=[tap])

        return self.lowering.compute("resize", result, element, x, *tables)

    def _extrapolated(self, x: relax.Expr, axes: list[Axis]) -> relax.Expr:
        """What comes from outside of the input is the node's own number."""
        count = len(self.tensors)
        flags = []
        for axis in axes:

            def outside(*arguments: Any, axis: Axis = axis) -> Any:
                place = self._coordinate(axis, arguments[count], arguments[:count])
                return tirx.any(place < 0.0, place > _float(i64(axis.size)) - 1.0)

            flags.append(self.lowering.compute("outside", [axis.result], outside, *self.tensors))
        fill = tirx.const(self.outside, str(x.ty.dtype))

        def element(data: Any, *rest: Any) -> Any:
            given, index = rest[: len(flags)], rest[len(flags) :]
            return tirx.Select(tirx.any(*[f(index[a.place]) for f, a in zip(given, axes)]), fill, data(*index))

        return self.lowering.compute("extrapolate", self.lowering.shape_of(x), element, x, *flags) if axes else x


OPS: dict[str, Emitter] = {"Resize": lambda call: _Resize(call).run()}
"""Emitters by operator type."""
