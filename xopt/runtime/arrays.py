"""Arrays in memory as the runtime's own tensors lie in it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from xopt.runtime.manifest import ALIGNMENT

Array = npt.NDArray[Any]


def aligned_copy(array: Array) -> Array:
    """A copy that lies as the runtimes' own outputs do, so that none of them has to copy it again."""
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy: Array = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def as_tensor(array: Array) -> Any:
    """A dense array as the runtime's tensor, without copying."""
    import tvm_ffi

    if not array.size:  # numpy steps by 0 there, and the code compares with what it would be in a dense array
        steps = [prod(array.shape[axis + 1 :]) * array.itemsize for axis in range(array.ndim)]
        array = np.lib.stride_tricks.as_strided(array, array.shape, steps)
    return tvm_ffi.from_dlpack(array)
