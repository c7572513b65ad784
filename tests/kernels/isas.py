"""Instruction sets as test parameters, those that this CPU cannot run marked as skipped."""

from __future__ import annotations

from typing import Any

import pytest

from xopt.kernels.isa import AVX2, AVX512, BY_NAME, Isa
from xopt.targets.base import cpu_features


def lacking(isa: Isa) -> set[str]:
    """What code for ``isa`` needs that this CPU has not; LLVM splits vectors that are too long for it."""
    dot_products = "avx512" if isa.lanes == 16 else "avx"
    needed = {f"{dot_products}_vnni"} if isa.vnni else set()
    needed |= {"avx2"} if isa.pairs else set()
    needed |= {"avx512bw"} if isa.pairs and isa.lanes == 16 else set()
    return (needed | ({"avx512_bf16"} if isa.bf16 else set())) - cpu_features()


def parameters(*isas: Isa) -> list[Any]:
    """Of all instruction sets, or of some."""
    return [
        pytest.param(
            isa, id=isa.name, marks=pytest.mark.skipif(bool(lacking(isa)), reason=f"this CPU has no {lacking(isa)}")
        )
        for isa in isas or BY_NAME.values()
    ]


PAIRS = AVX2 if lacking(AVX512) else AVX512
"""The widest instruction set without dot products of bytes that this CPU runs."""
