"""How much slower each runtime becomes beside busy processes on the same cores.

    python benchmarks/neighbours.py                   every case, into docs/benchmarks/neighbours.json
    python benchmarks/neighbours.py --only minilm     some of them
    python benchmarks/neighbours.py --table           what was measured so far

Every runtime has a process of its own, stopped but for its turns, on as many threads as there are cores; turns go round
among the runtimes, half a second each, first alone, then beside 1, 2 and 4 processes that count in a loop. A figure is
the median over the turns of the mean time of a call in a turn.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import cpu
from cpu import Case

CASES = [
    (Case("minilm", 128, 1, 2), "fp32"),
    (Case("minilm", 128, 1, 2), "int8"),
    (Case("deit-ti", None, 1, 2), "fp32"),
    (Case("gpt2-decode", 128, 1, 2), "fp32"),
    (Case("albert-small", 128, 1, 2), "fp32"),
]
NEIGHBOURS = (0, 1, 2, 4)
TURN_MS = 500.0
PEERS = {"fp32": "onnxruntime,openvino", "int8": "onnxruntime-qdq,openvino-qdq"}
"""The fastest peers at each precision."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--turns", type=int, default=8, help="of each runtime beside each number of processes")
    parser.add_argument("--table", action="store_true", help="print what was measured in Markdown, measure nothing")
    parser.add_argument("--output", type=Path, default=cpu.DOCS / "neighbours.json")
    options = parser.parse_args()
    record = json.loads(options.output.read_text()) if options.output.exists() else {"cases": {}}
    for case, precision in CASES:
        name = f"{case.name} {precision}"
        if options.only in name and not options.table:
            record["cases"][name] = measure(case, precision, options.turns)
            cpu.write(options.output, record)
            print(line(name, record["cases"][name]), flush=True)
    print(table(record))


def measure(case: Case, precision: str, turns: int) -> dict[str, Any]:
    """Milliseconds of a call in every turn, by runtime and number of neighbours."""
    import prepare

    from xopt.measure import machine

    beside: dict[str, dict[str, list[float]]] = {}
    with prepare.loaded(cpu.fixed(case), case.sizes(), case.threads, precision, PEERS[precision]) as loaded:
        once = {name: process.turn(process.calls_in_a_turn())[0] for name, process in loaded.contenders.items()}
        calls = {name: math.ceil(TURN_MS / ms) for name, ms in once.items()}
        for count in NEIGHBOURS:
            taken = beside.setdefault(str(count), {name: [] for name in calls})
            with busy(count):
                for turn in range(turns):
                    names = list(calls)
                    for name in names[turn % len(names) :] + names[: turn % len(names)]:
                        taken[name].append(loaded.contenders[name].turn(calls[name])[0])
    return {"threads": case.threads, "machine": machine.describe(), "turns_ms": beside, **summary(beside)}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but count, meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def summary(beside: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Median time of each runtime, and how many times its time when alone that is."""
    times = {count: {name: median(turns) for name, turns in taken.items()} for count, taken in beside.items()}
    growth = {count: {name: ms / times["0"][name] for name, ms in found.items()} for count, found in times.items()}
    return {"times_ms": times, "growth": growth}


def line(name: str, entry: dict[str, Any]) -> str:
    parts = []
    for count, found in entry["times_ms"].items():
        growth = entry["growth"][count]
        parts.append(f"{count}: " + ", ".join(f"{who} {ms:.3g} ms {growth[who]:.2f}x" for who, ms in found.items()))
    return f"{name}\n  " + "\n  ".join(parts)


def table(record: dict[str, Any]) -> str:
    """The cases as a table in Markdown: time, and how many times its time when alone."""
    lines = ["| case | runtime | alone | 1 busy process | 2 | 4 |", "|---|---|---|---|---|---|"]
    for name, entry in record["cases"].items():
        for who in entry["times_ms"]["0"]:
            cells = [f"{entry['times_ms'][c][who]:.3g} ms, {entry['growth'][c][who]:.2f}" for c in entry["times_ms"]]
            lines.append(f"| {name} | {who} | " + " | ".join([cells[0].partition(",")[0], *cells[1:]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
