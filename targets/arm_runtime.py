"""Run aarch64 artifacts on any Linux machine: TVM's aarch64 runtime, a runner, and ``qemu-user`` where the CPU differs.

``python -m xopt.targets.arm_runtime`` fetches the runtime libraries once, from the same package index and in the same
versions as the TVM that is installed here, and builds the runner with the cross compiler.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np

from xopt.errors import InputError, visible
from xopt.runtime.manifest import Manifest, weights_path

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"
SYSROOT = Path("/usr/aarch64-linux-gnu")

_LIBRARIES = {
    "apache-tvm": ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so"),  # the second sorts, for TopK
    "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so",),
}
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_24_aarch64", "manylinux2014_aarch64")
_DTYPE_NAMES = {(0, 8): "int8", (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8", (2, 16): "float16"}
_DTYPE_NAMES |= {(2, 32): "float32", (2, 64): "float64", (6, 8): "bool"}


def runtime_folder() -> Path:
    """Where the aarch64 libraries and the runner lie: beside this Python, or at ``XOPT_AARCH64_RUNTIME``."""
    return Path(os.environ.get("XOPT_AARCH64_RUNTIME", Path(sys.prefix) / "share" / "xopt" / "aarch64"))


def missing() -> str:
    """What running aarch64 code here still lacks, as a clause with its cure; empty when nothing is missing."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not installed (Debian: apt-get install g++-aarch64-linux-gnu)"
    if platform.machine() != "aarch64" and shutil.which(EMULATOR) is None:
        return f"{EMULATOR} is not installed (Debian: apt-get install qemu-user-static)"
    names = [Path(library).name for libraries in _LIBRARIES.values() for library in libraries]
    if any(not (runtime_folder() / name).is_file() for name in names):
        return "the aarch64 runtime is not there (python -m xopt.targets.arm_runtime fetches it)"
    return ""


def fetch() -> Path:
    """Fetch the aarch64 runtime libraries that match the installed TVM, and build the runner. Returns the folder."""
    folder = runtime_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package, libraries in _LIBRARIES.items():
            requirement = f"{package}=={metadata.version(package)}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", "3.11", "--implementation", "cp", "--dest", scratch, requirement]
            command += [option for name in _PLATFORMS for option in ("--platform", name)]
            _call(command, f"fetching {requirement} for aarch64")
            wheel = next(Path(scratch).glob(f"{package.replace('-', '_')}-[0-9]*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                for library in libraries:
                    (folder / Path(library).name).write_bytes(archive.read(library))
    _build_runner(folder)
    return folder


def _build_runner(folder: Path) -> Path:
    """Cross-compile ``runner.cc`` against the libraries in ``folder``; returns the program."""
    import tvm_ffi.libinfo

    source, program = Path(__file__).with_name("runner.cc"), folder / "runner"
    if program.is_file() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    command = [COMPILER, "-std=c++17", "-O2", f"-I{tvm_ffi.libinfo.find_include_path()}", str(source)]
    command += [f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}"]
    command += [
        f"-L{folder}",
        "-ltvm_ffi",
        "-Wl,--no-as-needed",
        "-ltvm_runtime",
        "-ltvm_runtime_extra",
        "-o",
        str(program),
    ]
    _call(command, "building the aarch64 runner")
    return program


def run(
    artifact: Path, manifest: Manifest, feeds: Mapping[str, np.ndarray], repeat: int = 0, cpu: str = "max"
) -> tuple[list[np.ndarray], list[float]]:
    """Run an aarch64 artifact once and ``repeat`` timed times more.

    Args:
        artifact: path of ``model.so``; ``model.weights`` lies beside it.
        manifest: the artifact's manifest.
        feeds: input name -> array of the manifest's dtype.
        repeat: timed runs. Under emulation the times say nothing of a real board.
        cpu: the emulated CPU (qemu's ``-cpu``).

    Returns:
        The outputs in order, and the milliseconds of the timed runs.
    """
    lack = missing()
    if lack:
        raise InputError("E-TARGET", "an aarch64 artifact cannot run here", where=str(artifact), cure=lack)
    libraries = runtime_folder().resolve()
    runner = _build_runner(libraries)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "plan.txt").write_text(_plan(artifact, manifest, feeds, Path(scratch), repeat))
        command = [str(runner), "plan.txt"]
        environment = dict(os.environ, LD_LIBRARY_PATH=str(libraries))
        if platform.machine() != "aarch64":
            command = [EMULATOR, "-cpu", cpu, "-L", str(SYSROOT), "-E", f"LD_LIBRARY_PATH={libraries}", *command]
            environment.pop("LD_LIBRARY_PATH")
        printed = _call(command, "running the aarch64 artifact", environment, scratch)
        outputs = [_read_output(Path(scratch), i) for i in range(len(list(Path(scratch).glob("output*.bin"))))]
    return outputs, [float(line) for line in printed.split()]


def _plan(artifact: Path, manifest: Manifest, feeds: Mapping[str, np.ndarray], folder: Path, n: int) -> str:
    """The runner's plan (see runner.cc); all files that it names are in ``folder``, where no path of a user's is said.

    The inputs are written there as raw files.
    """
    (folder / "model.so").symlink_to(artifact.resolve())
    (folder / "model.weights").symlink_to(weights_path(artifact.resolve()))
    lines = ["module ./model.so", "weights model.weights"]
    for weight in manifest.weights:
        lines.append(f"param {weight.offset} {weight.dtype} {_shape_words(weight.shape)}")
    for index, declared in enumerate(manifest.inputs):
        array = np.asarray(feeds[declared.name], declared.dtype, order="C")
        array.tofile(folder / f"input{index}.bin")
        lines.append(f"input {array.dtype} {_shape_words(array.shape)} input{index}.bin")
    return "\n".join([*lines, "outputs output", f"repeat {n}", ""])


def _shape_words(shape: tuple[int, ...] | list[int]) -> str:
    return " ".join(str(number) for number in (len(shape), *shape))


def _read_output(folder: Path, index: int) -> np.ndarray:
    code, bits, *shape = map(int, (folder / f"output{index}.txt").read_text().split())
    return np.fromfile(folder / f"output{index}.bin", dtype=_DTYPE_NAMES[code, bits]).reshape(shape)


def _call(
    command: list[str], doing: str, environment: Mapping[str, str] | None = None, folder: str | None = None
) -> str:
    """What a command run in ``folder`` prints, or InputError E-TOOLCHAIN with the last line it printed as an error."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
    except FileNotFoundError as error:
        raise InputError("E-TOOLCHAIN", f"{doing} failed", where=command[0], cure="install it") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or f"status {error.returncode}").strip().splitlines()[-1]
        raise InputError("E-TOOLCHAIN", f"{doing} failed", where=command[0], cure=reason) from error
    return done.stdout


if __name__ == "__main__":
    print(visible(f"aarch64 runtime and runner: {fetch()}"))
