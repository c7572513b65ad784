"""Prune MiniLM-L6 without labels and without training: Spearman on STS Benchmark, MACs and latency at each budget.

    python benchmarks/minilm_pruning.py --data ../shared/data --output docs/benchmarks/minilm_pruning.json

Curves: the scores fisher, optin and magnitude, with and without compensation, with the budget shared out over all
layers or the same in each; at the multiply-accumulates that are left by keeping 90, 75, 60 and 50 % of the heads and
neurons of each layer. Calibrated on 400 unlabelled sentences of the training split. The models of the first curve are
compiled by xopt and exported for onnxruntime, and stay in a folder; ``--time`` times them in turns, on one sentence of
32 tokens, and needs a quiet machine. The file gets every sample of the timing; a run that was interrupted goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from models import minilm, minilm_folder
from scipy.stats import spearmanr
from transformers import AutoTokenizer

import xopt.ir
from xopt import targets
from xopt.data.dataset import Dataset
from xopt.ir.cost import cost
from xopt.measure.latency import Runner, interleaved, pinned
from xopt.measure.machine import describe
from xopt.measure.peers import onnxruntime_runner
from xopt.passes import PruneHeads
from xopt.pipeline.context import PassContext
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session

#: Share of heads and neurons that a plain uniform cut keeps in each layer, and the share of their multiply-accumulates
#: that this is at 128 tokens, rounded down (11, 9, 7, 6 heads; 1382, 1152, 922, 768 neurons): the budget.
BUDGETS = {0.9: 0.9059, 0.75: 0.75, 0.6: 0.594, 0.5: 0.5}
SENTENCES = 400
LENGTH = 32
MAX_LENGTH = 128
#: What a uniform cut of a second-order score with ridge compensation had, and magnitude without; test split.
BASELINE = {0.9: 0.8252, 0.75: 0.8178, 0.6: 0.8037, 0.5: 0.7790}
MAGNITUDE_BASELINE = {0.9: 0.8071, 0.75: 0.7751, 0.6: 0.7494, 0.5: 0.7387}


@dataclass(frozen=True)
class Split:
    """Sentence pairs of a split as token ids, and their scores."""

    first: list[list[int]]
    second: list[list[int]]
    scores: np.ndarray

    @classmethod
    def read(cls, data: Path, name: str, tokenizer: Any) -> Split:
        with (data / "stsb" / f"stsb-en-{name}.csv").open(encoding="utf8", newline="") as file:
            rows = list(csv.reader(file))
        first, second = ([_ids(tokenizer, row[side]) for row in rows] for side in (0, 1))
        return cls(first, second, np.array([float(row[2]) for row in rows]))


def _ids(tokenizer: Any, sentence: str) -> list[int]:
    ids: list[int] = tokenizer(sentence, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return ids


def padded(sentences: list[list[int]]) -> dict[str, np.ndarray]:
    """Feeds of a batch: ids and mask int64 [batch, longest]."""
    ids = np.zeros((len(sentences), max(map(len, sentences))), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(sentences):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def calibration(split: Split, seed: int, count: int) -> Dataset:
    """Unlabelled sentences, drawn at random."""
    sentences = split.first + split.second
    chosen = np.random.default_rng(seed).permutation(len(sentences))[:count]
    return Dataset(padded([sentences[index] for index in chosen]), name=f"{count} sentences of STS-B train")


def spearman(run: Runner, split: Split) -> float:
    """Rank correlation of the cosine of mean-pooled embeddings with the scores."""
    sentences = split.first + split.second
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    found = np.zeros((len(sentences), 384), np.float32)
    for start in range(0, len(order), 64):
        index = order[start : start + 64]
        feeds = padded([sentences[i] for i in index])
        mask = feeds["attention_mask"][..., None]
        mean = (run(feeds)["last_hidden_state"] * mask).sum(axis=1) / mask.sum(axis=1)
        found[index] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    cosine = (found[: len(split.scores)] * found[len(split.scores) :]).sum(axis=1)
    return float(spearmanr(cosine, split.scores).statistic)


def variants() -> dict[str, PruneHeads]:
    """Every point of every curve, by name: the pass as it is by default, the other scores, the plainer allocations."""
    found = {}
    scores = ("fisher", "magnitude", "optin")
    for uniform, score, compensate in itertools.product((False, True), scores, (True, False)):
        words = [score, "compensated" if compensate else "plain", "uniform" if uniform else "global"]
        for share, keep in BUDGETS.items():
            found[f"{' '.join(words)} {share:g}"] = PruneHeads(
                keep=keep, ffn=True, score=score, compensate=compensate, uniform=uniform
            )
    for compensate, (share, keep) in itertools.product((True, False), BUDGETS.items()):
        words = ["fisher", "compensated" if compensate else "plain", "global rearranged"]
        found[f"{' '.join(words)} {share:g}"] = PruneHeads(keep=keep, ffn=True, compensate=compensate, rearrange=True)
    return found


def is_default(name: str) -> bool:
    """Whether a point is of the first curve, whose models are timed."""
    return name.rpartition(" ")[0] == "fisher compensated global"


def measure_quality(model: ir.Model, splits: Mapping[str, Split], threads: int) -> dict[str, float]:
    session = ReferenceSession(model, threads)
    return {name: spearman(session.run, split) for name, split in splits.items()}


def keep_compiled(model: ir.Model, folder: Path, target: str) -> None:
    """Put a model into a folder as onnxruntime and as xopt run it."""
    folder.mkdir(parents=True, exist_ok=True)
    xopt.ir.save(xopt.ir.export(model), folder / "model.onnx")
    targets.compile(model, targets.get(target), folder / "model.so")


def measure_latency(folder: Path, names: Sequence[str], threads: int) -> dict[str, dict[str, list[float]]]:
    """Samples in milliseconds by model and runtime, all in turns."""
    feeds = {name: np.ones((1, LENGTH), np.int64) for name in ("input_ids", "attention_mask")}
    runners: dict[str, Runner] = {}
    for name in names:
        runners[f"{name}/onnxruntime"] = onnxruntime_runner(folder / name / "model.onnx", threads)
        runners[f"{name}/xopt"] = Session.load(folder / name / "model.so", threads=threads).run
    with pinned(threads):
        times = interleaved(runners, feeds, rounds=40, seconds=60.0)
    found: dict[str, dict[str, list[float]]] = {}
    for key, latency in times.items():
        name, _, runtime = key.rpartition("/")
        found.setdefault(name, {})[runtime] = list(latency.samples_ms)
    return found


def table(results: Mapping[str, Any]) -> str:
    """The curves as text: one line per kind of pruning, Spearman on test at each budget."""
    lines = [f"{'unpruned':38} {results['unpruned']['spearman']['test']:.4f}"]
    lines += [f"{'':38} " + "  ".join(f"{keep:>6.0%}" for keep in BUDGETS)]
    for name, figures in (("baseline: uniform, ridge", BASELINE), ("baseline: magnitude", MAGNITUDE_BASELINE)):
        lines.append(f"{name:38} " + "  ".join(f"{figures[keep]:.4f}" for keep in BUDGETS))
    for kind in dict.fromkeys(name.rpartition(" ")[0] for name in results["pruned"]):
        found = [results["pruned"].get(f"{kind} {keep:g}") for keep in BUDGETS]
        lines.append(f"{kind:38} " + "  ".join(f"{one['spearman']['test']:.4f}" if one else "     -" for one in found))
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with stsb/")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/minilm_pruning.json"))
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration sentences")
    parser.add_argument("--sentences", type=int, default=SENTENCES, help="to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("build/minilm_pruning"), help="where compiled models stay")
    parser.add_argument("--time", action="store_true", help="only time the models that an earlier run has left")
    arguments = parser.parse_args()

    results = _resume(arguments.output, arguments.seed, arguments.sentences)
    if arguments.time:
        names = ["unpruned", *filter(is_default, variants())]
        results["latency_ms"] = measure_latency(arguments.models, names, arguments.threads)
        results["latency_setting"] = {
            "batch": 1,
            "tokens": LENGTH,
            "threads": arguments.threads,
            "load": round(os.getloadavg()[0], 2),
        }
        _write(arguments.output, results)
    else:
        chosen = {name: one for name, one in variants().items() if arguments.only in name}
        _prune(chosen, results, arguments)
    print(table(results))
    for name, runtimes in results.get("latency_ms", {}).items():
        medians = "  ".join(f"{runtime} {np.median(ms):.3f} ms" for runtime, ms in runtimes.items())
        print(f"{name:38} {medians}")


def _prune(chosen: Mapping[str, PruneHeads], results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Fill in the points that are missing; every point is on disk once it is known."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    splits = {name: Split.read(arguments.data, name, tokenizer) for name in ("train", "dev", "test")}
    samples = calibration(splits.pop("train"), arguments.seed, arguments.sentences)
    arguments.models.mkdir(parents=True, exist_ok=True)
    minilm(arguments.models / "minilm.onnx")
    original = xopt.ir.load(arguments.models / "minilm.onnx")
    xopt.ir.canonicalize(original)
    if "unpruned" not in results:
        quality = measure_quality(original, splits, arguments.threads)
        results["unpruned"] = {"macs": cost(original, {}).macs, "spearman": quality}
    if not Path(arguments.models, "unpruned", "model.so").exists():
        keep_compiled(original, arguments.models / "unpruned", "cpu")
    for name, one in chosen.items():
        place = arguments.models / name
        timed = is_default(name) and not (place / "model.so").exists()
        if name in results["pruned"] and not timed:
            continue
        model = original.clone()
        start = time.perf_counter()
        report = one.run(model, PassContext(calibration=samples))
        results["pruned"][name] = {
            "options": one.values(),
            **report.numbers,
            "seconds": round(time.perf_counter() - start, 1),
            "spearman": measure_quality(model, splits, arguments.threads),
        }
        print(f"{name}: {results['pruned'][name]['spearman']}", file=sys.stderr, flush=True)
        _write(arguments.output, results)
        if timed:
            keep_compiled(model, place, "cpu")


def _resume(path: Path, seed: int, sentences: int) -> dict[str, Any]:
    """What an interrupted run with the same sentences has found, or a new record."""
    record: dict[str, Any] = {
        "command": "python benchmarks/minilm_pruning.py",
        "machine": dict(describe()),
        "calibration": {"sentences": sentences, "seed": seed, "split": "train"},
        "baseline": {"uniform ridge": BASELINE, "magnitude": MAGNITUDE_BASELINE},
        "pruned": {},
    }
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["calibration"] == record["calibration"]:
            kept = ("unpruned", "pruned", "latency_ms", "latency_setting")
            record |= {key: earlier[key] for key in kept if key in earlier}
    return record


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    _main()
