"""A third party's pass that breaks its promise: caught at once, found by bisection, reproduced from what it leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.acceptance.command import Done, xopt
from tests.ir import builders
from xopt.ir.io import save

NAME = "nudge"
MODULE = '''
"""A pass that calls itself exact, and changes one weight by a few per mille."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from xopt.pipeline.base import Effect, Pass, PassReport


@dataclass(frozen=True)
class Nudge(Pass):
    """Scale the last projection."""

    name: ClassVar[str] = "nudge"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model, context):
        report = PassReport(self)
        value = [node.inputs[1] for node in model.graph if node.op_type == "MatMul"][-1]
        value.const_value = ir.tensor(value.const_value.numpy() * 1.003, dtype=value.dtype, name=value.name)
        report.matched = 1
        report.rewrote(value)
        return report
'''
PASSES = "canonicalize,fold-constants,deduplicate,nudge,fuse-qkv,eliminate-dead"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine on which a distribution with the pass is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "third_party_nudge.py").write_text(MODULE)
    info = site / "third_party_nudge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-nudge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[xopt.passes]\nnudge = third_party_nudge:Nudge\n")
    scratch = tmp_path_factory.mktemp("scratch")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(scratch)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "vit.onnx"
    save(builders.vit(layers=1), path)
    return path


@pytest.fixture(scope="module")
def caught(model: Path, installed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Done:
    output = tmp_path_factory.mktemp("place") / "out"
    done = xopt("optimize", model, "--passes", "nudge", "-o", output, env=installed)
    assert list(output.parent.iterdir()) == []
    return done


def test_the_pass_is_known(installed: dict[str, str]) -> None:
    found = {one["name"]: one["effect"] for one in json.loads(xopt("passes", "--json", env=installed).out)["passes"]}
    assert found[NAME] == "exact"


def test_verification_catches_it(caught: Done) -> None:
    message = caught.refused("E-VERIFY", status=3)
    assert "nudge breaks output 'logits'" in message and "in pass nudge" in message


def test_the_reproducer_runs_to_the_same_error(caught: Done, installed: dict[str, str]) -> None:
    folder = Path(caught.message.rpartition(" ")[2])
    assert json.loads((folder / "reproducer.json").read_text())["error"]["code"] == "E-VERIFY"
    again = xopt("run", folder, env=installed)
    what = "nudge breaks output 'logits': max abs difference"
    assert what in again.refused("E-VERIFY", status=3)
    figures = [done.message.partition(what)[2].partition(", in pass")[0] for done in (caught, again)]
    assert figures[0] == figures[1]


def test_bisection_finds_it(model: Path, installed: dict[str, str]) -> None:
    done = xopt("bisect", model, "--passes", PASSES, "--json", env=installed)
    assert done.status == 3
    culprit = json.loads(done.out)["culprit"]
    assert (culprit["pass"], culprit["index"]) == (NAME, 4)


@pytest.mark.slow
def test_without_verification_it_is_believed(model: Path, installed: dict[str, str], tmp_path: Path) -> None:
    """What verify-each is for: it can be turned off, and the word of an exact pass is then taken."""
    words = ["--no-verify-each", "--target", "arm", "--json", "-o", tmp_path / "out"]
    done = xopt("optimize", model, "--passes", "nudge", *words, env=installed)
    assert done.status == 0, done.err
    assert json.loads(done.out)["steps"][-1]["kept"]
