"""Check what xopt needs from its surroundings; each probe runs where a crash cannot take this process along."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

PROBE_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One finding: ``needed`` says whether xopt works without it, ``cure`` what to do when it is not ``ok``."""

    name: str
    ok: bool
    needed: bool
    detail: str
    cure: str = ""


def examine() -> list[Check]:
    """All findings."""
    return [*_versions(), _tvm(), *_tools(), _cuda(), *_optional()]


def _versions() -> list[Check]:
    """TVM and its FFI fit only in the versions that are required exactly."""
    checks = []
    for name, wanted in _pins().items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        right = found == wanted or not wanted
        checks.append(Check(name, right and found != "missing", True, found, f"pip install {name}=={wanted}"))
    return checks


def _pins() -> dict[str, str]:
    """Version of each package that is required exactly; empty text where xopt runs from a source tree."""
    try:
        lines = requires("xopt") or []
    except PackageNotFoundError:
        return {"apache-tvm": "", "apache-tvm-ffi": ""}
    pairs = [line.partition("==") for line in lines if "==" in line and ";" not in line]
    return {name.strip(): wanted.strip() for name, _, wanted in pairs}


_TVM_PROBE = """
import json, tvm
target = tvm.target.Target({"kind": "llvm"})
print(json.dumps({"version": tvm.__version__, "llvm": tvm.target.codegen.llvm_version_major()}))
"""
_CUDA_PROBE = """
import ctypes, json
driver = ctypes.CDLL("libcuda.so.1")
status = driver.cuInit(0)
count = ctypes.c_int()
driver.cuDeviceGetCount(ctypes.byref(count))
print(json.dumps({"status": status, "devices": count.value}))
"""


def _tvm() -> Check:
    answer = _probe(_TVM_PROBE)
    cure = "install apache-tvm and apache-tvm-ffi in the versions that xopt requires"
    if isinstance(answer, str):
        return Check("tvm", False, True, answer, cure)
    return Check("tvm", True, True, f"{answer['version']} with LLVM {answer['llvm']}")


def _cuda() -> Check:
    answer = _probe(_CUDA_PROBE)
    cure = "a GPU is needed to run what is compiled for CUDA, not to compile it"
    if isinstance(answer, str) or answer["status"] or not answer["devices"]:
        return Check("cuda", False, False, "no GPU here", cure)
    return Check("cuda", True, False, f"{answer['devices']} GPU")


def _tools() -> list[Check]:
    tools = [
        ("g++", True, "links compiled models: apt-get install g++"),
        ("aarch64-linux-gnu-g++", False, "links models for ARM: apt-get install g++-aarch64-linux-gnu"),
        ("qemu-aarch64-static", False, "runs ARM models here: apt-get install qemu-user-static"),
    ]
    return [_tool(name, needed, cure) for name, needed, cure in tools]


def _tool(name: str, needed: bool, cure: str) -> Check:
    path = shutil.which(name)
    return Check(name, path is not None, needed, path or "not found", cure)


def _optional() -> list[Check]:
    return [_package(name, f"pip install {name}: one more runtime to compare with") for name in ("openvino",)]


def _package(name: str, cure: str) -> Check:
    try:
        return Check(name, True, False, version(name))
    except PackageNotFoundError:
        return Check(name, False, False, "not installed", cure)


def _probe(code: str, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> dict[str, int] | str:
    """Last line of the probe's output as JSON, or what went wrong."""
    try:
        done = run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"it ended with status {done.returncode}"
    answer: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
