"""One model loaded into every runtime, for `cpu.py`: runners, what compiling cost, and how much work there is."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np

from xopt import ir
from xopt.ir.cost import cost
from xopt.measure import peers
from xopt.measure.latency import Runner
from xopt.runtime.session import Session

ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
"""The products that a precision is limited by."""


@dataclass(frozen=True)
class Loaded:
    """Runners by name with their input, and facts about the model and the artifact."""

    runners: dict[str, Runner]
    feeds: dict[str, np.ndarray]
    skipped: dict[str, str]
    difference: dict[str, float]
    compile: dict[str, float]
    work: dict[str, Any]


def load(path: Path, sizes: models.Sizes, threads: int, precision: str, names: str | None) -> Loaded:
    """Compile a model for xopt, and load it into the peers.

    Args:
        path: a file with fixed sizes.
        sizes: those sizes, for the inputs.
        threads: that every runtime may use.
        precision: a key of `ARITHMETIC`.
        names: peers, separated by commas; None: all.
    """
    feeds = models.feeds(path, sizes)
    graph = ir.load(path)
    ir.canonicalize(graph)
    chosen = peers.NAMES if names is None else tuple(name for name in names.split(",") if name)
    found = peers.prepare(path, graph.clone, feeds, threads=threads, names=chosen)
    with tempfile.TemporaryDirectory(prefix="xopt-") as folder:
        spent = compiled(path, Path(folder))
        session = Session.load(folder, threads=threads)
    expected = {name: runner(feeds) for name, runner in found.runners.items()}
    ours = session.run(feeds)
    difference = {
        name: max(float(np.abs(ours[key] - value).max() / np.abs(value).max()) for key, value in outputs.items())
        for name, outputs in expected.items()
    }
    return Loaded({"xopt": session.run, **found.runners}, feeds, found.skipped, difference, spent, work(graph, feeds))


def compiled(path: Path, folder: Path) -> dict[str, float]:
    """Compile into ``folder`` in a process of its own: seconds, peak memory and sizes in MB."""
    start = time.perf_counter()
    command = [
        str(Path(sys.executable).with_name("xopt")),
        "compile",
        str(path),
        "--target",
        "cpu",
        "-o",
        str(folder),
        "--json",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    artifact = sum(file.stat().st_size for file in folder.iterdir())
    found = {"seconds": seconds, "artifact_mb": artifact / 1e6}
    return found | ({"peak_mb": peak / 1e3} if peak > before else {})


def work(graph: Any, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Multiply-adds and bytes that must be read, of every product; inputs and outputs of the model are a last entry."""
    counted = cost(graph)
    layers = []
    for node in graph.graph:
        macs = counted.per_node.get(node.name or str(node.outputs[0].name), 0)
        if macs:
            layers.append([macs, sum(value.const_value.nbytes for value in node.inputs if _constant(value))])
    outputs = sum(int(np.prod([int(dim) for dim in value.shape])) * 4 for value in graph.graph.outputs)
    layers.append([0, outputs + sum(array.nbytes for array in feeds.values())])
    return {"macs": counted.macs, "weight_bytes": counted.bytes, "layers": layers}


def _constant(value: Any) -> bool:
    return value is not None and value.const_value is not None
