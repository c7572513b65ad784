"""The xopt operators, each an ONNX function in the domain ``xopt``, version 1.

The body, written with onnxscript in standard ops, *is* the meaning: it is what other runtimes run, what a kernel is
tested against, and the fallback of a target without one.

An operator lives in a module of this package that is named in ``MODULES`` and has ``function() -> ir.Function``, or a
function for each of several operators (``from_script`` makes one from an onnxscript function). Modules are imported
when their operator is first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import onnx_ir as ir

from xopt.errors import InternalError

DOMAIN = "xopt"
VERSION = 1

MODULES: dict[str, str] = {
    "MergeTokens": "xopt.ir.ops.merge_tokens",
    "MergeTokensMCTF": "xopt.ir.ops.merge_tokens_mctf",
    "PackTokens": "xopt.ir.ops.packing:pack_tokens",
    "UnpackTokens": "xopt.ir.ops.packing:unpack_tokens",
    "PackedAttention": "xopt.ir.ops.packing:packed_attention",
}
"""Operator name to the module that defines it, and the function there if it is not called ``function``."""


class _Functions(Mapping[str, ir.Function]):
    """Every xopt operator by name; bodies are built when looked up, once."""

    def __getitem__(self, name: str) -> ir.Function:
        return _function(name)

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


FUNCTIONS: Mapping[str, ir.Function] = _Functions()


@cache
def _function(name: str) -> ir.Function:
    module, _, maker = MODULES[name].partition(":")
    function: ir.Function = getattr(import_module(module), maker or "function")()
    if (function.domain, function.name) != (DOMAIN, name):
        raise InternalError("E-OP", f"{MODULES[name]} defines {function.domain}::{function.name}", where=f"op {name}")
    return function


def from_script(script: Any) -> ir.Function:
    """``ir.Function`` of an ``onnxscript.OnnxFunction``."""
    function: ir.Function = ir.from_proto(script.to_function_proto())
    return function


def add_function(model: ir.Model, name: str) -> ir.Function:
    """Put the body of operator ``name`` into ``model`` (once) and import the domain; returns the body in the model.

    The body takes the opset of the model, so that one file never mixes two.

    Raises:
        KeyError: there is no such operator.
    """
    template = FUNCTIONS[name]
    identifier = template.identifier()
    if identifier not in model.functions:
        body = template.clone()
        body.opset_imports[""] = model.opset_imports.get("", 24)
        model.functions[identifier] = body
    model.graph.opset_imports[DOMAIN] = VERSION
    return model.functions[identifier]
