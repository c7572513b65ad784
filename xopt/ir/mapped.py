"""Weights that lie in a mapped file: their pages count as this process's memory from when they are read."""

from __future__ import annotations

import mmap

import onnx_ir as ir


def give_back(tensor: ir.TensorProtocol | None) -> None:
    """Drop the pages of a tensor that was read; reading it again brings them back from the file."""
    if isinstance(tensor, ir.ExternalTensor) and isinstance(tensor.raw, mmap.mmap):
        tensor.raw.madvise(mmap.MADV_DONTNEED)
