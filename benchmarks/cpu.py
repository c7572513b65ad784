"""Whole models on this CPU: the same ONNX file in xopt and in the runtimes that people use today, in turns.

    python benchmarks/cpu.py                                     every case at float32, into docs/benchmarks/
    python benchmarks/cpu.py --precision bf16 --only minilm      some of them at another precision
    python benchmarks/cpu.py --table                             what was measured so far

A case is a model, a batch and a number of threads; its entry is written when it is finished, and cases with an entry
are left out, except where something disturbed the measurement, or with --again. Each case is a process of its own,
which starts one for each runtime, all of them stopped but the one whose turn it is, and measures --runs times: the
runtimes in turns on the same input and cores, and the machine's own limits right before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "benchmarks"
CACHE = HERE.parent / "build" / "benchmarks"
MOST_SPREAD = 0.15
"""Difference between the medians of two runs, as a share, from which on they are repeated."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    tokens: int | None
    batch: int
    threads: int

    @property
    def name(self) -> str:
        length = "" if self.tokens is None else f"-{self.tokens}"
        return f"{self.model}{length} batch {self.batch} threads {self.threads}"

    def sizes(self) -> dict[str, int]:
        """Sizes of the symbolic axes of the model's inputs."""
        if self.model == "gpt2-decode":
            return {"batch": self.batch, "past": self.tokens or 0}
        return {"batch": self.batch} | ({} if self.tokens is None else {"sequence": self.tokens})


SHAPES: list[tuple[str, int | None]] = [
    ("deit-s", None),
    ("deit-ti", None),
    ("bert-base", 128),
    ("minilm", 16),
    ("minilm", 128),
    ("minilm", 256),
    ("gpt2-prefill", 128),
    ("gpt2-decode", 128),
]
CASES = [Case(*shape, batch, threads) for batch, threads in ((1, 2), (1, 1), (8, 2), (8, 1)) for shape in SHAPES]


