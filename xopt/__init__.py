"""xopt: an optimizing compiler for trained transformer models.

    import xopt
    from xopt.passes import MergeTokens, PruneHeads

    model = xopt.load("model.onnx")                        # or xopt.trace(module, example_inputs)
    result = xopt.optimize(model, [PruneHeads(keep=0.75)], target="cpu", data="calib.npz", max_drop=0.01)
    result.save("out/")
    outputs = result.session().run({"pixel_values": x})

Names are imported when first used, so that ``import xopt`` and ``xopt --help`` cost nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from xopt.runtime.threads import before_loading

# onnxruntime reports names and digests of the models it loads to its makers unless it is told not to before it starts.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
before_loading()

if TYPE_CHECKING:
    from xopt.api import Result, compile, load, optimize, trace, tune
    from xopt.data.dataset import Dataset
    from xopt.errors import InputError, VerificationError, XoptError
    from xopt.runtime.session import Session

_HOMES = {
    "Dataset": "data.dataset",
    "InputError": "errors",
    "Result": "api",
    "Session": "runtime.session",
    "VerificationError": "errors",
    "XoptError": "errors",
    "compile": "api",
    "load": "api",
    "optimize": "api",
    "trace": "api",
    "tune": "api",
}

__all__ = [
    "Dataset",
    "InputError",
    "Result",
    "Session",
    "VerificationError",
    "XoptError",
    "compile",
    "load",
    "optimize",
    "trace",
    "tune",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from xopt.measure.machine import version_of

        return version_of("xopt")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
