"""No index and no size makes generated code touch memory that is not its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi.libinfo

from tests.targets.test_indices import CASES, outside
from xopt import targets
from xopt.runtime.manifest import Manifest, manifest_path
from xopt.runtime.session import REFUSAL
from xopt.targets.arm_runtime import _plan

HERE = Path(__file__).parent / "memory"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "guard.c", "-ldl"], check=True)
    return library


def guarded(guard: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``memory/guarded.py`` between guard pages."""
    environment = {**os.environ, "LD_PRELOAD": str(guard), "TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.targets.memory.guarded", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_guard_pages_notice_a_kernel_that_reads_too_far(guard: Path) -> None:
    assert guarded(guard, "overrun").returncode == -signal.SIGSEGV


@pytest.mark.slow
def test_kernels_that_index_stay_between_guard_pages(guard: Path) -> None:
    done = guarded(guard)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 600


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_valgrind_finds_nothing_in_kernels_that_index(tmp_path: Path) -> None:
    runner, random = native_runner(tmp_path), np.random.default_rng(0)
    for number, case in enumerate(CASES):
        (tmp_path / str(number)).mkdir()
        library = targets.compile(case.model(), "cpu:avx2", tmp_path / str(number) / "model.so")
        manifest = Manifest.from_json(manifest_path(library).read_text(), str(library))
        for hostile in (False, True):
            feeds, extents = case.feeds(random)
            if hostile:
                wrong = random.choice(outside(extents[0], case.kind), feeds["x1"].shape)
                feeds["x1"] = wrong.astype(feeds["x1"].dtype)
            folder = tmp_path / f"{number}-{hostile}"
            folder.mkdir()
            (folder / "plan").write_text(_plan(library, manifest, feeds, folder, 0) + "allocator 1\n")
            done = valgrind(runner, folder)
            assert "ERROR SUMMARY: 0 errors" in done.stderr, done.stderr[-4000:]
            assert (REFUSAL in done.stderr) == hostile, done.stderr[-4000:]
            assert (folder / "output0.bin").exists() != hostile


def native_runner(folder: Path) -> Path:
    """``targets/runner.cc`` for this machine: an artifact without Python."""
    libraries = [Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent, Path(find_spec("tvm").origin).parent / "lib"]
    command = ["g++", "-std=c++17", "-O1", "-g", str(ROOT / "targets" / "runner.cc"), "-o", str(folder / "runner")]
    command += [f"-I{tvm_ffi.libinfo.find_include_path()}", f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}"]
    command += [option for path in libraries for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command += ["-ltvm_ffi", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_runtime_extra"]
    subprocess.run(command, check=True)
    return folder / "runner"


def valgrind(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Memcheck, which knows every byte of every allocation, over the plan in a folder."""
    command = ["valgrind", "--error-limit=no", "--undef-value-errors=no", str(program), "plan"]
    environment = {**os.environ, "TVM_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
