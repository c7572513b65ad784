"""Moves tensors between this process's memory and an accelerator's, with TVM's runtime alone."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xopt.errors import InputError

CPU = 1
CUDA = 2
"""Kinds of device as DLPack numbers them."""


class Transfer:
    """Copies to and from device 0 of one kind.

    Args:
        kind: DLPack's number of the kind of device.
    """

    def __init__(self, kind: int) -> None:
        import tvm_ffi

        self._host = tvm_ffi.device("cpu", 0)
        self._device = tvm_ffi.device("cuda" if kind == CUDA else "cpu", 0)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._synchronize = tvm_ffi.get_global_func("runtime.Device_StreamSync")

    def to_device(self, tensor: Any) -> Any:
        """A copy of a host tensor on the device."""
        return self._moved(tensor, self._device)

    def to_host(self, tensor: Any) -> Any:
        """A copy of a device tensor in this process's memory; waits until the device has finished with it."""
        moved = self._moved(tensor, self._host)
        self._synchronize(self._device, 0)
        return moved

    def _moved(self, tensor: Any, device: Any) -> Any:
        result = self._allocate(tensor.shape, tensor.dtype, device, None)
        self._copy(tensor, result)
        return result


def load_cuda_runtime(tvm_libraries: Path) -> None:
    """Load what TVM needs to run CUDA code: the driver, the CUDA runtime, and TVM's module for it.

    Args:
        tvm_libraries: the folder of TVM's shared libraries.

    Raises:
        InputError: E-TARGET, there is no driver or no CUDA runtime on this machine.
    """
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError as error:
        cure = "run it where an NVIDIA GPU and its driver are"
        raise InputError("E-TARGET", "a CUDA artifact cannot run here", where="no CUDA driver", cure=cure) from error
    spec = find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    packaged = [str(file) for place in places for file in sorted(place.glob("cu*/lib/libcudart.so.*"))]
    for name in [*packaged, "libcudart.so.13"]:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    else:
        cure = 'pip install "xopt[cuda]"'
        raise InputError("E-TARGET", "a CUDA artifact cannot run here", where="no CUDA runtime library", cure=cure)
    ctypes.CDLL(str(tvm_libraries / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
