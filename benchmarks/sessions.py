"""What a call costs beside the kernels, and what sessions that run at once do to each other.

python benchmarks/sessions.py docs/benchmarks/sessions.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cpu
import models
import numpy as np

from xopt import api
from xopt.measure import machine
from xopt.runtime.arrays import aligned_copy
from xopt.runtime.session import Session
from xopt.runtime.threads import physical_cores

CALLS = 2000
SECONDS = 3.0
TOKENS = 128
ROUNDS = 5


def smallest_model() -> Any:
    """One addition of four numbers: a call of it is nearly all overhead."""
    import onnx_ir as ir
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "smallest", [x], [y])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def call_us(session: Session, feeds: dict[str, np.ndarray]) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        session.run(feeds)
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def per_second(artifact: Path, feeds: dict[str, np.ndarray], sessions: int, threads: int) -> float:
    """Calls a second of all sessions together, each in a Python thread of its own."""
    counts = [0] * sessions
    ready, stop = threading.Barrier(sessions + 1), threading.Event()

    def work(index: int) -> None:
        session = Session.load(artifact, threads=threads)
        session.run(feeds)
        ready.wait()
        while not stop.is_set():
            session.run(feeds)
            counts[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(sessions)]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    time.sleep(SECONDS)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--guard", default="cat", help="as for cpu.py")
    options = parser.parse_args()
    cores = physical_cores()
    source = cpu.source("minilm")
    feeds = models.feeds(source, {"batch": 1, "sequence": TOKENS})
    ways: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory(prefix="xopt-") as scratch:
        folder = Path(scratch)
        tiny = Session.load(api.compile(smallest_model(), "cpu", folder / "tiny.so"))
        artifact = api.compile(source, "cpu", folder / "minilm.so")
        ways["one session, all cores"] = lambda: per_second(artifact, feeds, 1, cores)
        ways["two sessions, all cores each"] = lambda: per_second(artifact, feeds, 2, cores)
        ways["two sessions, half of the cores each"] = lambda: per_second(artifact, feeds, 2, max(cores // 2, 1))
        with cpu.guarded(options.guard):
            overhead = call_us(tiny, {"x": aligned_copy(np.ones((1, 4), np.float32))})
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    rates[name].append(way())
    record = {
        "machine": machine.describe(),
        "call_of_smallest_model_us": overhead,
        "calls_per_second": rates,
        "median_calls_per_second": {name: median(values) for name, values in rates.items()},
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("call_of_smallest_model_us", "median_calls_per_second")}))


if __name__ == "__main__":
    main()
