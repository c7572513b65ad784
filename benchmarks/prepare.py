"""One model in every runtime, each a process, for `cpu.py`: what compiling cost, and how much work there is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np

from xopt import ir
from xopt.data.dataset import Dataset
from xopt.ir.cost import cost
from xopt.measure import peers, peers_int8
from xopt.measure.isolated import Process, isolated
from xopt.measure.latency import Runner
from xopt.runtime.session import Session

ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
"""The products that a precision is limited by."""
SPENT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
spent = resource.getrusage(resource.RUSAGE_CHILDREN)
print(spent.ru_utime + spent.ru_stime, spent.ru_maxrss)
"""
"""Runs a command as a child of a small process: Linux counts the memory of whoever starts a process as its own."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Of one weight of a linear layer."""


@dataclass(frozen=True)
class Loaded:
    """Runtimes by name, and facts about the model and the artifact."""

    contenders: dict[str, Process]
    skipped: dict[str, str]
    difference: dict[str, float]
    compile: dict[str, float]
    work: dict[str, Any]


@contextmanager
def loaded(path: Path, sizes: models.Sizes, threads: int, precision: str, names: str | None) -> Iterator[Loaded]:
    """Compile a model for xopt, and load it into xopt and the peers, until the context ends.

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
    known = peers_int8.NAMES if precision == "int8" else peers.NAMES
    chosen = known if names is None else tuple(name for name in names.split(",") if name)
    with tempfile.TemporaryDirectory(prefix="xopt-") as scratch:
        folder = Path(scratch)
        source = path
        if precision == "int8":
            source, theirs = folder / "quantized-attention.onnx", folder / "quantized.onnx"
            samples = Dataset(feeds, name="the input that is timed")  # for speed, not for accuracy
            peers_int8.write_quantized(path, samples, source, attention=True)
            peers_int8.write_quantized(path, samples, theirs)
            others = peers_int8.factories(path, theirs, feeds, samples, threads=threads, names=chosen)
        else:
            others = peers.factories(path, feeds, threads=threads, names=chosen, precision=precision)
        spent = compiled(source, folder / "artifact", "fp32" if precision == "fp32" else "bf16")
        ours = partial(compiled_runner, folder / "artifact", threads)
        with isolated({"xopt": ours, **others}, feeds, threads) as found:
            difference = differences({name: process.outputs() for name, process in found.contenders.items()})
            yield Loaded(found.contenders, found.skipped, difference, spent, work(graph, feeds, precision))


def compiled_runner(artifact: Path, threads: int) -> Runner:
    """The compiled model, loaded."""
    return Session.load(artifact, threads=threads).run


def differences(outputs: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """The largest difference of each peer's outputs to xopt's, as a share of the largest number in them."""
    ours = outputs["xopt"]
    return {
        name: max(float(np.abs(ours[key] - value).max() / np.abs(value).max()) for key, value in theirs.items())
        for name, theirs in outputs.items()
        if name != "xopt"
    }


def compiled(path: Path, folder: Path, precision: str) -> dict[str, float]:
    """Compile into ``folder`` in a process of its own: seconds, of them on a CPU, peak memory and size in MB."""
    folder.mkdir()
    xopt = Path(sys.executable).with_name("xopt")
    command = [xopt, "compile", path, "--precision", precision, "-o", folder, "--json"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", SPENT, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    cpu_seconds, peak_kb = map(float, done.stdout.split())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_kb * 1024 / 1e6,
        "artifact_mb": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
    }


def work(graph: Any, feeds: dict[str, np.ndarray], precision: str) -> dict[str, Any]:
    """Multiply-adds and bytes that must be read, of every product; inputs and outputs of the model are a last entry."""
    counted = cost(graph)
    layers = []
    for node in graph.graph:
        macs = counted.per_node.get(node.name or str(node.outputs[0].name), 0)
        if macs:
            weights = sum(value.const_value.size for value in node.inputs if _constant(value))
            layers.append([macs, weights * WEIGHT_BYTES[precision]])
    outputs = sum(int(np.prod([int(dim) for dim in value.shape])) * 4 for value in graph.graph.outputs)
    layers.append([0, outputs + sum(array.nbytes for array in feeds.values())])
    return {"macs": counted.macs, "model_mb": counted.bytes / 1e6, "layers": layers}


def _constant(value: Any) -> bool:
    return value is not None and value.const_value is not None
