"""A real signal, and a real full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import xopt
from tests.acceptance.command import heed_interrupts
from tests.ir import builders
from xopt import api
from xopt.errors import InputError
from xopt.ir.io import save

COMMAND = [sys.executable, "-c", "from xopt.cli import main; main()", "optimize", "model.onnx", "--no-peers"]


def test_sigint_ends_with_one_line_and_no_output(tmp_path: Path) -> None:
    save(builders.vit(layers=2), tmp_path / "model.onnx")
    cache = tmp_path / ".out.xopt-cache"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        COMMAND, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as running:
        while running.poll() is None and not (cache / "steps").exists():  # until the first pass is done
            pass
        running.send_signal(signal.SIGINT)
        _, messages = running.communicate(timeout=120)
    assert running.returncode == 130
    assert messages.strip().startswith("xopt: interrupted") and "\n" not in messages.strip()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.onnx", cache.name}


@pytest.fixture(scope="module")
def result() -> api.Result:
    return xopt.optimize(builders.vit(layers=1), target="arm")


@pytest.mark.parametrize("full", ["model.onnx", "report.json"])
def test_a_full_disk_leaves_the_old_output(
    full: str, result: api.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def no_space(*anything: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if full == "model.onnx":
        monkeypatch.setattr(api, "save", no_space)
    else:
        monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(InputError, match="the disk is full") as caught:
        result.save(tmp_path / "out")
    assert caught.value.code == "E-OUTPUT"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
