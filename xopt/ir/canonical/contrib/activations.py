"""Activations with what onnxruntime's fusions put before them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from xopt.ir.canonical.contrib.site import Site

Results = Sequence[ir.Value | None]


def _gelu(site: Site) -> Results:
    return [site.op("Gelu", site.value("X"))]


def _fast_gelu(site: Site) -> Results:
    return [fast_gelu(site, site.plus(site.value("X"), site.given("bias")))]


def fast_gelu(site: Site, x: ir.Value) -> ir.Value:
    """Gelu by its approximation with tanh."""
    return site.op("Gelu", x, approximate="tanh")


def _bias_gelu(site: Site) -> Results:
    return [site.op("Gelu", site.plus(site.value("A"), site.value("B")))]


def _quick_gelu(site: Site) -> Results:
    return [site.op("Swish", site.value("X"), alpha=float(site.attr("alpha")))]


def _bias_split_gelu(site: Site) -> Results:
    """The first half of the channels times the Gelu of the second."""
    biased = site.plus(site.value("X"), site.value("bias"))
    value, gate = site.several("Split", 2, biased, axis=-1, num_outputs=2)
    return [site.op("Mul", value, site.op("Gelu", gate))]


def _bias_add(site: Site) -> Results:
    return [site.plus(site.plus(site.value("X"), site.value("bias")), site.value("skip"))]


RULES = {
    "BiasAdd": _bias_add,
    "BiasGelu": _bias_gelu,
    "BiasSplitGelu": _bias_split_gelu,
    "FastGelu": _fast_gelu,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
}
