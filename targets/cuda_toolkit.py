"""The CUDA compiler of the Python packages, on machines with and without a GPU.

The packages of the extra ``cuda`` carry NVRTC, the CUDA runtime and the headers, so no toolkit has to be installed.
TVM's CUDA module links against the driver (``libcuda.so.1``); where there is none, a stub takes its place: code is
compiled to machine code for the target's architecture, and only running it is impossible.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from xopt.errors import InputError

_CURE = 'install the packages of the extra: pip install "xopt[cuda]"'

# NVRTC compiles device code without the host's headers: what generated code takes from them.
_PREAMBLE = """#include <cuda/std/cstdint>
#include <cuda/std/limits>
using cuda::std::uint8_t; using cuda::std::uint16_t; using cuda::std::uint32_t; using cuda::std::uint64_t;
using cuda::std::int8_t; using cuda::std::int16_t; using cuda::std::int32_t; using cuda::std::int64_t;
#ifndef INFINITY
#define INFINITY (::cuda::std::numeric_limits<float>::infinity())
#endif
"""


def toolkit_folder() -> Path:
    """Folder with ``include/`` and ``lib/`` of the CUDA packages. Raises InputError E-TOOLCHAIN if they are missing."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for folder in sorted(Path(place).glob("cu[0-9]*"), reverse=True):
            if (folder / "include" / "cuda_runtime.h").is_file():
                return folder
    raise InputError("E-TOOLCHAIN", "the CUDA compiler's packages are missing", where="target cuda", cure=_CURE)


def device_present() -> bool:
    """Whether a CUDA driver with at least one device answers on this machine."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    if not hasattr(driver, "cuInit") or not hasattr(driver, "cuDeviceGetCount"):
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@functools.cache
def enable() -> None:
    """Make TVM able to compile for CUDA in this process; with a GPU present, to run as well."""
    import tvm
    import tvm_ffi

    folder = toolkit_folder()
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        _load_stub_driver()
    runtime = sorted((folder / "lib").glob("libcudart.so.*"))
    if not runtime:
        raise InputError("E-TOOLCHAIN", "the CUDA runtime library is missing", where=str(folder), cure=_CURE)
    ctypes.CDLL(str(runtime[-1]), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile, override=True)


def _load_stub_driver() -> None:
    """Build the stub and load it under the driver's soname, which later loads in this process resolve to."""
    source = Path(__file__).with_name("libcuda_stub.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                "E-TOOLCHAIN", "no C compiler works", where=" ".join(command), cure="install gcc"
            ) from error
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _compile(code: str) -> bytes:
    """Compile CUDA source to a cubin for the current TVM target's architecture.

    TVM's own callback turns fast math on, which costs exp, division and square root several digits: results would
    differ from the CPU's by more than rounding. Here they are IEEE.
    """
    import tvm
    from cuda.bindings import nvrtc

    target = tvm.target.Target.current(allow_none=False)
    include = toolkit_folder() / "include"
    options = [
        f"--gpu-architecture={target.attrs['arch']}",
        "-default-device",
        "--device-int128",
        "--std=c++17",
        f"-I{include}",
        f"-I{include / 'cccl'}",
    ]
    source = _PREAMBLE + "\n".join(line for line in code.splitlines() if line.strip() != "#include <cuda.h>")
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"xopt_kernels.cu", 0, None, None))
    flags = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC refused generated code:\n{log.decode(errors='replace')}")
    cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call, or RuntimeError with NVRTC's name for the failure."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status)}")
    return values[0] if values else None


def cubin_architectures(library: Path) -> list[str]:
    """Architectures (``"sm_90"``) of the CUDA machine code inside a shared object, read off its ELF images.

    A cubin is an ELF image for machine 190 (EM_CUDA). Its e_flags hold the architecture: bits 0..7 in ABI version 7,
    bits 8..15 in version 8 and later.
    """
    data = library.read_bytes()
    found = []
    start = data.find(b"\x7fELF", 1)
    while start >= 0:
        if int.from_bytes(data[start + 18 : start + 20], "little") == 190:
            flags = int.from_bytes(data[start + 48 : start + 52], "little")
            abi = data[start + 8]
            found.append(f"sm_{(flags >> 8) & 0xFF if abi >= 8 else flags & 0xFF}")
        start = data.find(b"\x7fELF", start + 4)
    return found
