"""Mutated models through xopt: ``make fuzz``, or ``python tests/fuzz/run.py --stage load --cases 10000``.

Each case is one line of out/fuzz/<stage>-<seed>.jsonl; a run goes on where the last one stopped. A case is made again
by ``--replay SEED:INDEX``, which keeps its files in out/fuzz/replay.
"""

from __future__ import annotations

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy is there: the parent must stay a process of one thread
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import argparse  # noqa: E402
import collections  # noqa: E402
import contextlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import pkgutil  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Protocol  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tests.fuzz import artifacts, children, files  # noqa: E402
from tests.fuzz.cases import Case, case  # noqa: E402
from tests.fuzz.children import Limits, Phase  # noqa: E402
from tests.fuzz.stages import STAGES, check  # noqa: E402

OUTPUT = ROOT / "out" / "fuzz"


def preload() -> None:
    """Import what a case needs, so that the children find it there, and the same whatever is edited meanwhile."""
    import onnxruntime
    import onnxscript.version_converter  # noqa: F401

    import xopt
    from tests.fuzz.seeds import seeds
    from xopt import facts, ir

    for module in pkgutil.walk_packages(xopt.__path__, "xopt."):
        with contextlib.suppress(ImportError):  # what needs a package that is not there: CUDA's
            importlib.import_module(module.name)
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder:
        model = ir.load(Case("", "", seeds()[-1].model, b"").write(Path(folder)))
        ir.canonicalize(model)
        facts.describe(model, {})
        ir.export(model)


class One(Protocol):
    """A mutated thing.

    Attributes:
        name: the seed that it was made of.
        level: the kind of mutation.
        changes: names of the mutations.
    """

    name: str
    level: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """What can be fuzzed: how a case is made of (seed, index, level), and checked in a folder of its own."""

    make: Callable[[int, int, str | None], Any]
    check: Callable[[Any, Path, Phase], dict[str, Any]]
    limits: Limits = field(default_factory=Limits)


KINDS = {
    **{name: Kind(case, partial(check, stage), stage.limits) for name, stage in STAGES.items()},
    "artifacts": Kind(artifacts.altered, artifacts.check),
    "files": Kind(files.altered, files.check),
}


def work(job: tuple[Kind, int, int, str | None, Path | None], phase: Phase) -> dict[str, Any]:
    """One case; its files vanish unless a folder is named."""
    kind, number, index, level, kept = job
    one = kind.make(number, index, level)
    if kept is not None:
        return kind.check(one, kept, phase)
    with tempfile.TemporaryDirectory(prefix="xopt-fuzz-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        return kind.check(one, Path(folder) / "case", phase)


def indices(arguments: argparse.Namespace, done: set[int]) -> Iterator[int]:
    """The indices to do, as long as there is time."""
    end = time.monotonic() + 60 * arguments.minutes
    for index in range(arguments.start, arguments.start + arguments.cases):
        if time.monotonic() > end:
            return
        if index not in done:
            yield index


def main() -> int:
    arguments = parse()
    preload()
    if arguments.replay:
        return replay(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / f"{arguments.stage}-{arguments.seed}.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    kind = KINDS[arguments.stage]
    jobs = (
        (kind, arguments.seed, index, arguments.level, None)
        for index in indices(arguments, {line["index"] for line in known})
    )
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        for count, (job, outcome) in enumerate(children.run(jobs, work, kind.limits, arguments.workers), 1):
            one: One = kind.make(*job[1:4])
            facts = {"model": one.name, "level": one.level, "changes": one.changes}
            line = {"seed": job[1], "index": job[2], **facts, **outcome.record()}
            known.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            if not outcome.good:
                print(
                    f"{job[1]}:{job[2]} {' '.join((one.name, *one.changes))}: {outcome.verdict}: {outcome.detail}",
                    flush=True,
                )
            if count % 500 == 0:
                print(f"{count} cases, {(time.monotonic() - started) / count:.2f} s each", flush=True)
    found = {"stage": arguments.stage, "seed": arguments.seed, **summary(known)}
    log.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(found["failures"] > 0)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by verdict and level, the slowest and the largest case, and failures by cause."""
    causes: dict[str, list[str]] = collections.defaultdict(list)
    refusals: collections.Counter[str] = collections.Counter()
    for line in lines:
        if line["verdict"] not in children.GOOD:
            causes[cause(line)].append(f"{line['seed']}:{line['index']}")
        elif line["verdict"] == "refused":
            refusals[line["detail"].split("]")[0].removeprefix("error[")] += 1
    levels = {
        level: dict(collections.Counter(x["verdict"] for x in lines if x["level"] == level))
        for level in sorted({x["level"] for x in lines})
    }
    return {
        "cases": len(lines),
        "failures": sum(map(len, causes.values())),
        "verdicts": dict(collections.Counter(line["verdict"] for line in lines)),
        "levels": levels,
        "refusals": dict(refusals.most_common()),
        "slowest_s": max((line["seconds"] for line in lines), default=0),
        "largest_mb": max((line["peak"] for line in lines), default=0) >> 20,
        "largest_difference": max(
            (line["facts"].get("difference", 0) for line in lines if line["verdict"] == "equal"), default=0
        ),
        "causes": dict(sorted(causes.items(), key=lambda item: -len(item[1]))),
    }


def cause(line: dict[str, Any]) -> str:
    """The failure without what differs from case to case."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", line["detail"])
    text = re.sub(r"(?<![\w.])-?\d[\d.e+-]*", "#", text)
    return f"{line['verdict']} in {line['phase']}: {text[:140]}"


def replay(arguments: argparse.Namespace) -> int:
    """The named cases again; each keeps its files."""
    folder, kind = arguments.output / "replay", KINDS[arguments.stage]
    shutil.rmtree(folder, ignore_errors=True)
    places = [place.split(":") for place in arguments.replay]
    jobs = [(kind, int(n), int(i), arguments.level, folder / f"{n}-{i}") for n, i in places]
    outcomes = [outcome for _, outcome in children.run(jobs, work, kind.limits)]
    print(json.dumps([outcome.record() for outcome in outcomes], indent=1), f"\nthe files are in {folder}")
    return int(not all(outcome.good for outcome in outcomes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=KINDS, default="load")
    parser.add_argument("--level", choices=("bytes", "structure", "semantics"), help="only this kind of mutation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first index")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results")
    parser.add_argument("--replay", metavar="SEED:INDEX", nargs="+", help="these cases again, keeping their files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
