"""DeiT-S shape and MiniLM-L6: what `xopt optimize` costs, and latency beside the peers, three interleaved runs each.

python benchmarks/whole_models.py docs/benchmarks/whole_models.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import psutil
from models import MODELS

THREADS = 2
RUNS = 3
CASES = {"deit-s": ("deit-s", []), "minilm-128": ("minilm", ["--dim", "batch=1", "--dim", "sequence=128"])}


def xopt(*arguments: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONSAFEPATH="1")
    command = [str(Path(sys.executable).with_name("xopt")), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def optimize(model: Path, output: Path) -> dict[str, float]:
    """Seconds from start to end, and the largest resident memory of the process (GB), sampled every 20 ms."""
    start = time.perf_counter()
    process = xopt("optimize", str(model), "--target", "cpu", "--no-peers", "-o", str(output), "--json")
    peak = 0
    watched = psutil.Process(process.pid)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"xopt optimize ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_gb": peak / 1e9}


def bench(model: Path, dims: list[str]) -> dict[str, Any]:
    process = xopt("bench", str(model), "--peers", "--threads", str(THREADS), "--json", *dims)
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"xopt bench ended with {process.returncode}")
    result: dict[str, Any] = json.loads(printed)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    record: dict[str, Any] = {"command": "python benchmarks/whole_models.py", "threads": THREADS, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (source, dims) in CASES.items():
            model = Path(scratch) / f"{name}.onnx"
            MODELS[source](model)
            case = record["cases"][name] = {"optimize": optimize(model, Path(scratch) / f"{name}-out"), "runs": []}
            for _ in range(RUNS):
                case["runs"].append(bench(model, dims))
            times = [{key: value["median_ms"] for key, value in run["runtimes"].items()} for run in case["runs"]]
            case["times_of_xopt"] = {
                peer: geometric_mean(run[peer] / run["xopt"] for run in times) for peer in times[0] if peer != "xopt"
            }
            print(name, case["optimize"], case["times_of_xopt"], times, file=sys.stderr, flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
