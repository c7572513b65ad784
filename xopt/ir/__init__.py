"""The graph: import and export, canonical form, transformer structure, cost, FX view.

Names are imported when first used: ``import xopt.ir`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xopt.ir.canonical import CanonicalizeReport, canonicalize, sized
    from xopt.ir.exporting import export
    from xopt.ir.io import load, save
    from xopt.ir.shapes import bind_dims, infer_shapes
    from xopt.ir.tracing import trace

_HOMES = {
    "CanonicalizeReport": "canonical",
    "bind_dims": "shapes",
    "canonicalize": "canonical",
    "export": "exporting",
    "infer_shapes": "shapes",
    "load": "io",
    "save": "io",
    "sized": "canonical",
    "trace": "tracing",
}

__all__ = [
    "CanonicalizeReport",
    "bind_dims",
    "canonicalize",
    "export",
    "infer_shapes",
    "load",
    "save",
    "sized",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
