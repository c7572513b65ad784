"""Nodes that onnxruntime computes inside the run of a compiled model, which calls them as ``xopt.segment``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xopt.errors import InputError
from xopt.runtime.arrays import aligned_copy, as_tensor
from xopt.runtime.loops import REFUSAL
from xopt.runtime.portable import brief, started
from xopt.runtime.serving import session


class Segments:
    """The segments of one artifact, each a session of onnxruntime.

    Args:
        models: the ONNX models by name.
        threads: that one operator may use.

    Raises:
        InputError: E-TOOLCHAIN, onnxruntime is not installed; E-UNSUPPORTED-OP, it does not take a model.
    """

    def __init__(self, models: Mapping[str, bytes], threads: int) -> None:
        self._models, self._threads = models, threads
        self._abandoned: list[Any] = []
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._sessions = {name: opened(content, self._threads) for name, content in self._models.items()}

    def run(self, name: str, arrays: Sequence[Any]) -> list[Any]:
        """The outputs of a segment; in a forked child, which has not the parent's threads, by a session of its own."""
        if self._models and self._process != os.getpid():
            self._abandoned.append(self._sessions)  # to end them is to wait for threads that there are not
            self._open()
        segment = self._sessions[name]
        feeds = dict(zip((one.name for one in segment.get_inputs()), arrays, strict=True))
        return list(segment.run(None, feeds))


def opened(content: bytes, threads: int) -> Any:
    """A session of onnxruntime for one segment.

    Raises:
        InputError: E-TOOLCHAIN, onnxruntime is not installed; E-UNSUPPORTED-OP, it does not take the model.
    """
    try:
        return started(content, threads)
    except ImportError as error:
        what = "a part of the model runs in onnxruntime, which is not installed"
        raise InputError("E-TOOLCHAIN", what, cure="install the package onnxruntime") from error
    except Exception as error:
        what = f"onnxruntime refuses a part of the model: {brief(error, 200)}"
        raise InputError("E-UNSUPPORTED-OP", what) from error


def register(runtime: Any) -> None:
    """Make what compiled code calls known to TVM's runtime (``tvm_ffi``)."""
    runtime.register_global_func("xopt.segment", _segment, override=True)


def _segment(name: str, where: str, given: Sequence[Any]) -> list[Any]:
    """The outputs of the segment ``name``; ``where`` is the node that it is of."""
    try:
        results = session().segments.run(name, [np.from_dlpack(one) for one in given])
    except Exception as error:
        what = f"{where} does not run in onnxruntime on this data: {brief(error, 200)}"
        raise ValueError(f"{REFUSAL}{what}") from error
    return [as_tensor(aligned_copy(np.asarray(result))) for result in results]
