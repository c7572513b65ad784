"""Windows that slide over the axes of an image: where they stand, how many there are, and what of them is inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import relax, te, tirx

from xopt.kernels.emit import i64
from xopt.targets.ops.call import Call
from xopt.targets.symbolic import Dim


@dataclass(frozen=True)
class Window:
    """How windows lie on one axis: element ``tap`` of window ``o`` at ``o * stride + tap * dilation - before``.

    Attributes:
        size: elements of the axis.
        taps: elements of a window.
        stride, dilation: from a window to the next, from an element to the next.
        before, after: elements that are added to the axis.
        count: how many windows there are.
    """

    size: Dim
    taps: int
    stride: int
    dilation: int
    before: Dim
    after: Dim
    count: Dim

    def place(self, window: Any, tap: Any) -> Any:
        """Where an element of a window lies on the axis."""
        return window * self.stride + tap * self.dilation - self.before

    @property
    def reach(self) -> int:
        """From the first element of a window to behind its last."""
        return (self.taps - 1) * self.dilation + 1

    def end(self) -> Dim:
        """Where the last window ends, counted from where the first begins."""
        return (self.count - 1) * self.stride + self.reach

    def inside(self, window: Any, low: Dim, high: Dim) -> Any:
        """How many elements of a window lie from ``low`` up to before ``high``."""
        first = window * self.stride - self.before
        begin, end = (tirx.floordiv(bound - first + self.dilation - 1, i64(self.dilation)) for bound in (low, high))
        begin, end = tirx.max(begin, i64(0)), tirx.min(end, i64(self.taps))
        return tirx.max(end - begin, i64(0))


def attributes(call: Call, rank: int) -> tuple[list[int], list[int]]:
    """Strides and dilations of ``rank`` axes. Raises InputError E-UNSUPPORTED-OP when they are not positive."""
    found = [[int(x) for x in call.attr(name, [1] * rank)] for name in ("strides", "dilations")]
    for name, numbers in zip(("strides", "dilations"), found):
        if len(numbers) != rank or min(numbers, default=1) < 1:
            raise call.unsupported(f"its {name} are not {rank} positive numbers")
    return found[0], found[1]


def explicit_pads(call: Call, rank: int) -> tuple[list[int], list[int]]:
    """Attribute ``pads``: before and after each axis. Raises InputError E-UNSUPPORTED-OP when they do not fit."""
    pads = [int(x) for x in call.attr("pads", [0] * 2 * rank)]
    if len(pads) != 2 * rank or min(pads, default=0) < 0:
        raise call.unsupported(f"its pads are not {2 * rank} numbers from 0 on")
    return pads[:rank], pads[rank:]


def sliding(call: Call, sizes: Sequence[Dim], taps: Sequence[int], ceil: bool = False) -> list[Window]:
    """The windows of a node that reads them, by its attributes.

    Args:
        call: the node.
        sizes: of the axes.
        taps: elements of a window along each of them.
        ceil: whether a last window may reach over the end.

    Raises:
        InputError: E-UNSUPPORTED-OP, an axis is shorter than the window, or the attributes make no sense.
    """
    rank, kind = len(sizes), str(call.attr("auto_pad", "NOTSET"))
    if kind not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise call.unsupported("there is no such auto_pad")
    if len(taps) != rank or min(taps, default=1) < 1:
        raise call.unsupported(f"its kernel does not fit {rank} axes")
    (strides, dilations), (before, after) = attributes(call, rank), explicit_pads(call, rank)
    result = []
    for axis, size in enumerate(sizes):
        window = Window(size, taps[axis], strides[axis], dilations[axis], before[axis], after[axis], 0)
        result.append(_placed(call, window, kind, ceil))
    return result


def _placed(call: Call, given: Window, kind: str, ceil: bool) -> Window:
    """With the padding and the number of windows that ``auto_pad`` asks for."""
    size, stride, reach = i64(given.size), given.stride, given.reach
    if kind.startswith("SAME"):
        count = tirx.floordiv(size + (stride - 1), i64(stride))
        total = tirx.max((count - 1) * stride + reach - size, i64(0))
        small = tirx.floordiv(total, i64(2))
        before, after = (small, total - small) if kind == "SAME_UPPER" else (total - small, small)
    else:
        before, after = (i64(0), i64(0)) if kind == "VALID" else (i64(given.before), i64(given.after))
        room = size + before + after - reach
        call.require(room >= (1 - stride if ceil else 0), "an axis of the image is shorter than the kernel")
        count = tirx.floordiv(room, i64(stride)) + 1
        if ceil and kind == "NOTSET":  # the last window begins in the image or before it
            most = tirx.floordiv(size + before - 1, i64(stride)) + 1
            count = tirx.min(tirx.floordiv(room + (stride - 1), i64(stride)) + 1, most)
    before, after, count = (call.dims.simplify(x) for x in (before, after, count))
    return Window(given.size, given.taps, stride, given.dilation, before, after, count)


def padded(call: Call, x: relax.Expr, windows: Sequence[Window], fill: float) -> tuple[relax.Expr, list[Window]]:
    """``x`` [N, C, sizes of the windows' axes] with all that windows cover, and the windows on it."""
    shape = call.lowering.shape_of(x)
    ends = [call.dims.simplify(window.end()) for window in windows]
    moved = [Window(end, w.taps, w.stride, w.dilation, 0, 0, w.count) for w, end in zip(windows, ends)]
    within = [call.dims.proves(i64(w.size) + w.before >= end) for w, end in zip(windows, ends)]
    if all(ok and call.dims.equal(w.before, 0) for ok, w in zip(within, windows)):
        return x, moved
    outer = len(shape) - len(windows)

    def element(tensor: Any, *index: Any) -> Any:
        at = [i - w.before for i, w in zip(index[outer:], windows)]
        inside = [tirx.And(place >= 0, place < i64(w.size)) for place, w in zip(at, windows)]
        return tirx.if_then_else(reduce(tirx.And, inside), tensor(*index[:outer], *at), tirx.const(fill, tensor.dtype))

    return call.lowering.compute("padded", [*shape[:outer], *ends], element, x), moved


def taps_of(windows: Sequence[Window]) -> list[Any]:
    """Reduction axes over the elements of a window."""
    return [te.reduce_axis((i64(0), i64(w.taps)), f"tap{axis}") for axis, w in enumerate(windows)]
