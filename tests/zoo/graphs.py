"""Points, graphs and molecules: farthest points, neighbours, messages along edges, attention over nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, Expect, normal
from .mixers import BATCH, DEPTH, HEADS, WIDTH, Attention, Block, seeded

NODES, EDGES = 12, 30


class FarthestPoints(nn.Module):
    """Point-BERT, G3PT: centres are, one after the other, the points farthest from those chosen; their nearest points
    become tokens.
    """

    centres, near = 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(32, WIDTH)
        self.place, self.block = nn.Linear(3, WIDTH), Block(Attention())

    def farthest(self, points: Tensor) -> Tensor:
        """Indices [B, centres]."""
        last = torch.zeros_like(points[:, :1, 0], dtype=torch.int64)
        distance, chosen = torch.full_like(points[..., 0], 1e10), []
        for _ in range(self.centres):
            chosen.append(last)
            centre = points.gather(1, last[..., None].expand(-1, -1, 3))
            distance = torch.minimum(distance, (points - centre).square().sum(-1))
            last = distance.argmax(-1, keepdim=True)
        return torch.cat(chosen, 1)

    def forward(self, points: Tensor) -> Tensor:
        centres = points.gather(1, self.farthest(points)[..., None].expand(-1, -1, 3))
        nearest = torch.cdist(centres, points).topk(self.near, -1, largest=False).indices
        groups = points.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, (self.centres, -1))
        local = self.each((groups - centres[:, :, None]).flatten(0, 1).transpose(1, 2))
        both = torch.cat([local, local.amax(2, keepdim=True).expand_as(local)], 1)
        tokens = self.all(both.transpose(1, 2)).amax(1).unflatten(0, (-1, self.centres))
        return self.block(tokens + self.place(centres))


class Messages(nn.Module):
    """Sums over the edges that end at a node, of what the other end and the edge say (PPGT, Prot2Text, Todyformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.says, self.hears = nn.Linear(WIDTH + 4, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        """Nodes [N, C], edges int64 [2, E], features [E, 4] -> [N, C]."""
        said = F.relu(self.says(torch.cat([x[edges[0]], features], -1)))
        heard = torch.zeros_like(x).index_add(0, edges[1], said)
        count = torch.zeros_like(x[:, :1]).index_add(0, edges[1], torch.ones_like(features[:, :1]))
        return self.hears(torch.cat([x, heard / count.clamp(min=1.0)], -1))


class GraphTransformer(nn.Module):
    """Messages, then attention over all nodes, biased by a learned value of the distances along the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.messages, self.norm = nn.Linear(6, WIDTH), Messages(), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(8, HEADS)
        self.ffn = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, nodes: Tensor, edges: Tensor, features: Tensor, distances: Tensor) -> Tensor:
        x = self.into(nodes)
        x = (x + self.messages(x, edges, features))[None]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, DEPTH)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * DEPTH**-0.5 + self.bias(distances).permute(2, 0, 1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.ffn(x)


class EdgeSoftmax(nn.Module):
    """Graph attention: a softmax over the edges that end at a node, by scattered maxima and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.q, self.kv = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.into(nodes)
        q = self.q(x).unflatten(-1, (HEADS, DEPTH))
        k, v = self.kv(x).unflatten(-1, (2, HEADS, DEPTH)).unbind(1)
        scores = (q[edges[1]] * k[edges[0]]).sum(-1) * DEPTH**-0.5
        target = edges[1][:, None].expand_as(scores)
        lowest = torch.full_like(q[..., 0], -1e9)
        weights = (scores - lowest.scatter_reduce(0, target, scores, "amax")[edges[1]]).exp()
        total = torch.zeros_like(q[..., 0]).scatter_add(0, target, weights)
        said = (weights[..., None] * v[edges[0]]).flatten(1)
        heard = torch.zeros_like(x).scatter_add(0, edges[1][:, None].expand_as(said), said)
        return x + self.out(heard / (total + 1e-9).repeat_interleave(DEPTH, 1))


def _graph(batch: int, seq: int) -> tuple[Tensor, ...]:
    nodes, edges = NODES + batch, EDGES + seq
    seed = torch.Generator().manual_seed(nodes * edges)
    ends, far = torch.randint(0, nodes, (2, edges), generator=seed), torch.randint(0, 8, (nodes, nodes), generator=seed)
    return normal(nodes, 6), ends, normal(edges, 4), far


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "farthest_points",
        seeded(FarthestPoints),
        ("points",),
        lambda batch, seq: (normal(batch, 24, 3),),
        (BATCH,),
        Expect(1, 2, fused=True),
    ),
    Entry(
        "graph_transformer",
        seeded(GraphTransformer),
        ("nodes", "edges", "features", "distances"),
        _graph,
        ({0: "nodes"}, {1: "edges"}, {0: "edges"}, {0: "nodes", 1: "nodes"}),
        Expect(1, 2, mask="bias", fused=True),
    ),
    Entry(
        "graph_attention",
        seeded(EdgeSoftmax),
        ("nodes", "edges"),
        lambda batch, seq: _graph(batch, seq)[:2],
        ({0: "nodes"}, {1: "edges"}),
        Expect(0, 2),
        torchscript="none",  # its file fits no graph
    ),
)
"""Point-BERT's farthest points, message passing with attention over nodes, attention along edges."""
