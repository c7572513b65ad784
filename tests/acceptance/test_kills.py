"""Ctrl-C and SIGKILL at random moments: the old or the new output, whole; nothing left; ``--resume`` ends the same.

XOPT_KILLS=50 pytest -m slow tests/acceptance/test_kills.py -s      # so many in all, 6 by default
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.acceptance.command import COMMAND, LIMIT, heed_interrupts
from tests.acceptance.command import xopt as command
from tests.ir import builders
from tests.tuning.test_tune import small
from xopt import folder, ownership
from xopt.ir.io import save
from xopt.runtime import trio
from xopt.runtime.session import Session
from xopt.targets.database import Record

COUNT = int(os.environ.get("XOPT_KILLS", "6"))
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "digits_vit.onnx"
PRUNE = "prune-heads{score=magnitude,keep=0.5}"
SAME = ("model.onnx", "model.so", "model.weights", "manifest.json", "pipeline.yaml")
"""Results that two runs have in common, byte for byte; reports have times in them."""


@dataclass
class Case:
    """A command, where it writes, and what it writes when nobody interrupts it."""

    arguments: list[object]
    output: str
    seconds: float = 0.0
    old: dict[str, bytes] = field(default_factory=dict)
    new: dict[str, bytes] = field(default_factory=dict)


def content(path: Path) -> dict[str, bytes]:
    """The files of an output that do not depend on the clock."""
    files = path.parent.iterdir() if path.suffix == ".so" else path.iterdir() if path.is_dir() else []
    return {file.name: file.read_bytes() for file in files if file.name in SAME}


def run(case: Case, place: Path, env: dict[str, str], *more: object) -> None:
    done = command(*case.arguments, "-o", place / case.output, *more, env=env)
    assert done.status == 0, done.err


@dataclass(frozen=True)
class Whole:
    """The commands by name, and a folder of earlier results for each."""

    cases: dict[str, Case]
    earlier: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Each command, run twice without interruption: the results are the same."""
    models = tmp_path_factory.mktemp("models")
    save(builders.vit(layers=2), models / "vit.onnx")
    save(builders.vit(layers=1), models / "old.onnx")
    cases = {
        "optimize": Case(["optimize", DIGITS, "--no-peers"], "out"),
        "optimize for arm": Case(["optimize", models / "vit.onnx", "--target", "arm", "--passes", PRUNE], "out"),
        "compile": Case(["compile", DIGITS], "model.so"),
    }
    for name, case in cases.items():
        once, twice = (tmp_path_factory.mktemp("whole") for _ in range(2))
        start = time.monotonic()
        run(case, once, environment(once))
        case.seconds = time.monotonic() - start
        run(case, twice, environment(twice))
        case.new = content(once / case.output)
        assert content(twice / case.output) == case.new, f"two runs of {name} differ"
        earlier = Case([case.arguments[0], models / "old.onnx", *case.arguments[2:]], case.output)
        (models / name).mkdir()
        run(earlier, models / name, environment(once))
        case.old = content(models / name / case.output)
    return Whole(cases, models)


