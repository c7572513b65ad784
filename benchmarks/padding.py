"""MiniLM-L6 on batches of real sentences of different lengths: with padding, without it, and the peers' best way.

    python benchmarks/padding.py --data ../shared/data --output docs/benchmarks/padding.json

Batches of 64 sentences of STS Benchmark: in the order of the file, and the shortest, middling and longest of a
thousand, so that their numbers of tokens differ; padded to the longest sentence, and to what the model's tokenizer pads
to. Every way of running a batch gets the same padded arrays:

    xopt padded, xopt       one artifact of the model as it is, and one after remove-padding (also at bf16)
    onnxruntime, openvino   the whole batch, or sorted by length and cut into smaller ones, which are padded less: the
                            best of several sizes

All in turns, each in a process of its own. The fit says how the time of a batch follows its number of real tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from by_length import sorted_by_length
from minilm_pruning import Split, padded
from models import minilm, minilm_folder
from prepare import compiled_runner
from transformers import AutoTokenizer

from xopt import targets
from xopt.ir import canonicalize, export, load, save
from xopt.measure.isolated import Factory, isolated
from xopt.measure.latency import in_turns
from xopt.measure.machine import describe
from xopt.measure.peers import onnxruntime_runner, openvino_runner
from xopt.passes import FuseQKV, RemovePadding
from xopt.pipeline.context import PassContext

BATCH = 64
PARTS = (4, 8, 16, 32)
FIXED = 128
"""What the tokenizer.json of MiniLM-L6 pads every sentence to."""
Feeds = dict[str, np.ndarray]


def batches(data: Path) -> dict[str, Feeds]:
    """Batches by name, padded to their longest sentence; two of them also as the model's tokenizer.json pads."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    split = Split.read(data, "test", tokenizer)
    sentences = [*split.first, *split.second]
    ordered = sorted(sentences[:1000], key=len)
    found = {f"file order {start // BATCH}": sentences[start : start + BATCH] for start in range(0, 4 * BATCH, BATCH)}
    places = {"shortest": 0, "middling": 500 - BATCH // 2, "longest": 1000 - BATCH}
    found |= {name: ordered[start : start + BATCH] for name, start in places.items()}
    feeds = {name: padded(sentences) for name, sentences in found.items()}
    fixed = {name: arrays for name, arrays in feeds.items() if name in ("file order 0", "file order 1")}
    return feeds | {f"{name}, {FIXED} tokens": lengthened(arrays) for name, arrays in fixed.items()}


def lengthened(feeds: Feeds) -> Feeds:
    """A batch padded to `FIXED` tokens."""
    return {name: np.pad(array, ((0, 0), (0, FIXED - array.shape[1]))) for name, array in feeds.items()}


def ways_in(folder: Path, threads: int) -> dict[str, Factory]:
    """Every way of running a batch; artifacts and files are left in ``folder``."""
    minilm(folder / "minilm.onnx")
    graph = load(folder / "minilm.onnx")
    canonicalize(graph)
    save(export(graph), folder / "exported.onnx")
    FuseQKV().run(graph, PassContext())
    unpadded = graph.clone()
    RemovePadding().run(unpadded, PassContext())
    found: dict[str, Factory] = {}
    for name, model, precision in (
        ("xopt padded", graph, "fp32"),
        ("xopt", unpadded, "fp32"),
        ("xopt padded bf16", graph, "bf16"),
        ("xopt bf16", unpadded, "bf16"),
    ):
        machine = targets.configured("cpu", threads=threads, precision=precision)
        artifact = folder / name.replace(" ", "-") / "model.so"
        artifact.parent.mkdir()
        found[name] = partial(compiled_runner, targets.compile(model, machine, artifact), threads)
    for name, runner in {"onnxruntime": onnxruntime_runner, "openvino": openvino_runner}.items():
        found[name] = factory = partial(runner, folder / "exported.onnx", threads)
        found |= {f"{name} by {part}": partial(sorted_by_length, factory, part) for part in PARTS}
    return found


def check(outputs: dict[str, Feeds], mask: np.ndarray) -> dict[str, float]:
    """Largest difference of a real token's values to xopt's padded ones; raises where float32 ways disagree."""
    shown = mask != 0
    found = {name: arrays["last_hidden_state"][shown] for name, arrays in outputs.items()}
    worst = {name: float(np.abs(tokens - found["xopt padded"]).max()) for name, tokens in found.items()}
    assert all(value < (0.2 if "bf16" in name else 1e-3) for name, value in worst.items()), worst
    return worst


def fit(tokens: list[int], milliseconds: list[float]) -> dict[str, float]:
    """Least squares ``time = fixed + rate * tokens`` and the share of the variance that it explains."""
    rate, constant = np.polyfit(tokens, milliseconds, 1)
    rest = np.asarray(milliseconds) - (constant + rate * np.asarray(tokens))
    explained = 1 - float((rest**2).sum() / ((np.asarray(milliseconds) - np.mean(milliseconds)) ** 2).sum())
    return {"microseconds_per_token": 1e3 * float(rate), "fixed_ms": float(constant), "r_squared": explained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb/")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/padding.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    record: dict[str, Any] = {"command": "python benchmarks/padding.py", "machine": describe(), "batches": {}}
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_in(Path(folder), options.threads)
        for name, feeds in batches(options.data).items():
            size = {"tokens": int(feeds["attention_mask"].sum()), "padded": int(feeds["attention_mask"].size)}
            with isolated(ways, feeds, options.threads) as found:
                outputs = {way: process.outputs() for way, process in found.contenders.items()}
                measured = in_turns(found.contenders, rounds=options.rounds, seconds=60)
            times = {way: one.median for way, one in measured.items()}
            record["batches"][name] = size | {
                "median_ms": times,
                "largest_difference": check(outputs, feeds["attention_mask"]),
                "samples_ms": {way: list(one.samples_ms) for way, one in measured.items()},
            }
            print(name, size, {way: round(value, 1) for way, value in times.items()}, flush=True)
    record["summary"] = summary(record["batches"])
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Fits and ratios over the batches in file order."""
    fixed = [entry for name, entry in found.items() if name.endswith(f"{FIXED} tokens")]
    all_of = [entry for entry in found.values() if entry not in fixed]
    real = [entry for name, entry in found.items() if name.startswith("file order") and entry not in fixed]
    peers = [way for way in all_of[0]["median_ms"] if not way.startswith("xopt")]
    best = [min(entry["median_ms"][way] for way in peers) for entry in real]
    return {
        "fit": {
            way: fit([entry["tokens"] for entry in all_of], [entry["median_ms"][way] for entry in all_of])
            for way in ("xopt", "xopt bf16", "xopt padded")
        },
        "real tokens": median(entry["tokens"] / entry["padded"] for entry in real),
        "padded over unpadded": geometric_mean(e["median_ms"]["xopt padded"] / e["median_ms"]["xopt"] for e in real),
        "padded over unpadded, bf16": geometric_mean(
            e["median_ms"]["xopt padded bf16"] / e["median_ms"]["xopt bf16"] for e in real
        ),
        f"padded to {FIXED} over unpadded": geometric_mean(
            e["median_ms"]["xopt padded"] / e["median_ms"]["xopt"] for e in fixed
        ),
        f"best peer over unpadded, padded to {FIXED}": geometric_mean(
            min(e["median_ms"][way] for way in peers) / e["median_ms"]["xopt"] for e in fixed
        ),
        "best peer over unpadded": geometric_mean(b / e["median_ms"]["xopt"] for b, e in zip(best, real)),
    }


if __name__ == "__main__":
    main()
