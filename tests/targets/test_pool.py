"""The pool by itself: every iteration once, whoever else runs, as sanitizers see it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from xopt.targets.base import POOL

STRESS = Path(__file__).with_name("pool_stress.cc")


def built(folder: Path, *options: str) -> Path:
    program = folder / "stress"
    command = ["g++", "-std=c++17", "-g", "-O1", "-pthread", *options, str(POOL), str(STRESS), "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    return program


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_every_iteration_is_done_once(tmp_path: Path, sanitizer: str) -> None:
    program = built(tmp_path, f"-fsanitize={sanitizer}")
    # Sanitizers want the addresses that programs had before kernels chose them at random over more bits.
    run = ["setarch", "-R", str(program)]
    for callers, threads in ((1, 2), (1, 5), (3, 3), (4, 2)):
        done = subprocess.run([*run, str(callers), str(threads), "300"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert done.stdout == "0 wrong\n"
