"""NVIDIA GPUs: machine code compiled here, with or without a GPU in this machine.

    cuda                 sm_90 (H100, H200)
    cuda:sm_80           A100; any sm_NN that NVRTC knows

Schedules come from TVM's dlight; see ``cuda_toolkit`` for how code is compiled where no driver is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt.errors import InputError
from xopt.targets import cuda_toolkit
from xopt.targets.base import Target

if TYPE_CHECKING:
    import tvm


class CudaTarget(Target):
    """One CUDA architecture, with an x86-64-v3 host (AVX2: every server that holds such a GPU).

    Args:
        arch: ``"sm_90"`` and the like; empty for sm_90.
    """

    tile = 64  # tensor-core tiles: widths that are multiples of 64 keep their speed (TVA-Prune, measured on A100)
    device = 2

    def __init__(self, arch: str = "") -> None:
        if arch and not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
            raise InputError("E-TARGET", f"unknown CUDA architecture {arch!r}", cure="write it as in cuda:sm_90")
        self.name = f"cuda:{arch}" if arch else "cuda"
        self.arch = arch or "sm_90"

    def tvm_target(self) -> tvm.target.Target:
        """CUDA code for the architecture; loads the compiler's packages on first use."""
        import tvm

        cuda_toolkit.enable()
        return tvm.target.Target({"kind": "cuda", "arch": self.arch}, host=self.host())

    def host(self) -> tvm.target.Target:
        """An x86-64-v3 server."""
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})

    def features(self) -> tuple[str, ...]:
        """What the host code needs of the CPU."""
        return ("avx2", "fma", "bmi2", "f16c")

    def can_run(self) -> bool:
        """True where a driver with a device answers."""
        return cuda_toolkit.device_present()

    def pipeline(self) -> tvm.transform.Pass:
        """TVM's default for CUDA, with dlight's schedules."""
        from tvm import relax

        return relax.get_default_pipeline(self.tvm_target())

    def link(self, executable: Any, path: Path) -> None:
        """Link the host code with the cubin inside; the device code is compiled while it is written out."""
        with self.tvm_target():
            super().link(executable, path)
