"""ONNX ops as small torch functions: one table from op type to function.

A function takes the op's inputs in ONNX order (absent ones as None) and its attributes by keyword, with ONNX's
defaults; inputs that were attributes in earlier opsets keep their name, so both forms are understood. It returns one
tensor, or a tuple for ops with several outputs. ``outputs``, where a function has it, is the number of outputs of the
node. Integers that describe shapes are int64 tensors like any other value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xopt.ir.fx import attention, elementwise, layout, linear, norm, reduce


def _named(op_type: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that torch.fx can write into source code."""
    if function.__name__ in ("<lambda>", "op"):
        function.__name__ = function.__qualname__ = f"onnx_{op_type}"
    return function


_FAMILIES = (elementwise, layout, reduce, norm, linear, attention)

#: Op type of ai.onnx to the function that computes it.
TABLE: dict[str, Callable[..., Any]] = {
    op_type: _named(op_type, function) for family in _FAMILIES for op_type, function in family.TABLE.items()
}

#: Op type to a check of a node's form, which gives the reason why it is not supported, or None.
CHECKS: dict[str, Callable[..., str | None]] = {**layout.CHECKS, **linear.CHECKS, **norm.CHECKS}
