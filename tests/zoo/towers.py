"""Two inputs that meet late, and recommenders: towers, candidates, sequences of items, tables of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Axes, Entry, Expect, ids, mask, normal
from .hf import BATCH_SEQ, BERT, TOKENS, VIT, hub
from .mixers import DEPTH, HEADS, WIDTH, Across, Attention, Block, seeded

BATCH: Axes = {0: "batch"}
ITEMS = 60
CANDIDATES = 4


class Encoder(nn.Module):
    """Token ids with a mask -> [B, S, C]: embeddings, places, two blocks whose keys are masked."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(ITEMS, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList([Block(Masked(causal)), Block(Masked(causal))])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, items: Tensor, keep: Tensor) -> Tensor:
        x = self.tokens(items) + self.places(torch.arange(items.shape[1]))
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


class Masked(Attention):
    """Attention to the keys that are kept, and, where ``causal``, to earlier ones only."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.split(x)
        shown = keep[:, None, None, :] > 0
        if self.causal:
            places = torch.arange(x.shape[1])
            shown = shown & (places[None, :] <= places[:, None])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return self.proj(y.transpose(1, 2).flatten(2))


class SelfAttentiveRec(nn.Module):
    """SASRec: a causal encoder of items; scores of all items at each place by the table itself."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(self.causal)

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(items, mask) @ self.encoder.tokens.weight.t()


class Bert4Rec(SelfAttentiveRec):
    """BERT4Rec: the same in both directions."""

    causal = False


class InterestNetwork(nn.Module):
    """DIN: a small network scores each past item against the candidate; no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.score = nn.Sequential(nn.Linear(4 * WIDTH, 32), nn.Sigmoid(), nn.Linear(32, 1))
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, 32), nn.PReLU(), nn.Linear(32, 1))

    def forward(self, items: Tensor, candidate: Tensor, mask: Tensor) -> Tensor:
        past, one = self.items(items), self.items(candidate)
        wide = one[:, None].expand_as(past)
        scores = self.score(torch.cat([wide, past, wide - past, wide * past], -1)).squeeze(-1)
        interest = (scores * mask.float())[:, None] @ past
        return self.head(torch.cat([interest.squeeze(1), one], -1))


class FeatureInteraction(nn.Module):
    """Hiformer: each feature has projections of its own, by batched products; tables of several sizes."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10 * (i + 1), WIDTH) for i in range(features))
        self.q, self.k, self.v = (nn.Parameter(0.3 * torch.randn(features, WIDTH, WIDTH)) for _ in range(3))
        self.out, self.norm = nn.Parameter(0.3 * torch.randn(features, WIDTH, WIDTH)), nn.LayerNorm(WIDTH)
        self.ffn, self.head = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), nn.Linear(WIDTH, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = torch.stack([table(features[:, i]) for i, table in enumerate(self.tables)], 1)
        q, k, v = (torch.einsum("bfc,fcd->bfd", x, w).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2)
                   for w in (self.q, self.k, self.v))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + torch.einsum("bfc,fcd->bfd", y, self.out)
        x = x + self.ffn(self.norm(x))
        return torch.sigmoid(self.head(x.mean(1)))


class TimesOfEvents(nn.Module):
    """SynerGen: a causal encoder of events whose queries and keys turn with the seconds that lie between them; past
    events and candidates share it, and candidates see the past and themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events, self.norm = nn.Embedding(ITEMS, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, WIDTH))
        self.register_buffer("rates", 0.3 ** torch.arange(DEPTH // 2).float())

    def turned(self, x: Tensor, times: Tensor) -> Tensor:
        angles = times[:, None, :, None] * self.rates
        one, two = x.chunk(2, -1)
        return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)

    def forward(self, items: Tensor, times: Tensor, candidates: Tensor, now: Tensor) -> Tensor:
        x, length = torch.cat([self.events(items), self.events(candidates)], 1), items.shape[1]
        at = torch.cat([times, now[:, None].expand(-1, candidates.shape[1])], 1)
        place = torch.arange(x.shape[1])
        earlier = (place[None] <= place[:, None]) & (place[None] < length)
        shown = earlier | (place[None] == place[:, None])
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.turned(q, at), self.turned(k, at), v, shown)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head((x + self.ffn(x))[:, length:]).squeeze(-1)


class PolyEncoder(nn.Module):
    """Codes attend to the context, each candidate attends to the codes; both score by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes = Encoder(), nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, context: Tensor, context_mask: Tensor, candidates: Tensor) -> Tensor:
        x = self.encoder(context, context_mask)
        scores = self.codes @ x.transpose(1, 2) + (1 - context_mask[:, None].float()) * -1e9
        codes = scores.softmax(-1) @ x
        mixed = (candidates @ codes.transpose(1, 2)).softmax(-1) @ codes
        return (mixed * candidates).sum(-1)


