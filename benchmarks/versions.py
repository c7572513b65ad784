"""Two versions of xopt in turns: what a change costs where nothing was to change.

python benchmarks/versions.py OTHER_CHECKOUT --output ../docs/benchmarks/versions.json

Both compile the same file. In each of three runs both are started anew and take turns of a quarter of a second, stopped
but for their turns; a run's figure is the median of the turns' ratios, this version's time over the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import cpu
import models
import numpy as np

from xopt.data.dataset import Dataset
from xopt.measure import machine, peers_int8

HERE = Path(__file__).resolve().parents[1]
CASES = [
    *(cpu.Case(model, tokens, 1, 2) for model, tokens in cpu.SHAPES),
    cpu.Case("albert-small", 128, 1, 2),
    cpu.Case("minilm", 16, 1, 1),
    cpu.Case("deit-ti", None, 1, 1),
    cpu.Case("gpt2-decode", 128, 1, 1),
]
RUNS, TURNS = 3, 12
COMPILE = "import sys; from xopt.cli import main; sys.exit(main())"
SERVE = """
import sys, time
import numpy as np
from statistics import median
from xopt.runtime.session import Session, aligned_copy
session = Session.load(sys.argv[1], threads=int(sys.argv[3]))
feeds = {name: aligned_copy(array) for name, array in np.load(sys.argv[2]).items()}
for _ in range(3):
    session.run(feeds)
print("ready", flush=True)
for _ in sys.stdin:
    times, end = [], time.perf_counter() + 0.25
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(feeds)
        times.append(time.perf_counter() - start)
    print(median(times), flush=True)
"""


class Version:
    """A process with one version's session, stopped but for its turns."""

    def __init__(self, checkout: Path, artifact: Path, feeds: Path, threads: int) -> None:
        command = [sys.executable, "-c", SERVE, str(artifact), str(feeds), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment(checkout)
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        self.process.send_signal(signal.SIGSTOP)

    def turn(self) -> float:
        """Milliseconds of a call: the median of a turn."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = float(self.process.stdout.readline())
        self.process.send_signal(signal.SIGSTOP)
        return 1e3 * found


def environment(checkout: Path) -> dict[str, str]:
    """For a process that imports xopt from ``checkout``."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


def measure(case: cpu.Case, precision: str, other: Path) -> dict[str, Any]:
    """Milliseconds of both versions, turn by turn, for each run."""
    source, checkouts = cpu.fixed(case), {"this": HERE, "other": other}
    with tempfile.TemporaryDirectory(prefix="xopt-") as scratch:
        folder = Path(scratch)
        feeds = models.feeds(source, case.sizes())
        np.savez(folder / "feeds.npz", **feeds)
        if precision == "int8":
            quantized = folder / "quantized.onnx"
            peers_int8.write_quantized(source, Dataset(feeds, name="the input"), quantized, attention=True)
            source = quantized
        for name, checkout in checkouts.items():
            arithmetic = "fp32" if precision == "fp32" else "bf16"
            words = ["compile", str(source), "--precision", arithmetic, "-o", str(folder / f"{name}.so")]
            subprocess.run([sys.executable, "-c", COMPILE, *words], check=True, cwd=checkout, env=environment(checkout))
        return {"runs": [run(checkouts, folder, case.threads) for _ in range(RUNS)]}


def run(checkouts: dict[str, Path], folder: Path, threads: int) -> dict[str, list[float]]:
    """Both started anew, in turns."""
    versions = {
        name: Version(checkout, folder / f"{name}.so", folder / "feeds.npz", threads)
        for name, checkout in checkouts.items()
    }
    times: dict[str, list[float]] = {name: [] for name in versions}
    try:
        for turn in range(TURNS):
            for name in sorted(versions, reverse=bool(turn % 2)):
                times[name].append(round(versions[name].turn(), 5))
    finally:
        for version in versions.values():
            version.process.kill()
            version.process.wait()
    return times


def ratios(runs: Sequence[dict[str, list[float]]]) -> list[float]:
    """Of each run: this version's time over the other's."""
    return [median(a / b for a, b in zip(times["this"], times["other"])) for times in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of another checkout, which imports as it is")
    parser.add_argument("--output", type=Path, default=HERE / "docs" / "benchmarks" / "versions.json")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for precision in options.precision:
        for case in (case for case in CASES if options.only in case.name):
            cpu.source(case.model)
            entry = measure(case, precision, options.other.resolve())
            known["machine"] = machine.describe()
            known.setdefault("cases", {})[f"{precision} {case.name}"] = entry
            options.output.write_text(json.dumps(known, indent=1) + "\n")
            found = ratios(entry["runs"])
            print(f"{precision} {case.name}: {' '.join(f'{ratio:.3f}' for ratio in found)}", flush=True)


if __name__ == "__main__":
    main()
