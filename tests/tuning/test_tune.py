"""``xopt tune`` on a model: what it prints and keeps, an interrupt, a timeout, and what compile makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import xopt
from tests.acceptance.command import COMMAND, heed_interrupts
from tests.acceptance.command import xopt as command
from tests.ir.net import Net
from xopt.errors import InputError
from xopt.ir.io import save
from xopt.targets.database import read

KEYS = {
    "kernel", "shapes", "calls", "status", "known", "reason", "workload", "config", "heuristic", "ms", "heuristic_ms",
    "trials", "failures",
}  # fmt: skip


def small() -> ir.Model:
    """Two linear layers and a normalization: ``x [batch, 5, 48]`` -> ``y [batch, 5, 64]``."""
    net = Net("small", 0)
    x = net.input("x", ["batch", 5, 48])
    net.output(net.linear(net.layer_norm(net.linear(x, "up", 48, 96), "norm", 96), "down", 96, 64), "y")
    return net.build()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    save(small(), path)
    return path


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A database, and what the command that made it has printed."""
    path = tmp_path_factory.mktemp("tuned") / "tuned.jsonl"
    done = command("tune", model, "--trials", 2, "--database", path, "--json")
    assert done.status == 0, done.err
    assert done.err == ""
    return path, json.loads(done.out)


def test_json(tuned: tuple[Path, dict[str, Any]]) -> None:
    path, answer = tuned
    assert answer.keys() == {"schema", "kernels", "gain", "seconds", "threads", "database"}
    assert answer["database"] == str(path)
    assert answer["gain"] >= 1
    for kernel in answer["kernels"]:
        assert kernel.keys() == KEYS
        assert kernel["status"] in ("faster", "unbeaten")
        assert not kernel["known"]
        assert 0 < kernel["ms"] <= kernel["heuristic_ms"]
        assert kernel["trials"] <= 2
    assert len(list(read(path))) == len(answer["kernels"]) == 3


def test_what_is_known_is_not_measured_again(model: Path, tuned: tuple[Path, dict[str, Any]]) -> None:
    before = tuned[0].read_text()
    result = xopt.tune(model, database=tuned[0])
    assert all(kernel.known for kernel in result.kernels)
    assert tuned[0].read_text() == before


def test_the_table(model: Path, tuned: tuple[Path, dict[str, Any]]) -> None:
    done = command("tune", model, "--database", tuned[0])
    assert done.status == 0
    assert len(done.out.splitlines()) >= len(tuned[1]["kernels"]) + 2
    assert str(tuned[0]) in done.out


def test_no_time_leaves_everything_for_the_next_run(model: Path, tmp_path: Path) -> None:
    result = xopt.tune(model, database=tmp_path / "tuned.jsonl", timeout=0)
    assert {kernel.status for kernel in result.kernels} == {"left"}
    assert (tmp_path / "tuned.jsonl").read_text() == ""


@pytest.mark.slow
def test_an_interrupt_loses_nothing_and_the_next_run_goes_on(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.jsonl"
    arguments = [COMMAND, "tune", model, "--trials", "2", "--database", path]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as running:
        while running.poll() is None and not list(read(path)):  # until the first kernel is done
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        out, messages = running.communicate(timeout=120)
    assert running.returncode == 130
    assert out == ""
    assert messages.strip() == f"xopt: interrupted, kernels that were done are kept in {path}"
    kept = list(read(path))
    assert kept
    assert _children(running.pid) == []
    result = xopt.tune(model, database=path, trials=1)
    assert sum(kernel.known for kernel in result.kernels) == len(kept)


def _children(pid: int) -> list[str]:
    """Workers that have outlived the tuner ``pid``; they carry its number in no way but as orphans of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (entry / "cmdline").read_text().split("\0")
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid and "xopt.tuning.worker" in words:
            found.append(entry.name)
    return found


def test_a_tuned_model_computes_the_same(model: Path, tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 48), np.float32)}
    results = []
    for folder, database in (("tuned", tuned[0]), ("untuned", False)):
        (tmp_path / folder).mkdir()
        library = xopt.compile(model, output=tmp_path / folder / "model.so", database=database)
        results.append(xopt.Session.load(library).run(feeds))
    for name, array in results[0].items():
        np.testing.assert_allclose(array, results[1][name], rtol=1e-4, atol=1e-5)


def test_only_what_runs_here_can_be_tuned(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tuning measures on the target"):
        xopt.tune(model, "cuda", database=tmp_path / "tuned.jsonl")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tune", "model.onnx", "--trials", "0"], "E-OPTION"),
        (["compile", "model.onnx", "--database", "missing.jsonl"], "E-FILE"),
        (["compile", "model.onnx", "--database", os.devnull, "--no-database"], "E-OPTION"),
    ],
)
def test_bad_options(arguments: list[str], code: str) -> None:
    command(*arguments).refused(code)


def test_a_database_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command("tune", model, "--trials", 1, "--database", tmp_path / "file" / "tuned.jsonl").refused("E-OUTPUT")
