"""Attention as people write it by hand in torch: ways to cut heads, to score, to mask, to weigh, and to join again.

Everything is over q, k, v [batch, heads, length, DEPTH]; keys and values may have fewer heads. ``WHOLE`` are forms that
do not come apart like this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH = 16, 4, 4
SCALE = DEPTH**-0.5
LONGEST = 32


class Block(nn.Module):
    """``x + out(attention(norm(x)))`` for x [batch, seq, WIDTH] and a padding mask int64 [batch, seq] of 0 and 1."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        torch.manual_seed(0)
        kv = spelling.kv_heads * DEPTH
        self.spelling = spelling
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(HEADS * DEPTH, WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, HEADS * DEPTH), nn.Linear(WIDTH, kv), nn.Linear(WIDTH, kv)
        self.qkv, self.kv = nn.Linear(WIDTH, 3 * HEADS * DEPTH), nn.Linear(WIDTH, 2 * HEADS * DEPTH)
        self.q_norm, self.k_norm = nn.LayerNorm(DEPTH), nn.LayerNorm(DEPTH)
        self.relative = nn.Embedding(2 * LONGEST, HEADS)
        self.register_buffer("lower", torch.tril(torch.ones(LONGEST, LONGEST)))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(HEADS, 1, 1))
        for table in (self.q.weight, self.k.weight, self.qkv.weight, self.kv.weight):
            nn.init.normal_(table, std=0.5)  # weights that are far from uniform

    def forward(self, x: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = self.spelling.attend(self, self.norm(x), mask)
        rest = mask.sum() * 0.0  # a mask that is not used stays an input
        return (x + self.out(found[0]) + rest, found[1]) if isinstance(found, tuple) else x + self.out(found) + rest


Attend = Callable[[Block, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Spelling:
    """How an attention is written, and what is to be found of it."""

    attend: Attend
    kv_heads: int = HEADS
    named: tuple[str, ...] = ()
    """Reasons of what is in no block."""
    count: int = 1


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, S, heads * d] as [B, heads, S, d]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join(y: Tensor) -> Tensor:
    """[B, H, S, d] as [B, S, H * d]."""
    return y.transpose(1, 2).reshape(y.shape[0], -1, HEADS * DEPTH)


Three = tuple[Tensor, Tensor, Tensor]


def plain(block: Block, x: Tensor) -> Three:
    return split(block.q(x)), split(block.k(x)), split(block.v(x))


def _of_halves(block: Block, x: Tensor) -> Three:
    k, v = block.kv(x).chunk(2, -1)
    return split(block.q(x)), split(k), split(v)


def _of_stacked(block: Block, x: Tensor) -> Three:
    k, v = block.kv(x).reshape(x.shape[0], -1, 2, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
    return split(block.q(x)), k, v


def _five(block: Block, x: Tensor) -> Tensor:
    return block.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, DEPTH)


def _by_heads(block: Block, x: Tensor, *sizes: int) -> Tensor:
    return block.qkv(x).view(x.shape[0], x.shape[1], HEADS, *sizes)


def _of_batches(block: Block, x: Tensor) -> Three:
    apart = block.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, DEPTH).permute(2, 3, 0, 1, 4)
    q, k, v = (one.transpose(0, 1) for one in apart)
    return q, k, v


def _by_weights_of_heads(block: Block, x: Tensor) -> Three:
    q, k, v = (layer.weight.view(HEADS, DEPTH, WIDTH) for layer in (block.q, block.k, block.v))
    return (
        torch.einsum("bse,hde->bhsd", x, q),
        torch.einsum("bse,hde->bhsd", x, k),
        torch.einsum("bse,hde->bhsd", x, v),
    )


PROJECTIONS: dict[str, Callable[[Block, Tensor], Three]] = {
    "plain": plain,
    "chunk": lambda b, x: tuple(split(part) for part in b.qkv(x).chunk(3, -1)),
    "split": lambda b, x: tuple(split(part) for part in b.qkv(x).split(HEADS * DEPTH, -1)),
    "slices": lambda b, x: tuple(split(b.qkv(x)[..., i * 16 : (i + 1) * 16]) for i in range(3)),
    "unbind": lambda b, x: tuple(part.transpose(1, 2) for part in _five(b, x).unbind(2)),
    "permute": lambda b, x: tuple(_five(b, x).permute(2, 0, 3, 1, 4)[i] for i in range(3)),
    "permute_unbind": lambda b, x: _five(b, x).permute(2, 0, 3, 1, 4).unbind(0),
    "heads_first": _of_batches,
    "turned": lambda b, x: tuple(_five(b, x).transpose(1, 3)[:, :, i] for i in range(3)),
    "chunk_of_heads": lambda b, x: tuple(part.transpose(1, 2) for part in _by_heads(b, x, 3 * DEPTH).chunk(3, -1)),
    "interleaved": lambda b, x: tuple(_by_heads(b, x, DEPTH, 3)[..., i].transpose(1, 2) for i in range(3)),
    "halves": _of_halves,
    "stacked": _of_stacked,
    "weights_of_heads": _by_weights_of_heads,
    "normed": lambda b, x: (b.q_norm(split(b.q(x))), b.k_norm(split(b.k(x))), split(b.v(x))),
    "root_mean_square": lambda b, x: (_rms(split(b.q(x))), _rms(split(b.k(x))), split(b.v(x))),
}
"""How queries, keys and values are cut out of projections."""


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _flat_scores(q: Tensor, k: Tensor) -> Tensor:
    queries, keys = (x.reshape(-1, x.shape[2], DEPTH) for x in (q, k))
    scores = torch.baddbmm(
        torch.zeros(queries.shape[0], queries.shape[1], keys.shape[1]),
        queries,
        keys.transpose(1, 2),
        beta=0,
        alpha=SCALE,
    )
    return scores.view(q.shape[0], HEADS, q.shape[2], k.shape[2])


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "after": lambda q, k: q @ k.transpose(-1, -2) * SCALE,
    "before": lambda q, k: (q * SCALE) @ k.transpose(-1, -2),
    "both_sides": lambda q, k: (q / math.sqrt(math.sqrt(DEPTH))) @ (k / math.sqrt(math.sqrt(DEPTH))).transpose(-1, -2),
    "root_of_a_tensor": lambda q, k: q @ k.transpose(-1, -2) / torch.sqrt(torch.tensor(float(q.shape[-1]))),
    "root_of_a_size": lambda q, k: q @ k.transpose(-1, -2) / math.sqrt(k.size(-1)),
    "turned": lambda q, k: (k @ q.transpose(-1, -2) * SCALE).transpose(-1, -2),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE,
    "baddbmm": _flat_scores,
}
"""Products of queries and keys, and where they are scaled."""

