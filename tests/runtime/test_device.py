"""Transfers through TVM's runtime, on the one device that every machine has."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi

from xopt.errors import InputError
from xopt.runtime import artifact, session
from xopt.runtime.device import CPU, Transfer, load_cuda_runtime


def test_a_tensor_comes_back_as_it_went() -> None:
    artifact.runtime()
    transfer = Transfer(CPU)
    for dtype in (np.float32, np.int64, np.bool_):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        sent = transfer.to_device(session._aligned(array))
        assert np.from_dlpack(sent).ctypes.data != array.ctypes.data
        back = np.from_dlpack(transfer.to_host(sent))
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, array)


def test_no_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: int = 0) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(InputError, match=r"E-TARGET.*no CUDA driver"):
        load_cuda_runtime(Path(tvm_ffi.__file__).parent)
