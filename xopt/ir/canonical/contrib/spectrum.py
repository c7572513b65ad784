"""Fourier transforms of real signals, and products of complex numbers [..., 2]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.site import Site


def _rfft(site: Site) -> Results:
    """[..., n] -> [..., n // 2 + 1, 2]."""
    site.only(onesided=1, normalized=0, signal_ndim=1)
    x = site.op("Unsqueeze", site.value("X"), site.ints(-1))
    return [site.op("DFT", x, None, site.index(-2), onesided=1)]


def _irfft(site: Site) -> Results:
    """[..., n // 2 + 1, 2] -> [..., n], n even: frequencies behind the middle are those before it, conjugated."""
    site.only(onesided=1, normalized=0, signal_ndim=1)
    x = site.value("X")
    inner = site.op("Slice", x, site.ints(-2), site.ints(0), site.ints(-2), site.ints(-1))
    whole = site.op("Concat", x, site.op("Mul", inner, _sign(site, x)), axis=-2)
    signal = site.op("DFT", whole, None, site.index(-2), inverse=1)
    return [site.op("Gather", signal, site.index(0), axis=-1)]


def _product(site: Site) -> Results:
    return [_multiplied(site, site.value("A"), site.value("B"))]


def _product_with_conjugate(site: Site) -> Results:
    b = site.value("B")
    return [_multiplied(site, site.value("A"), site.op("Mul", b, _sign(site, b)))]


def _sign(site: Site, like: ir.Value) -> ir.Value:
    return site.array("conjugate", np.asarray([1, -1], site.dtype(like).numpy()))


def _multiplied(site: Site, a: ir.Value, b: ir.Value) -> ir.Value:
    """(a0 + a1 i)(b0 + b1 i)."""
    (a0, a1), (b0, b1) = (site.several("Split", 2, value, axis=-1, num_outputs=2) for value in (a, b))
    real = site.op("Sub", site.op("Mul", a0, b0), site.op("Mul", a1, b1))
    imaginary = site.op("Add", site.op("Mul", a0, b1), site.op("Mul", a1, b0))
    return site.op("Concat", real, imaginary, axis=-1)


RULES = {"ComplexMul": _product, "ComplexMulConj": _product_with_conjugate, "Irfft": _irfft, "Rfft": _rfft}
