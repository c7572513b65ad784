"""Every model of the zoo, by each exporter: blocks found, compiled outputs beside onnxruntime, what each pass does.

    python -m benchmarks.zoo docs/benchmarks/zoo.json          goes on where it stopped
    python -m benchmarks.zoo docs/benchmarks/zoo.json --table  writes docs/zoo.md

Models are measured in a process of their own, with a limit of time: a crash is one result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.zoo import measuring
from tests.zoo.entry import Entry
from tests.zoo.exporting import Way, exported
from tests.zoo.ways import MODELS, expected, two_ways

SECONDS = 600
"""For one model by one exporter."""
COMPARED = 4
"""Numbers of samples and lengths at most that outputs are compared at."""


def measure(entry: Entry, way: Way, passes: Iterable[str]) -> dict[str, Any]:
    """One row of the results."""
    data = exported(entry, way)
    model, report = measuring.canonical(entry, way)
    attentions, ffns = measuring.counts(model)
    expect = expected(entry, way)
    row: dict[str, Any] = {
        "attentions": [expect.count, attentions],
        "ffns": [expect.count if expect.ffns is None else expect.ffns, ffns],
        "named": sorted(measuring.named(model, report)),
        "expected": sorted(expect.named),
    }
    try:
        row |= _compiled(entry, way, data, model)
    except Exception as error:
        row["compiled"] = _line(error)
    row["passes"] = {name: _outcome(name, entry, model) for name in passes}
    return row


def _compiled(entry: Entry, way: Way, data: bytes, model: Any) -> dict[str, Any]:
    original = measuring.onnxruntime_of(data)
    with tempfile.TemporaryDirectory() as folder:
        run = measuring.compiled(model, Path(folder))
        compared = measuring.sizes(entry, way)[:COMPARED]
        errors = []
        for batch, seq in compared:
            feeds = measuring.feeds_of(entry, model, batch, seq)
            errors.append(measuring.difference(run(feeds), original(feeds)))
    return {"compiled": "right" if max(errors) < measuring.COMPILED else "wrong", "errors": errors, "sizes": compared}


def _outcome(name: str, entry: Entry, model: Any) -> list[str]:
    try:
        return list(measuring.outcome(name, entry, model))
    except Exception as error:
        return ["failed", _line(error)]


def _line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(where.filename).name}:{where.lineno})"


def _work(jobs: list[tuple[str, Way, tuple[str, ...]]], log: str) -> None:
    warnings.simplefilter("ignore")
    entries = {entry.name: entry for entry in MODELS}
    with Path(log).open("w", buffering=1, encoding="utf-8") as lines:
        for name, way, passes in jobs:
            signal.alarm(SECONDS)  # ends the process
            start = time.perf_counter()
            try:
                row = measure(entries[name], way, passes)
            except Exception as error:
                row = {"failed": _line(error)}
            signal.alarm(0)
            seconds = round(time.perf_counter() - start, 1)
            print(json.dumps({"model": name, "exporter": way.exporter, **row, "seconds": seconds}), file=lines)


def run(jobs: list[tuple[str, Way, tuple[str, ...]]]) -> Iterable[dict[str, Any]]:
    """Rows of all jobs, in their order; where the process ends, the next one goes on behind that job."""
    context = multiprocessing.get_context("spawn")
    while jobs:
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
            process = context.Process(target=_work, args=(jobs[:8], log.name))
            process.start()
            process.join()
            rows = [json.loads(line) for line in log]
        if len(rows) < len(jobs[:8]):
            name, way, _ = jobs[len(rows)]
            failed = f"the process ended with status {process.exitcode}"
            rows.append({"model": name, "exporter": way.exporter, "failed": failed})
        yield from rows
        jobs = jobs[len(rows) :]


VERDICT = {"rewritten": "yes", "nothing": "nothing to do"}
KINDS = ("attentions", "ffns")
SHORT = 60
"""Letters of a reason that the table shows; the raw file has them all."""


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The page: a summary, a line for each model and exporter, then what each pass did."""
    rows = sorted(rows, key=lambda row: (row["model"], row["exporter"]))
    compared = [row for row in rows if "errors" in row]
    found = sum(_is_as_expected(row) for row in rows)
    right = sum(row.get("compiled") == "right" for row in rows)
    models = {row["model"] for row in rows}
    worst = max((max(row["errors"]) for row in compared), default=0.0)
    done = {(row["model"], row["exporter"]) for row in rows}
    exports = ((entry.name, way.exporter) for entry in MODELS for way in two_ways(entry))
    open_ = [f"{name} ({exporter})" for name, exporter in exports if (name, exporter) not in done]
    verdicts = Counter(verdict[0] for row in rows for verdict in row.get("passes", {}).values())
    lines = [
        "# The zoo",
        "",
        f"{len(rows)} exports of {len(models)} of the {len(MODELS)} small models in `tests/zoo` (random weights), each",
        "through load, the compiler and every pass; made by `python -m benchmarks.zoo`, all of it in the",
        "[raw file](benchmarks/zoo.json). *Found* counts attention blocks and feed-forward networks that are",
        "recognized, beside how many are expected. *Error* is the largest difference of the compiled model from",
        "onnxruntime on the export, as a share of the largest output (or of 1), over all outputs and four inputs of",
        "other batches and lengths (one, where the export fixes them). Each row is an export's last run, which may",
        "be of an earlier commit.",
        "",
        f"Found as expected: {found} of {len(rows)}. Compiled and equal to {measuring.COMPILED:g}: {right} of",
        f"{len(rows)} (largest difference {worst:.1e}). What passes did: "
        + ", ".join(f"{n} times {word}" for word, n in verdicts.most_common())
        + ".",
        "",
        f"Without a row (not measured at all, or not since what failed was mended): {len(open_)} exports"
        + (f", {', '.join(open_)}." if open_ else "."),
        "",
        "| model | exporter | attentions found / expected | FFNs found / expected | in no block, because | error |",
        "|---|---|---|---|---|---|",
        *(_line_of(row) for row in rows),
        "",
        "## Passes",
        "",
        "Each on a copy of the model, verified. *Yes* with the number of rewrites, else the first reason and place.",
        "",
        "| model | " + " | ".join(measuring.PASSES) + " |",
        "|---" * (1 + len(measuring.PASSES)) + "|",
        *(_passes_of(row) for row in rows if row.get("passes")),
    ]
    return "\n".join(lines) + "\n"


