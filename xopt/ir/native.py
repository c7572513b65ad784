"""ONNX's native code on a graph that nobody vouches for, tried in a process of its own first.

The checker and the shape inference are C++ that believes what it reads: some graphs end the process that they are read
in, which no exception tells of. The child is a bare interpreter with ONNX's library alone; it takes about 40 ms.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import onnx
from onnx import onnx_cpp2py_export

from xopt.errors import InputError
from xopt.ir.untrusted import NATIVE_MEMORY

SECONDS = 30
"""Of a processor's time that a graph may take."""

_CHILD = """
import contextlib, importlib.machinery, importlib.util, resource, sys
path, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for what, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, memory), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (limit, resource.getrlimit(what)[1]))
loader = importlib.machinery.ExtensionFileLoader("onnx_cpp2py_export", path)
library = importlib.util.module_from_spec(importlib.util.spec_from_loader("onnx_cpp2py_export", loader))
loader.exec_module(library)
model = sys.stdin.buffer.read()
for attempt in (
    lambda: library.checker.check_model(model),
    lambda: library.shape_inference.infer_shapes(model, True, True, True),
):
    with contextlib.suppress(Exception):
        attempt()
"""


def check_native(model: onnx.ModelProto) -> None:
    """Check ``model`` and infer its shapes elsewhere; what these say of it is left to who needs it.

    Args:
        model: without weights.

    Raises:
        InputError: ``E-FORMAT``: the process ended by a signal, or took more than 30 s of a processor.
    """
    if not sys.executable:  # Python inside of another program
        return
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(onnx_cpp2py_export.__file__)]
    command += [str(SECONDS), str(model.ByteSize() + NATIVE_MEMORY)]
    done = subprocess.run(command, input=model.SerializeToString(), capture_output=True, check=False)
    if done.returncode < 0:
        ending = signal.Signals(-done.returncode)
        what = f"takes more than {SECONDS} s" if ending == signal.SIGXCPU else f"crashes ({ending.name})"
        cure = "export the model again, with another exporter or opset"
        raise InputError("E-FORMAT", f"ONNX's shape inference {what} on this graph", cure=cure)
