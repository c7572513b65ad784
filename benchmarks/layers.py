"""Where the time of whole models goes: every kernel of a run beside the machine's limits (a roofline, layer by layer).

    python benchmarks/layers.py docs/benchmarks/layers-fp32.json                    DeiT-S and MiniLM at float32
    python benchmarks/layers.py docs/benchmarks/layers-int8.json --precision int8   quantized, the rest at bfloat16
    python benchmarks/layers.py docs/benchmarks/layers-fp32.json --table            what was measured, in Markdown

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
from xopt.data.dataset import Dataset
from xopt.measure import latency, machine, peers_int8
from xopt.measure.layers import Layer, calls, layers, products
from xopt.measure.peak import Peak, Probe
from xopt.runtime.session import Session

SHAPES = (cpu.Case("deit-s", None, 1, 2), cpu.Case("minilm", 128, 1, 2))
ROUNDS, PROBES = 60, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
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
        precision = options.precision
        if precision == "int8":
            source, path, precision = path, Path(folder) / "quantized.onnx", "bf16"
            peers_int8.write_quantized(source, Dataset(feeds, name="the input that is timed"), path, attention=True)
        library = api.compile(path, output=folder, threads=options.threads, precision=precision)
        session = Session.load(library, threads=options.threads)
    with latency.pinned(options.threads):
        timed = calls(session, feeds, ROUNDS)
        peaks = {name: peak(options.threads, name) for name in products(timed)}
    found = layers(timed, peaks)
    return {
        "peaks": {name: {"gflops": one.gflops, "read_gb_per_s": one.gb_per_s} for name, one in peaks.items()},
        "ms": sum(layer.ms for layer in found),
        "layers": [entry(layer) for layer in found],
    }


def peak(threads: int, precision: str) -> Peak:
    """The best of some probes: what else runs on the machine slows one down, and never makes it faster."""
    probe = Probe(threads, precision)
    rates = [probe.measure() for _ in range(PROBES)]
    return Peak(max(rate.gflops for rate in rates), max(rate.gb_per_s for rate in rates))


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
