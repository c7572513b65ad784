"""What TVM and its converters find out too late, as the errors that users are told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from xopt.errors import InputError, XoptError

if TYPE_CHECKING:
    from xopt.targets.base import Target

SHOWN = 200
"""Characters of a reason that are shown."""


@contextmanager
def refusing(refusal: Callable[[str], InputError]) -> Iterator[None]:
    """Whatever a compiler raises inside becomes ``refusal(reason)``.

    TVM's checks, its converters and the code that they call raise any kind of error for what they do not take. What
    is a refusal already, and running out of memory, stay what they are.
    """
    try:
        yield
    except (XoptError, MemoryError):
        raise
    except Exception as error:
        raise refusal(reason_of(error)) from error


def uncompiled(reason: str, node: str = "") -> InputError:
    """The error for what no emitter has refused; the node is the one that was reached."""
    cure = "fix its dynamic dimensions, or run model.onnx in onnxruntime"
    where = f"node {node}" if node else ""
    return InputError("E-UNSUPPORTED-OP", f"the model cannot be compiled: {reason}", where=where, cure=cure)


def unsupported(node: ir.Node, reason: str, target: Target) -> InputError:
    """The error for a node that cannot be compiled."""
    where = f"node {node.name or node.outputs[0].name}"
    cure = "give --fallback to run it in onnxruntime" if target.runs_segments and not target.fallback else ""
    return InputError("E-UNSUPPORTED-OP", f"{node.op_type} cannot be compiled: {reason}", where=where, cure=cure)


_OPERATOR = re.compile(r'ir\.Op\(.*?name="([^"]*)".*?support_level=\d+\)')
"""An operator of TVM's as its messages print it."""

_CHECK = re.compile(r"(?:\w+: )?Check failed: \(.*?\) is false:? *")
"""What TVM puts before what it has to say."""


def reason_of(error: Exception) -> str:
    """The line of an error's text that says what is wrong; dumps of code follow it, and a trace comes before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return (_CHECK.sub("", _OPERATOR.sub(r"\1", line)) or "a check of TVM's failed")[:SHOWN]


@contextmanager
def function_scope(builder: Any, name: str, parameters: list[Any]) -> Iterator[None]:
    """A function that ``builder`` builds; one that is given up leaves nothing behind, of which TVM complains aloud."""
    try:
        with builder.function(name, parameters):
            yield
    except BaseException:
        with suppress(Exception):  # none is open where the function was ended already
            builder._end_block()
            builder.end_scope()
        raise