LOWEST = torch.finfo(torch.float32).min


def _keys(mask: Tensor) -> Tensor:
    return mask[:, None, None, :]


def _later(block: Block, scores: Tensor) -> Tensor:
    return block.lower[: scores.shape[-2], : scores.shape[-1]] == 0


def _apart(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1])[None] - torch.arange(scores.shape[-2])[:, None]


MASKS: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "none": lambda b, s, m: s,
    "filled": lambda b, s, m: s.masked_fill(_keys(m) == 0, -1e9),
    "filled_with_infinity": lambda b, s, m: s.masked_fill(_keys(m) == 0, -math.inf),
    "filled_with_the_lowest": lambda b, s, m: s.masked_fill(~_keys(m).bool(), LOWEST),
    "chosen": lambda b, s, m: torch.where(_keys(m) > 0, s, torch.tensor(-1e9)),
    "chosen_from_a_full_tensor": lambda b, s, m: torch.where(_keys(m) > 0, s, torch.full_like(s, -1e9)),
    "chosen_from_many_ones": lambda b, s, m: torch.where(_keys(m) > 0, s, -9e15 * torch.ones_like(s)),
    "raised_to_the_lowest": lambda b, s, m: torch.max(s + (1 - _keys(m).float()) * LOWEST, torch.tensor(LOWEST)),
    "clamped": lambda b, s, m: (s + torch.where(_later(b, s) | (_keys(m) == 0), -math.inf, 0.0)).clamp(min=LOWEST),
    "added": lambda b, s, m: s + (1 - _keys(m).float()) * -1e4,
    "subtracted": lambda b, s, m: s - (1 - _keys(m).float()) * 1e4,
    "logarithm": lambda b, s, m: s + (_keys(m).float() + 1e-9).log(),
    "of_flat_heads": lambda b, s, m: (
        s.reshape(-1, *s.shape[2:]).masked_fill(m.repeat_interleave(HEADS, 0)[:, None] == 0, -1e9).view(s.shape)
    ),
    "repeated": lambda b, s, m: s.masked_fill(_keys(m).repeat(1, HEADS, s.shape[2], 1) == 0, -1e9),
    "of_pairs": lambda b, s, m: s.masked_fill(m[:, None, :, None] * _keys(m) == 0, -1e9),
    "causal": lambda b, s, m: s.masked_fill(_later(b, s), -math.inf),
    "causal_added": lambda b, s, m: s + torch.triu(torch.full(s.shape[-2:], -math.inf), 1),
    "causal_and_padding": lambda b, s, m: s.masked_fill(_later(b, s) | (_keys(m) == 0), -1e9),
    "causal_then_padding": lambda b, s, m: s.masked_fill(_later(b, s), -1e9).masked_fill(_keys(m) == 0, -1e9),
    "window": lambda b, s, m: s.masked_fill(_apart(s).abs() > 3, -1e9),
    "slopes": lambda b, s, m: s - _apart(s).abs() * b.slopes,
    "relative": lambda b, s, m: s + b.relative(_apart(s).clamp(-9, 9) + 9).permute(2, 0, 1),
    "capped": lambda b, s, m: (torch.tanh(s / 5) * 5).masked_fill(_keys(m) == 0, -1e9),
}
"""What is done to scores before the softmax."""


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.softmax(-1),
    "of_stable_numbers": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "of_exponentials": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "of_stable_exponentials": lambda s: _normalized((s - s.max(-1, keepdim=True)[0]).exp()),
    "of_logarithms": lambda s: F.log_softmax(s, -1).exp(),
    "without_nan": lambda s: torch.nan_to_num(s.softmax(-1)),
    "in_float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).type_as(s),
    "dropout": lambda s: F.dropout(F.softmax(s, dim=3), 0.1, False),
    "over_turned_scores": lambda s: s.transpose(-1, -2).softmax(-2).transpose(-1, -2),
}
"""How weights are made of scores."""

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, v: join(w @ v),
    "turned": lambda w, v: join((v.transpose(-1, -2) @ w.transpose(-1, -2)).transpose(-1, -2)),
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bqhd", w, v).reshape(w.shape[0], -1, HEADS * DEPTH),
    "bmm": lambda w, v: join(
        torch.bmm(w.flatten(0, 1), v.reshape(-1, v.shape[2], DEPTH)).view(w.shape[0], HEADS, -1, DEPTH)
    ),
}
"""How values are weighed and heads joined."""


