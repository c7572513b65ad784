"""x86-64 CPUs, by the vector unit that their code uses.

cpu                  this machine's CPU, everything it has
cpu:avx512           any CPU with AVX-512 F, BW, DQ and VL (x86-64-v4: servers since 2017, Zen 4 and later)
cpu:avx2             any CPU with AVX2 and FMA (x86-64-v3)
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from xopt.errors import InputError
from xopt.targets.base import Target, cpu_features

if TYPE_CHECKING:
    import tvm

    from xopt.kernels.isa import Isa

_AVX2 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Features beyond x86-64-v4 that LLVM uses when it is told this machine's CPU, as /proc/cpuinfo names them.
_NATIVE = (
    "avx512_vnni", "avx512_bf16", "avx512vbmi", "avx512_vbmi2", "avx512ifma", "avx512_bitalg", "avx512_vpopcntdq",
    "avx512_vp2intersect", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip


class CpuTarget(Target):
    """An x86-64 Linux machine.

    Args:
        variant: ``"avx512"``, ``"avx2"``, or empty for the CPU of this machine.
    """

    tile = 16

    def __init__(self, variant: str = "") -> None:
        if variant not in ("", "avx512", "avx2"):
            raise InputError("E-TARGET", f"unknown CPU variant {variant!r}", cure="use cpu, cpu:avx512 or cpu:avx2")
        self.name = f"cpu:{variant}" if variant else "cpu"
        self._native = not variant
        self._wide = variant == "avx512" or (not variant and set(_AVX512) <= cpu_features())
        if self._native and not set(_AVX2) <= cpu_features():
            raise InputError(
                "E-CPU", "this machine's CPU has no AVX2", where="target cpu", cure="compile for cpu:avx2 or cpu:avx512"
            )

    def tvm_target(self) -> tvm.target.Target:
        """LLVM for the CPU."""
        import tvm

        if self._native:
            return tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
        level = "x86-64-v4" if self._wide else "x86-64-v3"
        return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": level})

    def features(self) -> tuple[str, ...]:
        """The features of the variant; for this machine's CPU also the extensions it has."""
        base = _AVX512 if self._wide else _AVX2
        if not self._native:
            return base
        here = cpu_features()
        return (*base, *(name for name in _NATIVE if name in here))

    def can_run(self) -> bool:
        """Whether this machine's CPU has the features."""
        return platform.machine() == "x86_64" and set(self.features()) <= cpu_features()

    def isa(self) -> Isa | None:
        """AVX-512: 32 registers of 16 float32 lanes; AVX2: 16 of 8; with the dot products that this machine has."""
        from xopt.kernels.isa import AVX2, AVX512, AVX512_BF16, AVX512_VNNI

        if not self._wide:
            return AVX2
        here = set(self.features())
        if {"avx512_vnni", "avx512_bf16"} <= here:
            return AVX512_BF16
        return AVX512_VNNI if "avx512_vnni" in here else AVX512