def environment(place: Path) -> dict[str, str]:
    temporary = place.parent / f"{place.name}-temporary"
    temporary.mkdir(exist_ok=True)
    return {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(temporary / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    yield found
    print("\nkills: " + ", ".join(f"{number} {name}" for name, number in sorted(found.items())))


def killed(arguments: list[object], env: dict[str, str], after: float, how: signal.Signals) -> int:
    """Run a command for a while, and send it a signal; its exit status, when no process of it is left."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **env},
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(how)
    status = process.wait(LIMIT)
    deadline = time.monotonic() + 30
    while left := session(process.pid):
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("processes of the killed command live on")
        time.sleep(0.05)
    return status


def session(leader: int) -> list[int]:
    """The processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            state, _, _, number = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if entry.name.isdecimal() and int(number) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def strays(place: Path, env: dict[str, str]) -> tuple[list[str], list[str]]:
    """What lies beside the output, and among the temporary files: a name, or the text of a trace."""
    beside = [path.name for path in place.iterdir() if path.name.endswith(".xopt-cache")]
    files = [path for path in Path(env["TMPDIR"]).iterdir() if path.name != "cache"]
    return beside, [path.read_text() if path.name.startswith("xopt-trace") else path.name for path in files]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(COUNT - COUNT // 5))
def test_an_output_is_whole_whenever_its_run_was_killed(
    seed: int, whole: Whole, counts: Counter[str], tmp_path: Path
) -> None:
    chance = random.Random(seed)
    name = ("optimize", "compile", "optimize for arm", "optimize")[seed % 4]
    how = (signal.SIGKILL, signal.SIGINT)[seed // 4 % 2] if COUNT > 6 else (signal.SIGKILL, signal.SIGINT)[seed % 2]
    case, place = whole.cases[name], tmp_path / "place"
    with_old = chance.random() < 0.7
    shutil.copytree(whole.earlier / name, place) if with_old else place.mkdir()
    before, env = case.old if with_old else {}, environment(place)
    after = chance.uniform(0.1, 1.05) * case.seconds
    status = killed([*case.arguments, "-o", place / case.output], env, after, how)
    if case.output == "model.so":
        trio.settle(place / case.output)
    elif (place / case.output).exists():
        assert ownership.strangers(place / case.output) == []
    found = content(place / case.output)
    assert found in (before, case.new), f"{name}: neither old nor new after {after:.2f} s"
    if found and case.output == "model.so":
        Session.load(place / case.output)
    beside, temporary = strays(place, env)
    if how is signal.SIGINT and status == 130:
        assert temporary == []
        assert [path for path in beside if not (place / path / "steps").is_dir()] == []
    counts[f"{name} {how.name} ({'new' if found == case.new else 'old' if with_old else 'none'} whole)"] += 1
    counts["resumed from steps"] += any((place / path / "steps").is_dir() for path in beside)
    run(case, place, env, *(["--resume"] if case.arguments[0] == "optimize" else []))
    assert content(place / case.output) == case.new, f"{name}: resumed after {after:.2f} s, another result"
    assert strays(place, env) == ([], [])
    if case.output == "out":
        folder.check(place / case.output)


def tuning(place: Path) -> list[object]:
    save(small(), place / "small.onnx")
    return ["tune", place / "small.onnx", "--trials", 1, "--database", place / "tuned.jsonl"]


@pytest.fixture(scope="module")
def seconds_to_tune(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of a run that nobody interrupts."""
    place = tmp_path_factory.mktemp("tuned")
    start = time.monotonic()
    done = command(*tuning(place), env=environment(place))
    assert done.status == 0, done.err
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(max(COUNT // 5, 1)))
def test_a_database_keeps_whole_records_whenever_tuning_was_killed(
    seed: int, seconds_to_tune: float, counts: Counter[str], tmp_path: Path
) -> None:
    chance = random.Random(seed)
    how = (signal.SIGKILL, signal.SIGINT)[seed % 2]
    place = tmp_path / "place"
    place.mkdir()
    env, path, arguments = environment(place), place / "tuned.jsonl", tuning(place)
    killed(arguments, env, chance.uniform(0.1, 1.05) * seconds_to_tune, how)
    lines = path.read_text().splitlines() if path.exists() else []
    torn = [line for line in lines if Record.parse(line) is None]
    assert torn == []
    counts[f"tune {how.name} ({len(lines)} kernels kept)"] += 1
    done = command(*arguments, env=env)
    assert done.status == 0, done.err
    assert path.read_text().splitlines()[: len(lines)] == lines
    assert all(Record.parse(line) is not None for line in path.read_text().splitlines())
    assert {entry.name for entry in place.iterdir()} == {"small.onnx", "tuned.jsonl"}
    assert strays(place, env) == ([], [])
