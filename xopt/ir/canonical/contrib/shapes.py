"""Operators that ONNX has had under other names or attributes since."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.site import Attributes, Site

_SAMPLING = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}


def _trilu(site: Site) -> Results:
    return [site.op("Trilu", site.value("X"), site.given("k"), upper=int(site.attr("upper")))]


def _expand_dims(site: Site) -> Results:
    axis = site.op("Reshape", site.cast(site.value("axis"), ir.DataType.INT64), site.ints(1))
    return [site.op("Unsqueeze", site.value("X"), axis)]


def _pad(site: Site) -> Results:
    """Pads may be a row of a matrix, the fill a vector."""
    pads, value = site.value("pads"), site.given("value")
    pads = site.op("Reshape", pads, site.ints(-1)) if site.rank(pads) != 1 else pads
    if value is not None and site.rank(value):
        value = site.op("Reshape", value, site.ints())
    return [site.op("Pad", site.value("data"), pads, value, mode=str(site.attr("mode")))]


def _unique(site: Site) -> Results:
    """Values in the order in which they come first, the place of each element among them, and how often each is."""
    x = site.value("x")
    values, _, places, counts = site.several("Unique", 4, x, sorted=0, dtype=ir.DataType.INT64)
    values.type = ir.TensorType(site.dtype(x))
    return [values, places, counts]


def _gather_nd(site: Site) -> Results:
    return [site.op("GatherND", site.value("data"), site.cast(site.value("indices"), ir.DataType.INT64))]


def _grid_sample(site: Site) -> Results:
    mode = str(site.attr("mode"))
    if mode not in _SAMPLING:
        raise site.refused(f"mode is {mode!r}")
    attributes: Attributes = {
        "align_corners": int(site.attr("align_corners")),
        "padding_mode": str(site.attr("padding_mode")),
    }
    return [site.op("GridSample", site.value("X"), site.value("Grid"), mode=_SAMPLING[mode], **attributes)]


def _embedding(site: Site) -> Results:
    """What the other inputs say is for training."""
    site.pass_over("padding_idx", "scale_grad_by_freq")
    return [site.op("Gather", site.value("weight"), site.value("indices"))]


def _range(site: Site) -> Results:
    start, limit = (site.op("Reshape", site.value(name), site.ints()) for name in ("start", "limit"))
    step = site.given("delta")
    return [
        site.op("Range", start, limit, site.number(1, start) if step is None else site.op("Reshape", step, site.ints()))
    ]


def _unfold(site: Site) -> Results:
    """Windows along an axis, which become the last axis."""
    x, length, step = site.value("input"), int(site.attr("size")), int(site.attr("step"))
    rank = site.rank(x)
    axis = int(site.attr("dim")) % rank
    extent = site.size(x, axis)
    if not 1 <= length <= extent or step < 1:
        raise site.refused(f"windows of {length} in steps of {step} on {extent} elements")
    site.few(((extent - length) // step + 1) * length)
    places = np.arange(0, extent - length + 1, step)[:, None] + np.arange(length)
    windows = site.op("Gather", x, site.array("windows", places), axis=axis)
    order = [place for place in range(rank + 1) if place != axis + 1]
    return [site.op("Transpose", windows, perm=[*order, axis + 1])]


def _distances(site: Site) -> Results:
    """Between all rows of A and all of B."""
    a, b = site.op("Unsqueeze", site.value("A"), site.ints(1)), site.op("Unsqueeze", site.value("B"), site.ints(0))
    metric = str(site.attr("metric"))
    if metric not in ("sqeuclidean", "euclidean"):
        raise site.refused(f"metric is {metric!r}")
    squares = site.op("ReduceSumSquare", site.op("Sub", a, b), site.ints(-1), keepdims=0)
    return [squares if metric == "sqeuclidean" else site.op("Sqrt", squares)]


def _crop(site: Site) -> Results:
    """Regions [y1, x1, y2, x2] of pictures, in parts of their size, resized: corners fall on corners."""
    x, regions, mode = site.value("X"), site.value("rois"), str(site.attr("mode"))
    if mode not in ("bilinear", "nearest"):
        raise site.refused(f"mode is {mode!r}")
    target = [int(size) for size in site.constant(site.value("crop_size"), "crop_size").reshape(-1)]
    if len(target) != 2 or min(target) < 1:
        raise site.refused(f"crop_size is {target}")
    corners = site.several("Split", 4, regions, axis=1, num_outputs=4)
    places = [_places(site, corners[k], corners[k + 2], target[k], site.size(x, 2 + k), mode) for k in (0, 1)]
    rows = site.op("Unsqueeze", places[0][0], site.ints(2))
    columns = site.op("Unsqueeze", places[1][0], site.ints(1))
    shape = site.op("Concat", site.length(regions, 0), site.ints(*target), axis=0)
    grid = [site.op("Unsqueeze", site.op("Expand", one, shape), site.ints(-1)) for one in (columns, rows)]
    pictures = site.op("Gather", x, site.value("batch_indices"), axis=0)
    how: Attributes = {"mode": "linear" if mode == "bilinear" else mode, "padding_mode": "border", "align_corners": 1}
    sampled = site.op("GridSample", pictures, site.op("Concat", *grid, axis=-1), **how)
    inside = site.op(
        "And", site.op("Unsqueeze", places[0][1], site.ints(2)), site.op("Unsqueeze", places[1][1], site.ints(1))
    )
    outside = site.number(float(site.attr("extrapolation_value")), x)
    return [site.op("Where", site.op("Unsqueeze", inside, site.ints(1)), sampled, outside)]


def _places(site: Site, first: ir.Value, last: ir.Value, count: int, size: int, mode: str) -> tuple[ir.Value, ir.Value]:
    """Where ``count`` samples from ``first`` to ``last`` [R, 1] lie, from -1 to 1, and whether within the picture."""
    steps = np.arange(site.few(count)) / (count - 1) if count > 1 else np.asarray([0.5])
    share = site.array("steps", steps.astype(site.dtype(first).numpy()))
    most = site.number(size - 1, first)
    along = site.op("Add", first, site.op("Mul", site.op("Sub", last, first), share))
    pixels = site.op("Mul", along, most)
    inside = site.op(
        "And", site.op("GreaterOrEqual", pixels, site.number(0, first)), site.op("LessOrEqual", pixels, most)
    )
    if mode == "nearest":
        pixels = site.op("Floor", site.op("Add", pixels, site.number(0.5, first)))
    spread = site.op("Mul", pixels, site.number(2 / max(size - 1, 1), first))
    return site.op("Sub", spread, site.number(1, first)), inside


RULES = {
    "CDist": _distances,
    "CropAndResize": _crop,
    "ExpandDims": _expand_dims,
    "GatherND": _gather_nd,
    "GridSample": _grid_sample,
    "Pad": _pad,
    "Range": _range,
    "TorchEmbedding": _embedding,
    "Trilu": _trilu,
    "UnfoldTensor": _unfold,
    "Unique": _unique,
}
