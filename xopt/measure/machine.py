"""The machine that was measured, as facts for a report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

PACKAGES = ("xopt", "apache-tvm", "apache-tvm-ffi", "onnx", "onnx-ir", "onnxruntime", "openvino", "torch", "numpy")
_NOTABLE = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "neon", "asimd")


class Machine(TypedDict):
    """Facts about this machine; sizes in bytes, load as the average number of running threads over one minute."""

    cpu: str
    features: list[str]
    cores: int
    logical_cores: int
    usable_cores: int
    memory: int
    system: str
    python: str
    load: float
    versions: dict[str, str]


def describe() -> Machine:
    """What this machine is, now."""
    import psutil

    return Machine(
        cpu=_cpu_field("model name") or platform.machine(),
        features=cpu_features(),
        cores=psutil.cpu_count(logical=False) or 1,
        logical_cores=psutil.cpu_count() or 1,
        usable_cores=len(usable_cpus()),
        memory=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Installed version of each package that the results depend on; those that are missing are left out."""
    return {package: found for package in PACKAGES if (found := version_of(package))}


def version_of(package: str) -> str:
    """Version of an installed package; ``"source"`` for xopt run from a source tree, empty for what is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source" if package == "xopt" else ""


def cpu_features() -> list[str]:
    """The vector features of the CPU, of those that matter for neural networks."""
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [feature for feature in _NOTABLE if feature in present]


def usable_cpus() -> list[int]:
    """Numbers of the logical CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def _cpu_field(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")