def _is_as_expected(row: Mapping[str, Any]) -> bool:
    """Whether the blocks, and the reasons for what is in none, are those that the model's entry says."""
    if "named" not in row:
        return False
    return all(row[kind][0] == row[kind][1] for kind in KINDS) and row["named"] == row["expected"]


def _line_of(row: Mapping[str, Any]) -> str:
    start = f"| {row['model']} | {row['exporter']} | "
    if "named" not in row:
        return start + f"| | | {_short(row['failed'])} |"
    counts = (f"{row[kind][1]} / {row[kind][0]}" for kind in KINDS)
    error = f"{max(row['errors']):.1e}" if "errors" in row else _short(row["compiled"])
    return start + " | ".join((*counts, ", ".join(row["named"]), error)) + " |"


def _passes_of(row: Mapping[str, Any]) -> str:
    cells = []
    for name in measuring.PASSES:
        verdict, words = row["passes"].get(name, ("", ""))
        first = words.split("; ")[0]
        cells.append(f"yes, {first}" if verdict == "rewritten" else VERDICT.get(verdict, f"{verdict}: {_short(first)}"))
    return f"| {row['model']} | " + " | ".join(cells) + " |"


def _short(words: str) -> str:
    plain = words.replace("|", "/")
    return plain if len(plain) <= SHORT else plain[: SHORT - 1] + "…"


def main() -> None:
    """Measure what has no result yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--table", action="store_true", help="write docs/zoo.md from the results")
    parser.add_argument("--only", nargs="+", default=(), help="models")
    parser.add_argument("--first", action="store_true", help="of each model only the first export")
    parser.add_argument("--passes", nargs="*", default=list(measuring.PASSES), help="these passes alone")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    if arguments.table:
        Path("docs/zoo.md").write_text(table(rows), encoding="utf-8")
        return
    done = {(row["model"], row["exporter"]) for row in rows}
    entries = [entry for entry in MODELS if not arguments.only or entry.name in arguments.only]
    jobs = [
        (entry.name, way, tuple(arguments.passes) if first else ())
        for entry in entries
        for first, way in zip((True,) if arguments.first else (True, False), two_ways(entry))
        if (entry.name, way.exporter) not in done
    ]
    for row in run(jobs):
        rows.append(row)
        lines = ",\n".join(json.dumps(one) for one in rows)
        arguments.results.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
