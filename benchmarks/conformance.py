"""ONNX's own backend tests through xopt, onnxruntime and OpenVINO: how many are right, refused, wrong, broken.

    python -m benchmarks.conformance docs/benchmarks/conformance.json          goes on where it stopped
    python -m benchmarks.conformance docs/benchmarks/conformance.json --table  writes docs/conformance.md

Each test runs in a process of its own, with a limit of time, in each runtime: a crash is one result.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx

from tests.conformance import suite

RUNTIMES = ("xopt", "onnxruntime", "openvino")
SECONDS = 120
"""For one test in one runtime."""
VERDICTS = ("right", "wrong", "refused", "error", "crash")


def with_onnxruntime(model: onnx.ModelProto) -> suite.Run:
    """Read with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds))))


def with_openvino(model: onnx.ModelProto) -> suite.Run:
    """Compile with OpenVINO for the CPU, in the precision of the model."""
    import openvino

    folder = Path(tempfile.mkdtemp())
    onnx.save(model, str(folder / "model.onnx"))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", settings)
    names = [value.name for value in model.graph.output]

    def run(feeds: Mapping[str, suite.Array]) -> dict[str, suite.Array]:
        results = compiled(list(feeds.values()))
        return {name: np.asarray(results[place]) for place, name in enumerate(names)}

    return run


LOADERS = {"xopt": suite.compiled, "onnxruntime": with_onnxruntime, "openvino": with_openvino}


def verdict(case: suite.Case, runtime: str) -> tuple[str, str]:
    """How a test ends in a runtime: one of ``VERDICTS``, and why."""
    from xopt.errors import InputError

    try:
        run = LOADERS[runtime](case.model)
    except InputError as error:
        return "refused", f"{error.code}: {error.what}"[:160]
    except Exception as error:  # xopt has a word of its own for a refusal; what the others raise is taken for one
        return "error" if runtime == "xopt" else "refused", _line(error)
    try:
        difference = suite.disagreement(case, run)
    except InputError as error:
        return "refused", f"{error.code}: {error.what}"[:160]
    except Exception as error:
        return "error" if runtime == "xopt" else "refused", _line(error)
    return ("wrong", difference) if difference else ("right", "")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _work(group: str, runtime: str, skip: frozenset[str], log: str) -> None:
    warnings.simplefilter("ignore")
    with Path(log).open("w", buffering=1, encoding="utf-8") as lines:
        for case in suite.cases(group):
            if case.name in skip:
                continue
            known = {"name": case.name, "runtime": runtime, "operator": case.operator}
            print(json.dumps(known | {"out_of_scope": suite.out_of_scope(case)}), file=lines)
            signal.alarm(SECONDS)  # ends the process
            found, why = verdict(case, runtime)
            signal.alarm(0)
            print(json.dumps({"verdict": found, "why": why}), file=lines)


def measure(group: str, runtime: str, done: frozenset[str]) -> list[dict[str, str]]:
    """All tests of a group in a runtime; a test at which the process ends is a crash, and the next process goes on."""
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, str]] = []
    while True:
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
            process = context.Process(
                target=_work, args=(group, runtime, done | {row["name"] for row in rows}, log.name)
            )
            process.start()
            process.join()
            entries = [json.loads(line) for line in log]
        rows += [known | found for known, found in zip(entries[::2], entries[1::2])]
        if not len(entries) % 2:
            return rows
        rows.append(entries[-1] | {"verdict": "crash", "why": f"status {process.exitcode}"})


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """The page: verdicts by runtime, and by operator where they differ."""
    rows = list(rows)
    count = {
        (runtime, scope): Counter(
            row["verdict"] for row in rows if row["runtime"] == runtime and bool(row["out_of_scope"]) == scope
        )
        for runtime in RUNTIMES
        for scope in (False, True)
    }
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnx", *RUNTIMES[1:]))
    lines = [
        "# ONNX's backend tests",
        "",
        "What the ONNX project tests runtimes with: one operator (or a few) a test, with inputs and the outputs that",
        f"are to come out. {versions}; one thread of a CPU, float32 as float32. Made by `benchmarks/conformance.py`.",
        "*Refused* is an error before anything ran, in words; *error* any other exception, *crash* the end of the",
        "process or no end. The other runtimes' exceptions all count as refused. Each row is a test's last run, which",
        "may be of an earlier commit.",
        "",
    ]
    for scope, title in ((False, "Tensors of numbers, operators of inference"), (True, "Everything else")):
        lines += [f"## {title}", "", "| runtime | " + " | ".join(VERDICTS) + " |", "|---" * 6 + "|"]
        for runtime in RUNTIMES:
            found = count[runtime, scope]
            lines.append(f"| {runtime} | " + " | ".join(str(found[kind]) for kind in VERDICTS) + " |")
        lines.append("")
    words = Counter(row["out_of_scope"] for row in rows if row["runtime"] == "xopt" and row["out_of_scope"])
    lines += ["Everything else: " + ", ".join(f"{word} ({number})" for word, number in words.most_common()) + "."]
    lines += [BEYOND, "", *_refused(rows)]
    lines += ["## By operator", "", "Right of all, where not all three have all.", ""]
    lines += ["| operator | tests | " + " | ".join(RUNTIMES) + " |", "|---" * 5 + "|"]
    scoped = [row for row in rows if not row["out_of_scope"]]
    for operator in sorted({_title(row) for row in scoped}):
        own = [row for row in scoped if _title(row) == operator]
        right = {name: sum(row["runtime"] == name and row["verdict"] == "right" for row in own) for name in RUNTIMES}
        total = len({row["name"] for row in own})
        if any(right[name] != total for name in RUNTIMES):
            lines.append(f"| {operator} | {total} | " + " | ".join(str(right[name]) for name in RUNTIMES) + " |")
    return "\n".join(lines) + "\n"


BEYOND = """\
xopt refuses it by an error that says which, but for a few that ask for nothing of the kind. An artifact computes with
tensors of numbers alone (no texts, no sequences or optional values, no complex numbers), gives the same for the same
inputs (no random draws), and is made for inference with neural networks (no training, no trees and tables, no reading
of image files)."""


def _refused(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """What xopt refuses that is in scope, with its own words."""
    found = [row for row in rows if row["runtime"] == "xopt" and row["verdict"] != "right" and not row["out_of_scope"]]
    if not found:
        return []
    lines = ["## What xopt does not compile yet", "", "| test | what it says |", "|---" * 2 + "|"]
    for row in sorted(found, key=lambda row: row["name"]):
        lines.append(f"| {row['name'].rpartition('/')[2]} | {row['verdict']}: {row['why'].replace('|', ' ')} |")
    return [*lines, ""]


def _title(row: Mapping[str, str]) -> str:
    return row["operator"] if "+" not in row["operator"] else "several"


def main() -> None:
    """Run the tests that have no result yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="write docs/conformance.md from the results")
    parser.add_argument("--runtime", choices=RUNTIMES, action="append", help="only these")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    if arguments.table:
        Path("docs/conformance.md").write_text(table(rows), encoding="utf-8")
        return
    done = {runtime: frozenset(row["name"] for row in rows if row["runtime"] == runtime) for runtime in RUNTIMES}
    jobs = [(group, runtime) for runtime in arguments.runtime or RUNTIMES for group in suite.groups()]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for found in pool.map(lambda job: measure(*job, done[job[1]]), jobs):
            rows += found
            if found:
                ordered = sorted(rows, key=lambda row: (RUNTIMES.index(row["runtime"]), row["name"]))
                lines = ",\n".join(json.dumps(row) for row in ordered)
                arguments.results.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
