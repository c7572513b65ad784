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


def _bias_dropout(site: Site) -> Results:
    """Outside of training nothing is dropped."""
    site.pass_over("seed", "ratio")
    training = site.given("training_mode")
    if training is not None and site.constant(training, "training_mode").any():
        raise site.refused("it is in training mode")
    return [site.plus(site.plus(site.value("data"), site.value("bias")), site.given("residual"))]


def _bias_softmax(site: Site) -> Results:
    """Over the last axis; how the bias is broadcast, its shape tells."""
    data = site.plus(site.value("data"), site.value("bias"))
    site.pass_over("is_inner_broadcast")
    if int(site.attr("axis")) not in (-1, site.rank(data) - 1):
        raise site.refused(f"axis is {site.attr('axis')}, not the last")
    return [site.op("Softmax", data, axis=-1)]


def _scaled_silu(site: Site) -> Results:
    x, scale = site.value("X"), site.given("scale")
    if scale is None:
        scale = site.number(float(site.attr("alpha")), x)
    site.pass_over("alpha")
    return [site.op("Swish", site.op("Mul", x, scale))]


def _gated_add(site: Site) -> Results:
    return [site.plus(site.value("X"), site.op("Mul", site.value("Y"), site.value("gate")))]


RULES = {
    "BiasAdd": _bias_add,
    "BiasDropout": _bias_dropout,
    "BiasSoftmax": _bias_softmax,
    "GatedAdd": _gated_add,
    "ScaledSiLU": _scaled_silu,
    "BiasGelu": _bias_gelu,
    "BiasSplitGelu": _bias_split_gelu,
    "FastGelu": _fast_gelu,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
}
