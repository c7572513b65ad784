"""The fuzzer itself: it judges right, it makes the same case again, and a small sample of it finds nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.fuzz import cases, reference
from tests.fuzz.seeds import seeds

ROOT = Path(__file__).resolve().parents[2]
RUN = (sys.executable, "tests/fuzz/run.py")
JUDGED = """
import json, os, sys, time
sys.path.append(sys.argv[1])
from tests.fuzz.children import Limits, run
from xopt.errors import InputError, VerificationError

def refused(phase): raise InputError("E-FORMAT", "no")
def unverified(phase): raise VerificationError("E-VERIFY", "no")
def internal(phase): return {}["key"]
def crash(phase): os.kill(os.getpid(), 11)
def hang(phase):
    while True: pass
def memory(phase):
    kept = []
    while True: kept.append(bytearray(1 << 22))
def reference(phase):
    phase("reference")
    crash(phase)
def noise(phase):
    sys.stderr.write("Traceback (most recent call last):\\n  ...\\nRuntimeError: no\\n")
    return {"verdict": "equal"}
def equal(phase): return {"verdict": "equal"}

jobs = [refused, unverified, internal, crash, hang, memory, reference, noise, equal]
found = run(jobs, lambda job, phase: job(phase), Limits(1.0, 1 << 28), workers=2)
print(json.dumps({job.__name__: outcome.verdict for job, outcome in found}))
"""


def test_each_ending_has_its_verdict() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JUDGED, str(ROOT)], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout)
    assert found.pop("reference") == "no reference"
    assert len(found) == 8
    assert {name: verdict for name, verdict in found.items() if name != verdict} == {}


def test_a_case_is_made_again_byte_for_byte() -> None:
    for index in range(0, 240, 7):
        assert cases.case(3, index) == cases.case(3, index)
    assert len({cases.case(number, 20).model for number in range(20)}) > 10


@pytest.mark.parametrize("level", ["structure", "semantics"])
def test_every_mutation_can_be_written(level: str) -> None:
    for index in range(400):
        assert cases.case(4, index, level).model


def test_rounding_passes_and_another_number_does_not(tmp_path: Path) -> None:
    seed = seeds()[1]
    path = tmp_path / "model.onnx"
    path.write_bytes(seed.model)
    given = reference.feeds(onnx.load_from_string(seed.model), 0)
    want = reference.run(reference.session(path), given)
    allowed = reference.tolerance(path, given, want)
    assert allowed is not None and reference.BASE <= allowed < 1e-3
    moved = {name: array * np.float32(1 + 1e-6) for name, array in want.items()}
    assert reference.difference(want, moved)[0] < allowed
    name, array = next(iter(want.items()))
    other = array.copy()
    other.flat[0] += 0.01 * np.abs(array).max()
    assert reference.difference(want, {**want, name: other})[0] > allowed
    other.flat[0] = np.nan
    assert reference.difference(want, {**want, name: other})[1]


KEPT = {"load": ["2:270", "2:668"], "compile": ["2:17"]}
"""Cases that failed once, as the mutations make them today; each has a test of its own beside the code, too."""


@pytest.mark.parametrize("stage", KEPT)
def test_kept_cases(stage: str, tmp_path: Path) -> None:
    words = ["--stage", stage, "--output", str(tmp_path), "--replay", *KEPT[stage]]
    done = subprocess.run([*RUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("stage", "cases"),
    [("load", 24), *(pytest.param(stage, 60, marks=pytest.mark.slow) for stage in ("load", "artifacts"))],
)
def test_a_sample_finds_nothing(stage: str, cases: int, tmp_path: Path) -> None:
    words = ["--stage", stage, "--seed", "7", "--cases", str(cases), "--output", str(tmp_path)]
    done = subprocess.run([*RUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    found = json.loads((tmp_path / f"{stage}-7.json").read_text())
    assert done.returncode == 0, (found["causes"], done.stderr)
    assert found["cases"] == cases
    assert found["verdicts"]["equal"] > cases / 8
