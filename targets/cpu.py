"""x86-64 CPUs, by the vector unit that their code uses.

cpu                  this machine's CPU, everything it has
cpu:avx512           any CPU with AVX-512 F, BW, DQ and VL (x86-64-v4: servers since 2017, Zen 4 and later)
cpu:avx512-vnni      with dot products of bytes (Ice Lake)
cpu:avx512-bf16      with those of bfloat16 as well (Cooper Lake, Sapphire Rapids, Zen 4)
cpu:avx2             any CPU with AVX2 and FMA (x86-64-v3)
cpu:avx2-vnni        with AVX-VNNI (Alder Lake)
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

# What each variant needs, as /proc/cpuinfo names it; the last one that this machine can run is its own.
VARIANTS = {
    "avx2": _AVX2,
    "avx2-vnni": (*_AVX2, "avx_vnni"),
    "avx512": _AVX512,
    "avx512-vnni": (*_AVX512, "avx512_vnni"),
    "avx512-bf16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
}

# Beyond x86-64-v3 and v4, as LLVM names it.
_LLVM = {"avx_vnni": "+avxvnni", "avx512_vnni": "+avx512vnni", "avx512_bf16": "+avx512bf16"}

# Features beyond x86-64-v4 that LLVM uses when it is told this machine's CPU.
_NATIVE = (
    "avx512_vnni", "avx512_bf16", "avx512vbmi", "avx512_vbmi2", "avx512ifma", "avx512_bitalg", "avx512_vpopcntdq",
    "avx512_vp2intersect", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip


class CpuTarget(Target):
    """An x86-64 Linux machine.

    Args:
        variant: what code may use, as in ``"avx512"``, or empty for everything that this machine has.
    """

    tile = 16

    def __init__(self, variant: str = "") -> None:
        if variant and variant not in VARIANTS:
            names = ", ".join(f"cpu:{name}" for name in VARIANTS)
            raise InputError("E-TARGET", f"unknown CPU variant {variant!r}", cure=f"use cpu, or one of {names}")
        self.name = f"cpu:{variant}" if variant else "cpu"
        self._native = not variant
        here = cpu_features()
        runnable = [name for name, needed in VARIANTS.items() if set(needed) <= here]
        if self._native and not runnable:
            raise InputError(
                "E-CPU", "this machine's CPU has no AVX2", where="target cpu", cure="compile for cpu:avx2 or cpu:avx512"
            )
        self._variant = variant or runnable[-1]

    def tvm_target(self) -> tvm.target.Target:
        """LLVM for the CPU."""
        import tvm

        if self._native:
            return tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
        level = "x86-64-v4" if set(_AVX512) <= set(self.features()) else "x86-64-v3"
        beyond = [_LLVM[name] for name in self.features() if name in _LLVM]
        return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": level, "mattr": beyond})

    def features(self) -> tuple[str, ...]:
        """The features of the variant; for this machine's CPU also the extensions it has."""
        needed = VARIANTS[self._variant]
        if not self._native:
            return needed
        here = cpu_features()
        return (*needed, *(name for name in _NATIVE if name in here and name not in needed))

    def can_run(self) -> bool:
        """Whether this machine's CPU has the features."""
        return platform.machine() == "x86_64" and set(self.features()) <= cpu_features()

    def isa(self) -> Isa | None:
        """AVX-512: 32 registers of 16 float32 lanes; AVX2: 16 of 8; with the dot products of the variant."""
        from xopt.kernels.isa import BY_NAME

        return BY_NAME[self._variant]
