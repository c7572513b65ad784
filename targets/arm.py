"""64-bit ARM: cross-compiled, run on the board or, for checking results, under ``qemu-user``.

    arm                  any ARMv8-A core (NEON, 4 float32 lanes)
    arm:cortex-a76       Raspberry Pi 5 and phones of its time
    arm:neoverse-n1      server cores (Graviton 2, Ampere Altra)
    arm:neoverse-v1      server cores (Graviton 3)

The templates of ``xopt.kernels`` are built at NEON width. Emulated times say nothing of a board: latency counts as not
measured unless this machine is an ARM itself.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, ClassVar

from xopt.errors import InputError
from xopt.targets.base import Target

if TYPE_CHECKING:
    import tvm

    from xopt.kernels.isa import Isa

# Variant -> (LLVM's CPU, features beyond ARMv8-A that its code may use, as /proc/cpuinfo names them).
_VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "": ("generic", ()),
    "cortex-a76": ("cortex-a76", ("asimddp", "atomics", "fphp", "asimdhp")),
    "neoverse-n1": ("neoverse-n1", ("asimddp", "atomics", "fphp", "asimdhp")),
    "neoverse-v1": ("neoverse-v1", ("asimddp", "atomics", "fphp", "asimdhp", "sve", "i8mm", "bf16")),
}


class ArmTarget(Target):
    """An aarch64 Linux machine.

    Args:
        variant: a name of the table above; empty for any ARMv8-A core.
    """

    linker: ClassVar[str] = "g++" if platform.machine() == "aarch64" else "aarch64-linux-gnu-g++"

    def __init__(self, variant: str = "") -> None:
        if variant not in _VARIANTS:
            names = ", ".join(f"arm:{name}" for name in _VARIANTS if name)
            raise InputError("E-TARGET", f"unknown ARM variant {variant!r}", cure=f"use arm or one of {names}")
        self.name = f"arm:{variant}" if variant else "arm"
        self._cpu, self._features = _VARIANTS[variant]

    def tvm_target(self) -> tvm.target.Target:
        """LLVM for aarch64 Linux."""
        import tvm

        description: dict[str, Any] = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
        if self._cpu != "generic":
            description["mcpu"] = self._cpu
        return tvm.target.Target(description)

    def features(self) -> tuple[str, ...]:
        """``fp`` and ``asimd`` (ARMv8-A), and what the variant adds."""
        return ("fp", "asimd", *self._features)

    def can_run(self) -> bool:
        """True on an aarch64 machine with the features; emulation is for results, not for times."""
        from xopt.targets.base import cpu_features

        return platform.machine() == "aarch64" and set(self.features()) <= cpu_features()

    def isa(self) -> Isa | None:
        """NEON: 32 registers of 4 float32 lanes."""
        from xopt.kernels.isa import NEON

        return NEON
