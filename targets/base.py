"""What a target is: the machine that code is generated for, how to link it and whether it runs here."""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from xopt.errors import InputError
from xopt.runtime.device import CPU
from xopt.runtime.manifest import machine_features
from xopt.targets.database import Configs, Heuristics

if TYPE_CHECKING:
    import tvm

    from xopt.kernels.isa import Isa

POOL = Path(__file__).with_name("pool.cc")
"""Threads for parallel loops; part of every artifact for a CPU."""


class Target(ABC):
    """One machine that models are compiled for.

    Attributes:
        name: what the user writes, with the variant: ``"cpu"``, ``"cpu:avx2"``, ``"arm"``, ``"cuda"``.
        tile: widths that are multiples of this run at full speed; structured pruning snaps to it.
        device: kind of memory the code works on, as the runtime numbers it (DLPack: 1 is the CPU, 2 is CUDA).
        linker: the C++ compiler that links the generated code.
        configs: chooses the configuration of each kernel.
        precision: of linear layers and attention: "fp32", or "bf16" (their operands; sums are float32).
        fallback: whether what cannot be compiled may run in onnxruntime, inside the compiled model's run.
    """

    name: str
    tile: int = 8
    device: int = 1
    linker: ClassVar[str] = "g++"
    configs: Configs = Heuristics()
    precision: str = "fp32"
    fallback: bool = False

    @abstractmethod
    def tvm_target(self) -> tvm.target.Target:
        """The machine as TVM's code generator takes it."""

    def host(self) -> tvm.target.Target | None:
        """The machine that calls the code, None where that is the machine itself."""
        return None

    @property
    def runs_segments(self) -> bool:
        """Whether onnxruntime can run beside the code: on a CPU, by the machine that calls it."""
        return self.device == CPU and self.host() is None

    @abstractmethod
    def features(self) -> tuple[str, ...]:
        """CPU features that the code needs, by their names in ``/proc/cpuinfo``; recorded in the manifest."""

    @abstractmethod
    def can_run(self) -> bool:
        """Whether an artifact for this target runs on this machine, so that its latency can be measured."""

    def isa(self) -> Isa | None:
        """Vector unit that the kernel templates are built for; None: no templates, TVM's own schedules instead."""
        return None

    def pipeline(self) -> tvm.transform.Pass:
        """The passes from Relax operators to VM code; the CPU's by default."""
        from xopt.targets.build import cpu_pipeline

        return cpu_pipeline()

    def link(self, executable: Any, path: Path) -> None:
        """Write the compiled code as the shared library ``path``.

        Raises:
            InputError: E-TOOLCHAIN, the linker is missing or fails.
        """
        from tvm.support import cc

        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        # TVM and the linker see no name of a user's, which may start like an option or be no UTF-8.
        here = f"/proc/{os.getpid()}/fd/{folder}"
        try:
            linker = cc.cross_compiler(self.linker, options=["-O2"])
            executable.export_library(
                f"{here}/model.so",
                fcompile=linker,
                addons=[str(POOL)] if self.device == 1 else [],
                workspace_dir=here,
            )
            (path.parent / "model.so").rename(path)
        except (FileNotFoundError, RuntimeError, subprocess.SubprocessError) as error:
            raise InputError(
                "E-TOOLCHAIN",
                f"linking with {self.linker} failed",
                where=str(error).strip().splitlines()[-1],
                cure=f"install the C++ compiler {self.linker}",
            ) from error
        finally:
            os.close(folder)


def cpu_features() -> frozenset[str]:
    """The features of this machine's CPU (``flags`` on x86, ``Features`` on ARM)."""
    return machine_features()
