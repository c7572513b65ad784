"""No index and no size makes generated code touch memory that is not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "memory"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "guard.c", "-ldl"], check=True)
    return library


def guarded(guard: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``memory/guarded.py`` between guard pages."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(guard), "TVM_NUM_THREADS": "2", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tests.targets.memory.guarded", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_guard_pages_notice_a_kernel_that_reads_too_far(guard: Path) -> None:
    assert guarded(guard, "overrun").returncode == -signal.SIGSEGV


def test_kernels_that_index_stay_between_guard_pages(guard: Path) -> None:
    done = guarded(guard)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 600
