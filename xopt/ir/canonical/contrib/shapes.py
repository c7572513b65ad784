"""Operators that ONNX has had under other names or attributes since."""

from __future__ import annotations

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


RULES = {
    "ExpandDims": _expand_dims,
    "GatherND": _gather_nd,
    "GridSample": _grid_sample,
    "Pad": _pad,
    "Trilu": _trilu,
    "Unique": _unique,
}
