"""Token merging written from the papers' descriptions, one token at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import erf

Array = np.ndarray
Merge = Callable[[Array, Array, Array], tuple[Array, Array]]


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def best(candidates: list[tuple[float, int, int]], count: int) -> list[tuple[int, int]]:
    """The ``count`` best of (score, source, target); the lower source first among equals."""
    ranked = sorted(candidates, key=lambda edge: (-edge[0], edge[1]))
    return [(source, target) for _, source, target in ranked[:count]]


def strongest(scores: Mapping[int, float]) -> tuple[float, int]:
    """Largest score and its key; the lowest key among equals."""
    target = min(scores, key=lambda key: (-scores[key], key))
    return scores[target], target


def tome_edges(metric: Array, r: int, protected: int) -> list[tuple[int, int]]:
    """(source, target) positions for one sample's ``metric [N, m]``."""
    m = unit(metric)
    a, b = range(0, len(m), 2), range(1, len(m), 2)
    candidates = []
    for i in a:
        if i >= protected:
            score, j = strongest({j: float(m[i] @ m[j]) for j in b if j >= protected})
            candidates.append((score, i, j))
    return best(candidates, r)


def mctf_edges(
    x: Array, importance: Array, size: Array, r: int, protected: int, taus: tuple[float, float, float]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Edges A -> B, and then B -> A, for one sample."""
    sim, info, small = taus
    m = unit(x)
    u = (1 / importance[:, 0]) / (1 / importance[:, 0]).max()
    v = (1 / size[:, 0]) / (1 / size[:, 0]).max()

    def attraction(i: int, j: int) -> float:
        closeness = max((float(m[i] @ m[j]) + 1) / 2, 0.0)
        return float(closeness ** (1 / sim) * (u[i] * u[j]) ** (1 / info) * (v[i] * v[j]) ** (1 / small))

    a, b = range(0, len(m), 2), range(1, len(m), 2)
    there = [(*strongest({j: attraction(i, j) for j in b}), i) for i in a if i >= protected]
    forward = best([(score, i, j) for score, j, i in there], r // 2)
    left = [i for i in a if i not in dict(forward)]
    back = [(*strongest({i: attraction(i, j) for i in left}), j) for j in b if j >= protected]
    return forward, best([(score, j, i) for score, i, j in back], r - r // 2)


def apply(
    x: Array, weight: Array, size: Array, steps: list[list[tuple[int, int]]], protected: int
) -> tuple[Array, Array]:
    """Average sources into targets, step after step; protected tokens, the rest of A, then the rest of B."""
    total, weight, size = x * weight, weight.copy(), size.copy()
    gone = set()
    for edges in steps:
        before = total.copy(), weight.copy(), size.copy()
        for source, target in edges:
            for now, then in zip((total, weight, size), before):
                now[target] += then[source]
            gone.add(source)
    kept = [i for i in range(len(x)) if i not in gone]
    order = sorted(kept, key=lambda i: (0, i, 0) if i < protected else (1, i % 2, i))
    return (total / weight)[order], size[order]


def tome(x: Array, metric: Array, size: Array, r: int, protected: int) -> tuple[Array, Array]:
    pairs = [apply(*one, [tome_edges(m, r, protected)], protected) for m, one in zip(metric, zip(x, size, size))]
    return np.stack([y for y, _ in pairs]), np.stack([s for _, s in pairs])


def mctf(
    x: Array, importance: Array, size: Array, r: int, protected: int, taus: tuple[float, float, float] = (1, 20, 40)
) -> tuple[Array, Array]:
    pairs = []
    for one, info, s in zip(x, importance, size):
        steps = list(mctf_edges(one, info, s, r, protected, taus))
        pairs.append(apply(one, info * s, s, steps, protected))
    return np.stack([y for y, _ in pairs]), np.stack([s for _, s in pairs])


def vit(weights: Mapping[str, Array], pixels: Array, heads: int, amounts: list[int], score: str) -> Array:
    """Logits of ``tests.ir.builders.vit`` with ``amounts[i]`` tokens merged in block i."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    patch = w["patch.weight"]
    side = patch.shape[-1]
    grid = pixels.astype(np.float64).reshape(len(pixels), pixels.shape[1], -1, side, pixels.shape[-1] // side, side)
    x = np.einsum("bchpwq,dcpq->bhwd", grid, patch).reshape(len(pixels), -1, len(patch)) + w["patch.bias"]
    protected = int("class_token" in w)
    if protected:
        x = np.concatenate([np.repeat(w["class_token"], len(x), 0), x], axis=1)
    x = x + w["positions"]
    size = np.ones((*x.shape[:2], 1))
    for index, r in enumerate(amounts):
        name = f"layers.{index}"
        if r and score == "mctf":
            _, _, _, attention = _attend(w, name, x, size, heads)
            received = attention.mean(axis=(1, 2))[..., None]
            x, size = mctf(x, received, size, r, protected)
        y, key, _, _ = _attend(w, name, x, size, heads)
        x = x + y
        if r and score == "tome":
            x, size = tome(x, key.mean(axis=1), size, r, protected)
        hidden = _linear(w, f"{name}.ffn.up", _norm(w, f"{name}.norm2", x))
        x = x + _linear(w, f"{name}.ffn.down", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)
    x = _norm(w, "norm", x)
    pooled = x[:, 0] if protected else (x * size).sum(1) / size.sum(1)
    return _linear(w, "head", pooled)


def _attend(w: Mapping[str, Array], name: str, x: Array, size: Array, heads: int) -> tuple[Array, Array, Array, Array]:
    """Output of the attention branch, keys and values [B, H, N, d], and attention [B, H, N, N]."""
    normed = _norm(w, f"{name}.norm1", x)
    q, k, v = (
        _linear(w, f"{name}.attention.{part}", normed).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        for part in "qkv"
    )
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]) + np.log(size)[:, None, :, 0][:, :, None]
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    mixed = (attention @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    return _linear(w, f"{name}.attention.out", mixed), k, v, attention


def _linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _norm(w: Mapping[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
