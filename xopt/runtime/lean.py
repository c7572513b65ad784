"""TVM without torch, which running and compiling a model need not load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports in here find no torch, unless it is loaded already.

    ``tvm_ffi`` imports torch wherever it is installed, which takes seconds and a hundred megabytes; tensors cross by
    DLPack, which needs no import.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
