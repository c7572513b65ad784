"""Quality of a model's outputs as one number.

=============  =======================================================================  ==================
name           what it is                                                               needs
=============  =======================================================================  ==================
``top-1``      share of samples whose largest logit [N, C] is the label [N]             labels
``spearman``   rank correlation of the cosine of the samples 2i and 2i + 1 with         one label a pair
               label i; a sample's embedding is the output [N, H], or an output
               [N, S, H] averaged over the tokens that ``attention_mask`` keeps
``perplexity`` exp of the mean negative log-likelihood of the next token, logits        ``input_ids`` or
               [N, S, V]; labels (or input ids) [N, S], -100 and masked ones left out   labels
``agreement``  share of samples (or tokens) with the same largest logit as the original the original
``cosine``     mean over samples of the cosine with the original's output, of the       the original
               output where that is smallest
=============  =======================================================================  ==================

Higher is better for all but perplexity. ``drop`` says how much was lost: the difference of the numbers; for
perplexity the difference of the logarithms, which for a small loss is the relative rise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xopt.data.dataset import FAILURES, Dataset, resolve
from xopt.errors import InputError

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """What one run of a model took and gave.

    Attributes:
        inputs: arrays [n, ...] that were fed.
        outputs: what the model computed.
        labels: [n, ...] or, for groups of samples, fewer; None without labels.
        original: what the original model computes for the same inputs; None unless the metric compares.
    """

    inputs: Outputs
    outputs: Outputs
    labels: np.ndarray | None = None
    original: Outputs | None = None


class Metric(ABC):
    """A number for the quality of outputs."""

    name: str
    compares: ClassVar[bool] = False
    """It needs the outputs of the original model as well."""
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def score(self, batches: Iterable[Batch]) -> float:
        """The number over all batches; InputError E-DATA where the outputs do not suit the metric."""

    def drop(self, original: float, now: float) -> float:
        """How much of the original's quality is lost; negative when it is better now."""
        return original - now


class Top1(Metric):
    """Share of samples whose largest logit is at the label."""

    name = "top-1"

    def score(self, batches: Iterable[Batch]) -> float:
        return float(np.concatenate([_hits(b, self.name) for b in batches]).mean())


class Agreement(Metric):
    """Share of samples (or tokens) where the largest logit is the one of the original."""

    name = "agreement"
    compares = True

    def score(self, batches: Iterable[Batch]) -> float:
        return float(np.concatenate([_agreeing(b) for b in batches]).mean())


class Cosine(Metric):
    """Mean cosine with the outputs of the original, the smallest over the outputs."""

    name = "cosine"
    compares = True

    def score(self, batches: Iterable[Batch]) -> float:
        cosines: dict[str, list[np.ndarray]] = {}
        for batch in batches:
            for name, original in _original(batch).items():
                if original.dtype.kind == "f" and original.size:
                    cosines.setdefault(name, []).append(_row_cosines(original, batch.outputs[name]))
        if not cosines:
            raise InputError("E-DATA", "no output has floating-point numbers", where="metric cosine")
        return float(min(np.concatenate(rows).mean() for rows in cosines.values()))


class Spearman(Metric):
    """Rank correlation between the cosine of two embeddings and the label of the pair."""

    name = "spearman"

    def score(self, batches: Iterable[Batch]) -> float:
        from scipy.stats import spearmanr

        cosines, labels = [], []
        for batch in batches:
            vectors = _embeddings(batch)
            given = np.ravel(_labels(batch, self.name))
            if len(vectors) != 2 * len(given):
                what = f"spearman needs one label for two samples, got {len(given)} for {len(vectors)}"
                raise InputError("E-DATA", what, where="array 'labels'")
            cosines.append(_row_cosines(vectors[0::2], vectors[1::2]))
            labels.append(given)
        return float(spearmanr(np.concatenate(cosines), np.concatenate(labels)).statistic)


class Perplexity(Metric):
    """Exponential of the mean negative log-likelihood (nats) of each next token."""

    name = "perplexity"
    higher_is_better = False

    def score(self, batches: Iterable[Batch]) -> float:
        total, count = 0.0, 0
        for batch in batches:
            nats, kept = _next_token_nats(batch)
            total += float(nats[kept].sum())
            count += int(kept.sum())
        if count == 0:
            raise InputError("E-DATA", "no token is left to predict", where="metric perplexity")
        try:
            return math.exp(total / count)
        except OverflowError:  # beyond 700 nats a token
            return math.inf

    def drop(self, original: float, now: float) -> float:
        return math.log(now) - math.log(original)


class Custom(Metric):
    """The caller's ``function(outputs, labels) -> float`` on all samples at once; higher is better."""

    def __init__(self, reference: str | Callable[[dict[str, np.ndarray], np.ndarray | None], float]) -> None:
        self.function = resolve(reference, "--metric") if isinstance(reference, str) else reference
        self.name = reference if isinstance(reference, str) else getattr(reference, "__name__", "metric")

    def score(self, batches: Iterable[Batch]) -> float:
        kept = list(batches)
        labels = [b.labels for b in kept if b.labels is not None]
        try:
            outputs = {n: np.concatenate([np.atleast_1d(b.outputs[n]) for b in kept]) for n in kept[0].outputs}
            return float(self.function(outputs, np.concatenate(labels) if labels else None))
        except FAILURES as error:
            raise InputError(
                "E-DATA", f"the metric fails ({type(error).__name__}: {error})", where=self.name
            ) from error


METRICS: dict[str, type[Metric]] = {cls.name: cls for cls in (Top1, Spearman, Perplexity, Agreement, Cosine)}


