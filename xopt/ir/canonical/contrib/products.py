"""Matrix products and convolutions with what onnxruntime's fusions put around them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results, fast_gelu
from xopt.ir.canonical.contrib.site import Attributes, Site

CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _fused_matmul(site: Site) -> Results:
    return [_turned_product(site)]


def _turned_product(site: Site) -> ir.Value:
    """Matrices may be transposed, and their first axis may stand before the others or behind them."""
    operands = [
        _turned(site, site.value(name), site.attr(f"trans{name}"), site.attr(f"transBatch{name}")) for name in "AB"
    ]
    return _scaled(site, site.op("MatMul", *operands))


def _activated_matmul(site: Site) -> Results:
    return [_activated(site, _turned_product(site), _given_parameters(site, ("alpha", "beta", "gamma", "axis")))]


def _given_parameters(site: Site, names: Sequence[str]) -> Attributes:
    given = {name: site.attr(f"activation_{name}") for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _transpose_matmul(site: Site) -> Results:
    operands = [_turned(site, site.value(name), site.attr(f"trans{name}"), 0) for name in "AB"]
    return [_scaled(site, site.op("MatMul", *operands))]


def _turned(site: Site, value: ir.Value, matrix: int, batch: int) -> ir.Value:
    """``value`` with its first axis moved to the rows (``batch``), then its last two exchanged (``matrix``)."""
    if not matrix and not batch:
        return value
    order = list(range(site.rank(value)))
    if len(order) < 2:
        return value
    if batch:
        order = [*order[1:-1], order[0], order[-1]]
    if matrix:
        order[-2:] = reversed(order[-2:])
    return value if order == sorted(order) else site.op("Transpose", value, perm=order)


def _scaled(site: Site, product: ir.Value) -> ir.Value:
    alpha = float(site.attr("alpha"))
    return product if alpha == 1 else site.op("Mul", product, site.number(alpha, site.value("A")))


def _fused_gemm(site: Site) -> Results:
    attributes = {name: site.attr(name) for name in ("alpha", "beta", "transA", "transB")}
    product = site.op("Gemm", site.value("A"), site.value("B"), site.given("C"), **attributes)
    return [_activated(site, product, _given_parameters(site, ("alpha", "beta", "gamma")))]


def _gemm_fast_gelu(site: Site) -> Results:
    product = site.op("MatMul", site.value("X"), site.value("W"))
    return [fast_gelu(site, site.plus(product, site.given("bias")))]


def _fused_conv(site: Site) -> Results:
    """A convolution, a tensor added to it, an activation."""
    inputs = [site.value("X"), site.value("W"), site.given("B")]
    return [_convolved(site, site.op("Conv", *inputs, **conv_attributes(site)))]


def _nhwc_fused_conv(site: Site) -> Results:
    """The same with channels last, in all but the weight."""
    return [_convolved(site, _with_channels_last(site, site.value("W")))]


def _nhwc_conv(site: Site) -> Results:
    """A convolution with channels last, also in the weight [M, D..., C / group], as onnxruntime's tool writes it."""
    weight, rank = site.value("W"), site.rank(site.value("X"))
    return [_with_channels_last(site, channels_second(site, weight, rank))]


def _with_channels_last(site: Site, weight: ir.Value) -> ir.Value:
    x = site.value("X")
    rank = site.rank(x)
    inputs = [channels_second(site, x, rank), weight, site.given("B")]
    return channels_last(site, site.op("Conv", *inputs, **conv_attributes(site)), rank)


def _convolved(site: Site, result: ir.Value) -> ir.Value:
    """The result of a convolution with a tensor added to it and an activation."""
    total = site.plus(result, site.given("Z"))
    params = site.attr("activation_params") or ()
    names = _PARAMETERS.get(site.attr("activation"), ())
    if len(params) != len(names):
        raise site.refused(f"{len(params)} activation_params of {site.attr('activation')!r}")
    return _activated(site, total, dict(zip(names, params)))


def conv_attributes(site: Site) -> Attributes:
    """Attributes of a convolution that the node has, as the standard operator has them."""
    given = {name: site.attr(name) for name in CONV}
    return {name: value for name, value in given.items() if value is not None}


_PARAMETERS: dict[str, Sequence[str]] = {
    "Clip": ("min", "max"),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
}
_ACTIVATIONS = {
    "Gelu": "",
    "Softmax": "axis",
    "Clip": "min max",
    "Elu": "alpha",
    "HardSigmoid": "alpha beta",
    "LeakyRelu": "alpha",
    "Relu": "",
    "Sigmoid": "",
    "Softplus": "",
    "Softsign": "",
    "Tanh": "",
    "ThresholdedRelu": "alpha",
}
"""Activations that may be fused, and what they may have."""


def _activated(site: Site, x: ir.Value, parameters: Attributes) -> ir.Value:
    """The fused activation of ``x``."""
    name = site.attr("activation")
    if not name:
        return x
    known = _ACTIVATIONS.get(name)
    if known is None or set(parameters) - set(known.split()):
        raise site.refused(f"activation {name!r} with {', '.join(parameters) or 'nothing'}")
    if name == "Clip":
        return site.op("Clip", x, *(site.number(parameters[bound], x) for bound in ("min", "max")))
    return site.op(name, x, **parameters)


def channels_second(site: Site, value: ir.Value, rank: int) -> ir.Value:
    """[N, D..., C] as [N, C, D...]."""
    return site.op("Transpose", value, perm=[0, rank - 1, *range(1, rank - 1)])


def channels_last(site: Site, value: ir.Value, rank: int) -> ir.Value:
    """[N, C, D...] as [N, D..., C]."""
    return site.op("Transpose", value, perm=[0, *range(2, rank), 1])


RULES = {
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "FusedMatMulActivation": _activated_matmul,
    "GemmFastGelu": _gemm_fast_gelu,
    "NhwcConv": _nhwc_conv,
    "NhwcFusedConv": _nhwc_fused_conv,
    "TransposeMatMul": _transpose_matmul,
}
