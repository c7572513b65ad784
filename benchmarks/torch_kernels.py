"""The layers of `kernels.py` in torch, for a process of their own; the same random operands as there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xopt.measure.latency import Runner


class Values:
    """A tensor that becomes float32 when somebody looks at it."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._tensor.float().numpy(), dtype)


def linear_operands(m: int, k: int, n: int) -> dict[str, np.ndarray]:
    """Activations, weights, bias and residual."""
    rng = np.random.default_rng(0)
    shapes = {"bias": (n,), "side": (m, n), "a": (m, k), "w": (k, n)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def projection(tokens: int, heads: int, d: int) -> np.ndarray:
    """Q, K and V of attention side by side [1, tokens, 3 * heads * d]."""
    return np.random.default_rng(0).standard_normal((1, tokens, 3 * heads * d)).astype(np.float32)


def norm_operands(rows: int, width: int) -> list[np.ndarray]:
    """Values, scale and bias."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((rows, width), width, width)]


def linear(m: int, k: int, n: int, after: str, precision: str, threads: int) -> Runner:
    """A layer with a bias, and GELU or the sum with a residual after it."""
    import torch

    dtype, operands = getattr(torch, precision), linear_operands(m, k, n)
    operands["w"] = operands["w"].T.copy()
    x, weight, b, r = (torch.from_numpy(operands[name]).to(dtype) for name in ("a", "w", "bias", "side"))

    def run() -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight, b)
        return torch.nn.functional.gelu(y) if after == "gelu" else y + r if after == "residual" else y

    return _runner(run, threads)


def attention(tokens: int, heads: int, d: int, precision: str, causal: bool, threads: int) -> Runner:
    """Heads that are already apart; the result is [heads, tokens, d]."""
    import torch

    split = torch.from_numpy(projection(tokens, heads, d)).to(getattr(torch, precision)).reshape(tokens, 3, heads, d)
    q, k, v = (part.contiguous() for part in split.permute(1, 2, 0, 3)[:, None])
    return _runner(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)[0], threads)


def norm(rows: int, width: int, threads: int) -> Runner:
    """Layer normalization."""
    import torch

    x, scale, bias = map(torch.from_numpy, norm_operands(rows, width))
    return _runner(lambda: torch.nn.functional.layer_norm(x, (width,), scale, bias), threads)


def _runner(run: Callable[[], Any], threads: int) -> Runner:
    import torch

    torch.set_num_threads(threads)

    def call(feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        with torch.inference_mode():
            return {"y": Values(run())}

    return call