def main() -> None:
    options = _options()
    output = options.output or DOCS / f"cpu-{options.precision}.json"
    record = json.loads(output.read_text()) if output.exists() else {"precision": options.precision, "cases": {}}
    chosen = [case for case in CASES if options.only in case.name]
    if options.case is not None:
        print(json.dumps(measure(next(case for case in CASES if case.name == options.case), options)))
    elif options.table:
        table(record)
    else:
        for case in chosen:
            if options.again or record["cases"].get(case.name, {"disturbed": True})["disturbed"]:
                if (entry := in_process(case, options)) is None:
                    print(f"{case.name} failed", flush=True)
                    continue
                record["cases"][case.name] = entry
                summarize(record)
                write(output, record)
                print(line(case.name, entry), flush=True)
        table(record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure also what has an undisturbed entry")
    parser.add_argument("--table", action="store_true", help="print what was measured in Markdown, measure nothing")
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs of a case")
    parser.add_argument("--rounds", type=int, default=15, help="undisturbed samples of each runtime in a run")
    parser.add_argument("--seconds", type=float, default=8.0, help="for a run, or as long as five rounds take")
    parser.add_argument("--guard", default="cat", metavar="CMD", help="runs `CMD cat` while a case is timed (see docs)")
    parser.add_argument("--peers", default=None, metavar="NAME,...", help="instead of all of the precision")
    parser.add_argument("--output", type=Path, help="docs/benchmarks/cpu-PRECISION.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure a case in a process with the right number of threads; None when the process fails."""
    count = str(case.threads)
    environment = os.environ | {"TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    source(case.model)
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--case", case.name],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def source(model: str) -> Path:
    """The model's ONNX file; exported when it is missing."""
    path = CACHE / f"{model}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, HERE / "models.py", model, path], check=True)
    return path


def fixed(case: Case) -> Path:
    """The model with the case's sizes, which the runtimes work best with, beside the original, whose weights it has."""
    import onnx
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    original = source(case.model)
    model = onnx.load(original, load_external_data=False)
    del model.graph.value_info[:]
    for name, size in case.sizes().items():
        make_dim_param_fixed(model.graph, name, size)
    path = original.with_name(f"{case.name.replace(' ', '-')}.onnx")
    onnx.save(model, path)
    return path


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Load all runtimes, measure the runs, and put together the entry of a case."""
    import prepare

    from xopt.measure import latency, machine
    from xopt.measure.peak import Probe

    probe = Probe(case.threads, prepare.ARITHMETIC[options.precision])
    runs: list[dict[str, Any]] = []
    with (
        prepare.loaded(fixed(case), case.sizes(), case.threads, options.precision, options.peers) as loaded,
        latency.pinned(case.threads),
        guarded(options.guard),
    ):
        while not enough(runs, options.runs):
            peak = probe.measure()
            times = latency.in_turns(loaded.contenders, rounds=options.rounds, seconds=options.seconds)
            runs.append(
                {
                    "peak_gflops": peak.gflops,
                    "read_gb_per_s": peak.gb_per_s,
                    "median_ms": {name: t.median for name, t in times.items()},
                    "samples_ms": {name: [round(x, 5) for x in t.samples_ms] for name, t in times.items()},
                    "waits": {name: [round(x, 4) for x in t.waits] for name, t in times.items()},
                }
            )
    return {
        "threads": case.threads,
        "skipped": loaded.skipped,
        "difference": loaded.difference,
        "compile": loaded.compile,
        "work": loaded.work,
        "machine": machine.describe(),
        "runs": runs,
    }


@contextmanager
def guarded(command: str) -> Iterator[None]:
    """While ``command cat`` runs: a way to keep other work off the machine during the timed part of a case."""
    words = command.split()
    words += [] if words == ["cat"] else ["cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        yield
        process.stdin.close()


def enough(runs: list[dict[str, Any]], wanted: int) -> bool:
    """Whether there are as many good runs as wanted, or twice as many with bad ones."""
    return len(good(runs)) >= wanted or len(runs) >= 2 * wanted


def good(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs at the machine's full speed in which xopt and the two fastest peers were left alone, and fast as ever."""
    peak = max((run["peak_gflops"] for run in runs), default=0.0)
    found = [run for run in runs if run["peak_gflops"] > (1 - MOST_SPREAD) * peak]
    if not found:
        return []
    times = {name: min(run["median_ms"][name] for run in found) for name in found[0]["median_ms"]}
    names = ["xopt", *sorted(times.keys() - {"xopt"}, key=lambda name: times[name])[:2]]
    found = [run for run in found if not any(disturbed(run, name) for name in names)]
    least = {name: min((run["median_ms"][name] for run in found), default=0.0) for name in names[:2]}
    return [run for run in found if all(run["median_ms"][n] <= (1 + MOST_SPREAD) * least[n] for n in least)]


def disturbed(run: dict[str, Any], name: str) -> bool:
    """Whether a runtime had too few turns in a run in which its threads did not wait for a CPU."""
    from xopt.measure.latency import Latency

    return Latency(run["samples_ms"][name], run["waits"][name]).disturbed


def summarize(record: dict[str, Any]) -> None:
    """Make the figures of every case from its raw samples, in place."""
    entries = record["cases"].values()
    for entry in entries:
        alike = [run for other in entries if other["threads"] == entry["threads"] for run in other["runs"]]
        entry |= summary(entry["runs"], entry["work"]["layers"], alike)


def summary(runs: list[dict[str, Any]], layers: list[list[int]], alike: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the good runs (over all of them when none is), and shares of the machine's limits.

    Args:
        runs: of a case.
        layers: multiply-adds and bytes of its products.
        alike: all runs with as many threads, on the same machine: the limits are the best that any of them met.
    """
    counted = good(runs) or runs
    names = counted[0]["median_ms"]
    times = {name: geometric_mean(run["median_ms"][name] for run in counted) for name in names}
    flops = max(run["peak_gflops"] for run in alike) * 1e9
    bandwidth = max(run["read_gb_per_s"] for run in alike) * 1e9
    limit = 1e3 * sum(max(2 * macs / flops, size / bandwidth) for macs, size in layers)
    best = min((name for name in times if name != "xopt"), key=lambda name: times[name], default="xopt")
    return {
        "counted_runs": len(counted),
        "disturbed": not good(runs),
        "times_ms": times,
        "best_peer": best,
        "times_of_xopt": geometric_mean(run["median_ms"][best] / run["median_ms"]["xopt"] for run in counted),
        "limit_ms": limit,
        "share_of_limit": {name: limit / time for name, time in times.items()},
        "gflops": {name: 2e-6 * sum(macs for macs, _ in layers) / time for name, time in times.items()},
    }


def write(output: Path, record: dict[str, Any]) -> None:
    """Write the record as a whole, one line for each run."""
    text = json.dumps(record, indent=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(compact(text) + "\n")
    os.replace(partial, output)


def compact(text: str) -> str:
    """Indented JSON with every list of numbers on one line."""
    import re

    return re.sub(r"\[\s*([-0-9.e+,\s]+?)\s*\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)


def line(name: str, entry: dict[str, Any]) -> str:
    times = "  ".join(f"{runtime} {ms:.3g}" for runtime, ms in entry["times_ms"].items())
    mark = " (disturbed)" if entry["disturbed"] else ""
    share = entry["share_of_limit"]["xopt"]
    return (
        f"{name:36s} {entry['times_of_xopt']:5.2f}x {entry['best_peer']:12s} {share:4.0%} of limit | {times} ms{mark}"
    )


def table(record: dict[str, Any]) -> None:
    """Print the cases as a table in Markdown, and the geometric means over them."""
    print("| case | xopt | best peer | its time / xopt's | GFLOP/s | of the limit |\n|---|---|---|---|---|---|")
    groups: dict[str, list[float]] = {}
    for name, entry in record["cases"].items():
        mark = " (disturbed)" if entry["disturbed"] else ""
        times, best = entry["times_ms"], entry["best_peer"]
        cells = [
            name + mark,
            f"{times['xopt']:.3g} ms",
            f"{best} {times[best]:.3g} ms",
            f"{entry['times_of_xopt']:.2f}",
        ]
        cells += [f"{entry['gflops']['xopt']:.0f}", f"{entry['share_of_limit']['xopt']:.0%}"]
        print("| " + " | ".join(cells) + " |")
        if not entry["disturbed"]:
            groups.setdefault(name[name.index("batch") :], []).append(entry["times_of_xopt"])
    print()
    for group, ratios in groups.items():
        print(f"{group}: {geometric_mean(ratios):.2f} times the speed of the best peer, over {len(ratios)} cases")


if __name__ == "__main__":
    main()
