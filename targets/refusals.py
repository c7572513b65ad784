"""What TVM and its converters find out too late, as the errors that users are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from xopt.errors import InputError, XoptError

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
        raise refusal(_reason(error)) from error


def uncompiled(reason: str, node: str = "") -> InputError:
    """The error for what no emitter has refused; the node is the one that was reached."""
    cure = "fix its dynamic dimensions, or run model.onnx in onnxruntime"
    where = f"node {node}" if node else ""
    return InputError("E-UNSUPPORTED-OP", f"the model cannot be compiled: {reason}", where=where, cure=cure)


def _reason(error: Exception) -> str:
    """The line of an error's text that says what is wrong; dumps of code follow it, and a trace comes before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (lines[-1] if lines[0].startswith("Traceback") else lines[0])[:SHOWN]


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
