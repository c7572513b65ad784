"""Where the time of whole models goes: every kernel of a run beside the machine's limits (a roofline, layer by layer).

    python benchmarks/layers.py docs/benchmarks/layers-fp32.json                  DeiT-S and MiniLM at float32
    python benchmarks/layers.py docs/benchmarks/layers-bf16.json --precision bf16
    python benchmarks/layers.py docs/benchmarks/layers-fp32.json --table          what was measured, in Markdown

The limit of a linear layer is the longer of two times, its arithmetic at the machine's peak or reading its weights; of
attention its two products. Kernels without products have none.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import cpu
import models

from xopt import api
from xopt.measure import latency, machine
from xopt.measure.layers import Layer, calls, layers
from xopt.measure.peak import Peak, Probe
from xopt.runtime.session import Session

SHAPES = (cpu.Case("deit-s", None, 1, 2), cpu.Case("minilm", 128, 1, 2))
PEAK = {"fp32": "float32", "bf16": "bfloat16"}
ROUNDS, PROBES = 60, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=sorted(PEAK), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print what was measured, measure nothing")
    options = parser.parse_args()
    if not options.table:
        record = {
            "machine": machine.describe(),
            "precision": options.precision,
            "threads": options.threads,
            "models": {case.name: measure(case, options) for case in SHAPES},
        }
        cpu.write(options.output, record)
    table(json.loads(options.output.read_text()))


def measure(case: cpu.Case, options: argparse.Namespace) -> dict[str, Any]:
    """The kernels of one model: time of all calls, and what the machine needs for them."""
    path = cpu.fixed(case)
    feeds = models.feeds(path, case.sizes())
    with tempfile.TemporaryDirectory(prefix="xopt-") as folder:
        library = api.compile(path, output=folder, threads=options.threads, precision=options.precision)
        session = Session.load(library, threads=options.threads)
    probe = Probe(options.threads, PEAK[options.precision])
    with latency.pinned(options.threads):
        rates = [probe.measure() for _ in range(PROBES)]
        timed = calls(session, feeds, ROUNDS)
        rates += [probe.measure() for _ in range(PROBES)]
    # The best of them: what else runs on the machine slows a probe down, and never makes it faster.
    peak = Peak(max(rate.gflops for rate in rates), max(rate.gb_per_s for rate in rates))
    found = layers(timed, peak)
    return {
        "peak_gflops": peak.gflops,
        "read_gb_per_s": peak.gb_per_s,
        "ms": sum(layer.ms for layer in found),
        "layers": [entry(layer) for layer in found],
    }


def entry(layer: Layer) -> dict[str, Any]:
    return {
        "kernel": layer.kernel,
        "calls": layer.calls,
        "ms": round(layer.ms, 5),
        "gflops": round(layer.flops * 1e-9, 6),
        "limit_ms": round(layer.limit_ms, 5),
    }


def table(record: dict[str, Any]) -> None:
    """Markdown: a table for each model."""
    for name, model in record["models"].items():
        print(f"\n{name}, {record['precision']}: {model['ms']:.2f} ms in kernels\n")
        print("| kernel | calls | ms | share | of the limit |\n|---|---|---|---|---|")
        for layer in model["layers"]:
            limit = f"{layer['limit_ms'] / layer['ms']:.0%}" if layer["limit_ms"] else ""
            cells = [f"`{layer['kernel']}`", str(layer["calls"]), f"{layer['ms']:.3f}"]
            print("| " + " | ".join([*cells, f"{layer['ms'] / model['ms']:.0%}", limit]) + " |")


if __name__ == "__main__":
    main()