def spelled(
    projection: str = "plain", scores: str = "after", mask: str = "none", softmax: str = "softmax", y: str = "matmul"
) -> Spelling:
    """The attention that is put together from these parts."""

    def attend(block: Block, x: Tensor, given: Tensor) -> Tensor:
        q, k, v = PROJECTIONS[projection](block, x)
        return PRODUCTS[y](SOFTMAXES[softmax](MASKS[mask](block, SCORES[scores](q, k), given)), v)

    return Spelling(attend)


WHOLE: dict[str, Spelling] = {}
"""Forms that do not come apart."""


def _whole(kv_heads: int = HEADS, named: tuple[str, ...] = (), count: int = 1) -> Callable[[Attend], Attend]:
    def add(attend: Attend) -> Attend:
        WHOLE[attend.__name__] = Spelling(attend, kv_heads, named, count)
        return attend

    return add


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v


@_whole(1)
def one_head_of_keys(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    return join(_attend(split(block.q(x)), block.k(x).unsqueeze(1), block.v(x).unsqueeze(1)))


@_whole(1)
def one_head_expanded(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    k, v = (one(x)[:, None].expand(-1, HEADS, -1, -1) for one in (block.k, block.v))
    return join(_attend(split(block.q(x)), k, v))


@_whole(1)
def one_head_repeated(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    return join(_attend(split(block.q(x)), *(split(one(x), 1).repeat(1, HEADS, 1, 1) for one in (block.k, block.v))))


@_whole(1)
def heads_beside_queries(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Heads and positions are one axis of one product."""
    y = _attend(split(block.q(x)).reshape(x.shape[0], -1, DEPTH), block.k(x), block.v(x))
    return join(y.view(x.shape[0], HEADS, -1, DEPTH))


@_whole(1)
def queries_beside_heads(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """The same with positions first, as GPTBigCode has it, masked where the scores are [B, S, H, T]."""
    batch, length = x.shape[:2]
    q, k, v = block.q(x).view(batch, length * HEADS, DEPTH), block.k(x), block.v(x)
    scores = (torch.bmm(q, k.transpose(-1, -2)) * SCALE).view(batch, length, HEADS, length)
    keep = (block.lower[:length, :length][None, :, None] == 1) & mask[:, None, None].bool()
    weights = torch.where(keep, scores, LOWEST).softmax(-1).view(batch, length * HEADS, length)
    return torch.bmm(weights, v).view(batch, length, HEADS * DEPTH)


@_whole(1)
def one_head_by_einsum(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    q = block.q(x).view(x.shape[0], x.shape[1], HEADS, DEPTH)
    weights = (torch.einsum("bihd,bjd->bhij", q, block.k(x)) * SCALE).softmax(-1)
    return torch.einsum("bhij,bjd->bihd", weights, block.v(x)).reshape(x.shape[0], -1, HEADS * DEPTH)


@_whole(2)
def groups_repeated(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    k, v = (split(one(x), 2).repeat_interleave(2, 1) for one in (block.k, block.v))
    return join(_attend(split(block.q(x)), k, v))


@_whole(2)
def groups_expanded(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    k, v = (split(one(x), 2)[:, :, None] for one in (block.k, block.v))
    k, v = (one.expand(-1, 2, 2, -1, DEPTH).reshape(x.shape[0], HEADS, -1, DEPTH) for one in (k, v))
    return join(_attend(split(block.q(x)), k, v))


@_whole(2)
def groups_apart(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Scores [B, G, R, S, T], masked there."""
    batch, length = x.shape[:2]
    q = block.q(x).view(batch, length, 2, 2, DEPTH).permute(0, 2, 3, 1, 4)
    k, v = (split(one(x), 2)[:, :, None] for one in (block.k, block.v))
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(mask[:, None, None, None] == 0, -1e9)
    return (scores.softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(batch, length, HEADS * DEPTH)


@_whole(2)
def groups_beside_queries(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Scores [B, G, R * S, T]."""
    k, v = (split(one(x), 2) for one in (block.k, block.v))
    y = _attend(split(block.q(x)).reshape(x.shape[0], 2, -1, DEPTH), k, v)
    return join(y.view(x.shape[0], HEADS, -1, DEPTH))


@_whole(2)
def groups_by_einsum(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    q = block.q(x).view(x.shape[0], x.shape[1], 2, 2, DEPTH)
    k, v = (one(x).view(x.shape[0], x.shape[1], 2, DEPTH) for one in (block.k, block.v))
    weights = (torch.einsum("bqgrd,bkgd->bgrqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("bgrqk,bkgd->bqgrd", weights, v).reshape(x.shape[0], -1, HEADS * DEPTH)


@_whole(2)
def groups_turned_by_einsum(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Members of a group in front of the groups: "b (h g) n d -> b g h n d"."""
    q = split(block.q(x)).view(x.shape[0], 2, 2, -1, DEPTH).transpose(1, 2)
    k, v = (split(one(x), 2) for one in (block.k, block.v))
    weights = (torch.einsum("bghnd,bhsd->bghns", q, k) * SCALE).softmax(-1)
    y = torch.einsum("bghns,bhsd->bghnd", weights, v)
    return y.permute(0, 3, 2, 1, 4).reshape(x.shape[0], -1, HEADS * DEPTH)


@_whole()
def channels_first(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Everything is [B, H, d, S], as in models of images."""
    q, k, v = (one(x).transpose(1, 2).reshape(x.shape[0], HEADS, DEPTH, -1) for one in (block.q, block.k, block.v))
    weights = (k.transpose(-1, -2) @ q * SCALE).softmax(-2)
    return (v @ weights).reshape(x.shape[0], HEADS * DEPTH, -1).transpose(1, 2)


@_whole()
def scores_subtracted_from_a_mask(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """The mask is what baddbmm adds to."""
    batch, length = x.shape[:2]
    q, k, v = (one.reshape(-1, length, DEPTH) for one in plain(block, x))
    added = ((1 - mask.float()) * -1e4)[:, None].expand(batch, length, length).repeat_interleave(HEADS, 0)
    y = torch.baddbmm(added, q, k.transpose(1, 2), alpha=SCALE).softmax(-1) @ v
    return join(y.view(batch, HEADS, length, DEPTH))


def _by_einsum(name: str, scores: str, values: str) -> None:
    def attend(block: Block, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (one(x).view(x.shape[0], x.shape[1], HEADS, DEPTH) for one in (block.q, block.k, block.v))
        weights = torch.einsum(f"bqhd,bkhd->{scores}", q, k) * SCALE
        y = torch.einsum(f"{scores},bkhd->{values}", weights.softmax(scores.index("k")), v)
        return y.permute([values.index(letter) for letter in "bqhd"]).reshape(x.shape[0], -1, HEADS * DEPTH)

    WHOLE[name] = Spelling(attend)


for _scores, _values in (
    ("bhqk", "bqhd"), ("bqhk", "bqhd"), ("bhkq", "bqhd"), ("bqkh", "bqhd"), ("hbqk", "bhqd"), ("bqhk", "bhdq"),
    ("qkbh", "qbhd"), ("bkhq", "bqhd"), ("kqhb", "hbqd"),
):  # fmt: skip
    _by_einsum(f"einsum_{_scores}_{_values}", _scores, _values)


@_whole()
def weights_are_given_too(block: Block, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = plain(block, x)
    weights = (q @ k.transpose(-1, -2) * SCALE).masked_fill(_keys(mask) == 0, -1e9).softmax(-1)
    return join(weights @ v), weights


@_whole()
def means_of_weights_are_given_too(block: Block, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = plain(block, x)
    weights = (q @ k.transpose(-1, -2) * SCALE).softmax(-1)
    return join(weights @ v), weights.mean(1)


@_whole()
def scores_are_given_too(block: Block, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = plain(block, x)
    scores = q @ k.transpose(-1, -2) * SCALE
    return join(scores.softmax(-1) @ v), scores


@_whole()
def weights_on_their_way(block: Block, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Given as [B, H, S, T], and multiplied as [B * H, S, T]."""
    q, k, v = (one.reshape(-1, x.shape[1], DEPTH) for one in plain(block, x))
    weights = torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1)
    shown = weights.view(x.shape[0], HEADS, x.shape[1], x.shape[1])
    y = torch.bmm(shown.view(-1, x.shape[1], x.shape[1]), v)
    return join(y.view(x.shape[0], HEADS, x.shape[1], DEPTH)), shown
