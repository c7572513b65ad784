"""Attention and rotary position embedding, as ONNX opset 24 defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _heads(x: Tensor, count: int | None) -> Tensor:
    """[B, S, H*d] -> [B, H, S, d]; 4-D stays."""
    if x.ndim == 4:
        return x
    assert count  # ONNX asks for it with 3-D operands
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _allowed(
    scores: Tensor, offset: Tensor | int, is_causal: int, windows: tuple[int, int], filled: Tensor | None
) -> Tensor | None:
    """Boolean mask of the pairs that may attend by their positions, or None when all may; ``offset``: of query 0."""
    left, right = windows[0], 0 if is_causal else windows[1]
    if left < 0 and right < 0 and filled is None:
        return None
    rows, columns = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
    ahead = columns - (rows[:, None] + (offset if isinstance(offset, int) else offset[:, None, None, None]))
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (-ahead <= left)
    if right >= 0:
        allowed = allowed & (ahead <= right)
    return allowed if filled is None else allowed & (columns < filled[:, None, None, None])


def _as_long_as(keys: int, mask: Tensor) -> Tensor:
    """A mask that hides the keys beyond its end."""
    hidden = False if mask.dtype == torch.bool else float("-inf")
    return torch.nn.functional.pad(mask, (0, keys - mask.shape[-1]), value=hidden)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    qk_matmul_output_mode: int = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int = 1,
) -> Any:
    """``softmax(cap(q @ k' * scale) + mask) @ v`` per head; key and value heads are shared by groups of query heads.

    Operands are 3-D [B, S, H*d] or 4-D [B, H, S, d]; so is the result. Rows that masks exclude altogether give zeros.
    Causal masks and windows count queries behind the past keys, or as the last of the ``nonpad_kv_seqlen``.
    """
    flat = q.ndim == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    offset: Tensor | int = 0 if nonpad_kv_seqlen is None else nonpad_kv_seqlen - q.shape[2]
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    batch, heads, rows, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, rows, width)
    scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, rows, -1)
    stages = [scores * (width**-0.5 if scale is None else scale)]
    stages.append(softcap * torch.tanh(stages[0] / softcap) if softcap else stages[0])
    scores = stages[1]
    allowed = _allowed(scores, offset, is_causal, (left_window_size, right_window_size), nonpad_kv_seqlen)
    if attn_mask is not None:
        mask = _as_long_as(scores.shape[-1], attn_mask)
        shown = mask if mask.dtype == torch.bool else ~torch.isneginf(mask)
        scores = scores if mask.dtype == torch.bool else scores + mask
        allowed = shown if allowed is None else allowed & shown
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
        # A finite stand-in keeps softmax and its gradient free of NaN in rows that nothing may attend to.
        empty = ~allowed.any(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    else:
        weights = torch.softmax(scores, -1)
    mixed = weights.reshape(batch, k.shape[1], -1, *weights.shape[2:]) @ v.unsqueeze(2)
    y = mixed.reshape(batch, heads, rows, -1)
    y = y.transpose(1, 2).reshape(batch, rows, -1) if flat else y
    return y if outputs == 1 else (y, k, v, [*stages, scores, weights][qk_matmul_output_mode])[:outputs]


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotate pairs of features by position; x is [B, S, H*d] (``num_heads``) or [B, H, S, d].

    The caches are [positions, r/2] with ``position_ids`` [B, S], or [B, S, r/2] without; r is
    ``rotary_embedding_dim``, or d when that is 0. The features after the first r stay.
    """
    flat = x.ndim == 3
    heads = x.reshape(x.shape[0], x.shape[1], num_heads, -1) if flat else x.transpose(1, 2)
    extent = rotary_embedding_dim or heads.shape[-1]
    turned, rest = heads[..., :extent], heads[..., extent:]
    cos, sin = (c if position_ids is None else c[position_ids] for c in (cos_cache, sin_cache))
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = torch.cat([turned, rest], -1)
    return y.reshape(x.shape) if flat else y.transpose(1, 2)


TABLE: dict[str, Callable[..., Any]] = {"Attention": attention, "RotaryEmbedding": rotary_embedding}
