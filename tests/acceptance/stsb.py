"""STS Benchmark as MiniLM reads it: pairs of sentences, scores, and embeddings of a runner's outputs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def read(shared_data: Path, split: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Sentence pairs and scores 0..5 of a split."""
    with (shared_data / "stsb" / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [(row[0], row[1]) for row in rows], np.array([float(row[2]) for row in rows])


def tokenizer(minilm_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder, local_files_only=True)


def embeddings(run: Run, tokenize: Any, sentences: list[str], batch: int = 32) -> np.ndarray:
    """Mean of the kept tokens' states, normalized: [sentences, 384]; batches of similar length."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    result: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tokens = tokenize([sentences[i] for i in chosen], padding=True, truncation=True, max_length=128)
        ids, mask = (np.array(tokens[name], dtype=np.int64) for name in ("input_ids", "attention_mask"))
        states = run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        result.update(zip(chosen, mean / np.linalg.norm(mean, axis=1, keepdims=True), strict=True))
    return np.stack([result[index] for index in range(len(sentences))])


def spearman(run: Run, tokenize: Any, pairs: list[tuple[str, str]], scores: np.ndarray) -> float:
    """Rank correlation of cosine and score."""
    from scipy.stats import spearmanr

    first, second = (embeddings(run, tokenize, [pair[side] for pair in pairs]) for side in (0, 1))
    return float(spearmanr((first * second).sum(1), scores).statistic)
