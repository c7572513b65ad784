"""Tuning a model from nothing: how long it takes, and what it gains.

    python benchmarks/tuning.py tune deit-s docs/benchmarks/tuning.json        # again until nothing is left
    python benchmarks/tuning.py tune minilm docs/benchmarks/tuning.json --tokens 128
    python benchmarks/tuning.py time deit-s docs/benchmarks/tuning.json        # as often as there should be runs

``tune`` starts with an empty database, or goes on with the one that the last call has left; the seconds of all calls
are kept. ``time`` compiles the model with the database and without any, and times both in turns. Files lie in
build/tuning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models

FOLDER = Path("build/tuning")
MODELS: dict[str, Callable[[Path], None]] = {
    **models.MODELS,
    "deit-b": partial(models.vision_transformer, width=768, heads=12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["tune", "time"])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("record", type=Path)
    parser.add_argument("--tokens", type=int, help="where the model takes any number of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    records = json.loads(options.record.read_text()) if options.record.exists() else {}
    tokens = f"{options.tokens} tokens, " if options.tokens else ""
    mine = records.setdefault(f"{options.model}, {tokens}{options.threads} threads", {"tuning": [], "timing": []})
    if options.action == "tune":
        mine["tuning"].append(tune(options))
    else:
        mine["timing"].append(time_both(options))
    options.record.write_text(json.dumps(records, indent=1) + "\n")


def dims(options: argparse.Namespace) -> dict[str, int]:
    return {"sequence": options.tokens} if options.tokens else {}


def model_file(name: str) -> Path:
    path = FOLDER / f"{name}.onnx"
    if not path.exists():
        MODELS[name](path)
    return path


def database(options: argparse.Namespace) -> Path:
    return FOLDER / f"{options.model}-{options.threads}.jsonl"


def tune(options: argparse.Namespace) -> dict[str, Any]:
    import xopt
    from xopt.measure import machine
    from xopt.report import tuning

    result = xopt.tune(
        model_file(options.model),
        dims=dims(options),
        threads=options.threads,
        trials=options.trials,
        timeout=options.timeout,
        database=database(options),
    )
    print(f"{result.seconds:.0f} s, {result.gain:.3f}x", {kernel.status for kernel in result.kernels})
    return {"machine": machine.describe(), "trials": options.trials, **tuning.to_json(result)}


def time_both(options: argparse.Namespace) -> dict[str, Any]:
    import xopt
    from xopt.data.dataset import Dataset
    from xopt.measure import latency, machine

    path = model_file(options.model)
    feeds = Dataset.random(xopt.load(path), 1, 0, dims(options)).inputs
    sessions = {}
    for name, choice in (("untuned", False), ("tuned", database(options))):
        library = xopt.compile(path, output=FOLDER / name, threads=options.threads, database=choice)
        sessions[name] = xopt.Session.load(library, threads=options.threads).run
    with latency.pinned(options.threads):
        times = latency.interleaved(sessions, feeds, rounds=options.rounds, seconds=60)
    ratio = times["untuned"].median / times["tuned"].median
    print(f"untuned {times['untuned'].median:.2f} ms, tuned {times['tuned'].median:.2f} ms, {ratio:.3f}x")
    runs = {name: t.record() for name, t in times.items()}
    return {"machine": machine.describe(), "runs": runs, "gain": ratio}


if __name__ == "__main__":
    main()