def get(name: str | Metric | Callable[..., float]) -> Metric:
    """The metric of this name, or the caller's function (``module:function``); InputError E-OPTION."""
    if isinstance(name, Metric):
        return name
    if callable(name) or (isinstance(name, str) and ":" in name):
        return Custom(name)
    if not isinstance(name, str) or name not in METRICS:
        cure = f"known are {', '.join(METRICS)}, or give module:function"
        raise InputError("E-OPTION", f"unknown metric {name!r}", where="--metric", cure=cure)
    return METRICS[name]()


def default_for(data: Dataset) -> Metric:
    """The metric that the labels suggest: classes, pairs with a grade, next tokens; without labels ``cosine``."""
    if data.labels is None:
        return Cosine()
    if data.group == 2:
        return Spearman()
    if data.labels.dtype.kind in "iu" and data.group == 1:
        return Perplexity() if data.labels.ndim == 2 and data.labels.shape[1] > 1 else Top1()
    cure = "name one with --metric"
    raise InputError("E-OPTION", "no built-in metric suits these labels", where=data.name, cure=cure)


def _labels(batch: Batch, metric: str) -> np.ndarray:
    if batch.labels is None:
        raise InputError("E-DATA", "the data have no labels", where=f"metric {metric}", cure="add an array 'labels'")
    return batch.labels


def _original(batch: Batch) -> Outputs:
    assert batch.original is not None, "the metric compares, so the original was run"
    return batch.original


def _floats(outputs: Outputs, rank: int) -> np.ndarray:
    """The first floating-point output of this rank."""
    for array in outputs.values():
        if array.ndim == rank and array.dtype.kind == "f":
            return array
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
    raise InputError("E-DATA", f"the metric needs an output of rank {rank}, the model has {shapes}", where="--metric")


def _has(outputs: Outputs, rank: int) -> bool:
    return any(array.ndim == rank and array.dtype.kind == "f" for array in outputs.values())


def _agreeing(batch: Batch) -> np.ndarray:
    rank = 2 if _has(batch.outputs, 2) else 3
    now, original = (_floats(outputs, rank).argmax(-1).ravel() for outputs in (batch.outputs, _original(batch)))
    if now.shape != original.shape:
        raise InputError(
            "E-DATA", f"{now.size} predictions, the original has {original.size}", where="metric agreement"
        )
    same: np.ndarray = now == original
    return same


def _hits(batch: Batch, metric: str) -> np.ndarray:
    """For each sample whether its largest logit is at the label."""
    chosen, labels = _floats(batch.outputs, 2).argmax(-1), np.ravel(_labels(batch, metric))
    if chosen.shape != labels.shape:
        what = f"{metric} needs one label for a sample, got {labels.size} for {chosen.size}"
        raise InputError("E-DATA", what, where="array 'labels'")
    hits: np.ndarray = chosen == labels
    return hits


def _row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with the same row of b, both [n, ...] or numbers, in float64; 0 where a row is zero."""
    if a.shape != b.shape:
        raise InputError("E-DATA", f"outputs of shape {list(b.shape)}, the original's are {list(a.shape)}")
    x, y = (np.atleast_1d(m).astype(np.float64) for m in (a, b))
    x, y = (m.reshape(len(m), -1) for m in (x, y))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    equal = (x == y).all(axis=1)
    cosines = np.divide((x * y).sum(1), norms, out=np.zeros(len(x)), where=norms > 0)
    return np.where(equal, 1.0, cosines)


def _embeddings(batch: Batch) -> np.ndarray:
    """One vector a sample: tokens averaged where the mask keeps them, else the first output of rank 2."""
    if not _has(batch.outputs, 3):
        return _floats(batch.outputs, 2)
    tokens = _floats(batch.outputs, 3)
    mask = batch.inputs.get("attention_mask")
    weight = np.ones(tokens.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    if weight.shape != tokens.shape[:2]:
        what = f"attention_mask {list(weight.shape)} does not fit an output {list(tokens.shape)}"
        raise InputError("E-DATA", what, where="metric spearman")
    summed: np.ndarray = (tokens * weight[..., None]).sum(1)
    mean: np.ndarray = summed / np.maximum(weight.sum(1, keepdims=True), 1)
    return mean


def _next_token_nats(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood [n, S - 1] of the tokens from the second on, and which of them count."""
    logits = _floats(batch.outputs, 3)
    tokens = batch.labels if batch.labels is not None else batch.inputs.get("input_ids")
    if tokens is None:
        raise InputError("E-DATA", "perplexity needs labels or an input named 'input_ids'", where="metric perplexity")
    if tokens.shape != logits.shape[:2] or tokens.dtype.kind not in "iu":
        what = f"{tokens.dtype}{list(tokens.shape)} are no labels of tokens for an output {list(logits.shape)}"
        raise InputError("E-DATA", what, where="metric perplexity", cure="give integers [samples, tokens]")
    logits, wanted = logits[:, :-1].astype(np.float64), tokens[:, 1:]
    kept = wanted != -100
    mask = batch.inputs.get("attention_mask")
    if mask is not None and mask.shape == tokens.shape:
        kept = kept & mask[:, 1:].astype(bool)
    if (kept & ((wanted < 0) | (wanted >= logits.shape[-1]))).any():
        what = (
            f"labels are from {wanted[kept].min()} to {wanted[kept].max()}, the model knows {logits.shape[-1]} tokens"
        )
        raise InputError("E-DATA", what, where="metric perplexity", cure="mark what is left out with -100")
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, np.where(kept, wanted, 0)[..., None].astype(np.int64), -1)[..., 0]
    nats: np.ndarray = log_sum - chosen
    return nats, kept