class MixEncoder(nn.Module):
    """The query is encoded once; candidates attend to it lightly, each of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.cross = Encoder(), nn.LayerNorm(WIDTH), Across()
        self.ffn, self.head = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), nn.Linear(WIDTH, 1)

    def forward(self, query: Tensor, query_mask: Tensor, candidates: Tensor) -> Tensor:
        x = candidates + self.cross(self.norm(candidates), self.encoder(query, query_mask))
        return self.head(x + self.ffn(self.norm(x))).squeeze(-1)


class DualEncoder(nn.Module):
    """One encoder for both texts, means over their tokens, a cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def embed(self, items: Tensor, keep: Tensor) -> Tensor:
        weights = keep[..., None].float()
        return F.normalize((self.encoder(items, keep) * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, query: Tensor, query_mask: Tensor, answer: Tensor, answer_mask: Tensor) -> Tensor:
        return self.embed(query, query_mask) @ self.embed(answer, answer_mask).t()


class ModalityExperts(nn.Module):
    """VLMo: text and image share one attention; each modality has a feed-forward network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.patches = nn.Embedding(ITEMS, WIDTH), nn.Conv2d(3, WIDTH, 4, 4)
        self.norms, self.mix = (
            nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)),
            nn.ModuleList(Masked(False) for _ in range(2)),
        )
        self.experts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(4)
        )

    def forward(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x, length = torch.cat([self.tokens(text), patches], 1), text.shape[1]
        keep = torch.cat([text_mask, torch.ones_like(patches[..., 0], dtype=text_mask.dtype)], 1)
        for i in range(2):
            x = x + self.mix[i](self.norms[i](x), keep)
            text, image = x[:, :length], x[:, length:]
            x = torch.cat([text + self.experts[2 * i](text), image + self.experts[2 * i + 1](image)], 1)
        return x[:, 0]


def _items(batch: int, seq: int) -> tuple[Tensor, ...]:
    return ids(batch, seq, ITEMS), mask(batch, seq)


def _candidates(batch: int, seq: int) -> tuple[Tensor, ...]:
    return *_items(batch, seq), normal(batch, CANDIDATES, WIDTH)


def _features(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (torch.stack([ids(batch, 1, 10 * (i + 1))[:, 0] for i in range(5)], 1),)


def _events(batch: int, seq: int) -> tuple[Tensor, ...]:
    times = torch.arange(seq).float().expand(batch, -1) * 0.7
    return ids(batch, seq, ITEMS), times, ids(batch, CANDIDATES, ITEMS), torch.full((batch,), 0.7 * seq)


def _texts(batch: int, seq: int) -> tuple[Tensor, ...]:
    return *_items(batch, seq), ids(batch, seq + 2, ITEMS), mask(batch, seq + 2)


ANSWER: Axes = {0: "batch", 1: "answer"}
ALONE = ("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out")
PADDED = Expect(2, 2, mask="padding", fused=True)

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "sasrec",
        seeded(SelfAttentiveRec),
        ("items", "mask"),
        _items,
        (BATCH_SEQ, BATCH_SEQ),
        Expect(2, 2, causal=True, mask="padding", fused=True),
    ),
    Entry("bert4rec", seeded(Bert4Rec), ("items", "mask"), _items, (BATCH_SEQ, BATCH_SEQ), PADDED),
    Entry(
        "din",
        seeded(InterestNetwork),
        ("items", "candidate", "mask"),
        lambda batch, seq: (ids(batch, seq, ITEMS), ids(batch, 1, ITEMS)[:, 0], mask(batch, seq)),
        (BATCH_SEQ, BATCH, BATCH_SEQ),
        Expect(0, 2, named=("no-residual",)),
    ),
    Entry(
        "hiformer",
        seeded(FeatureInteraction),
        ("features",),
        _features,
        (BATCH,),
        Expect(1, 2, named=(*ALONE, "no-residual")),
    ),
    Entry(
        "synergen",
        seeded(TimesOfEvents),
        ("items", "times", "candidates", "now"),
        _events,
        (BATCH_SEQ, BATCH_SEQ, BATCH, BATCH),
        Expect(1, 2, mask="bias"),
    ),
    Entry(
        "poly_encoder",
        seeded(PolyEncoder),
        ("context", "context_mask", "candidates"),
        _candidates,
        (BATCH_SEQ, BATCH_SEQ, BATCH),
        Expect(
            3,
            (2, 2, 1),
            ffns=2,
            mask=("padding", "padding", "none"),
            fused=(True, True, False),
            scale=(None, None, 1.0),
            named=(*ALONE, "no-residual"),
        ),
    ),
    Entry(
        "mix_encoder",
        seeded(MixEncoder),
        ("query", "query_mask", "candidates"),
        _candidates,
        (BATCH_SEQ, BATCH_SEQ, BATCH),
        Expect(3, 2, mask=("padding", "padding", "none"), fused=(True, True, False)),
    ),
    Entry(
        "dual_encoder",
        seeded(DualEncoder),
        ("query", "query_mask", "answer", "answer_mask"),
        _texts,
        (BATCH_SEQ, BATCH_SEQ, ANSWER, ANSWER),
        Expect(4, 2, mask="padding", fused=True),
    ),
    Entry(
        "vlmo",
        seeded(ModalityExperts),
        ("text", "text_mask", "image"),
        lambda batch, seq: (*_items(batch, seq), normal(batch, 3, 8, 8)),
        (BATCH_SEQ, BATCH_SEQ, BATCH),
        Expect(2, 2, ffns=4, mask="padding", fused=True),
    ),
    hub(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        ("input_ids", "attention_mask", "pixel_values"),
        lambda batch, seq: (ids(batch, seq, 99), mask(batch, seq), normal(batch, 3, 32, 32)),
        (BATCH_SEQ, BATCH_SEQ, BATCH),
        Expect(4, 4, causal=(False, False, True, True), mask=("none", "none", "padding", "padding")),
        output="logits_per_image",
        text_config={**TOKENS, **BERT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1},
        vision_config=VIT,
        projection_dim=16,
    ),
)
"""SASRec, BERT4Rec, DIN, Hiformer, SynerGen; poly-, mix- and dual encoders; VLMo, CLIP."""
