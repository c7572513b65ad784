"""Which ways of exporting each zoo model are tried, by default and in the long run."""

from __future__ import annotations

from collections.abc import Iterator

from . import hf, own, stories260k
from .entry import Entry
from .exporting import Way

ENTRIES: tuple[Entry, ...] = (*hf.ENTRIES, *own.ENTRIES, stories260k.TINY)

NOT_EXPORTABLE = {("swin", "sdpa"), ("t5", "sdpa")}
"""Models whose masked sdpa torch's dynamo exporter cannot decompose (torch 2.13)."""

DYNAMO_BY_DEFAULT = {
    "vit", "swin", "bert", "gpt2", "llama", "alibi", "grouped", "qk_norm", "fused_per_head", "rotary_interleaved",
    "windows",
}  # fmt: skip


def default_ways(entry: Entry) -> Iterator[Way]:
    """One export by TorchScript (cheap), and by dynamo for models that between them show all its idioms."""
    if entry.torchscript != "none":
        yield Way("torchscript", 17, entry.attentions[0], entry.torchscript == "dynamic")
    if entry.name in DYNAMO_BY_DEFAULT or entry.torchscript == "none":
        yield Way("dynamo", 20, _dynamo_attentions(entry)[0], True)


def all_ways(entry: Entry) -> Iterator[Way]:
    """Opsets 14 to 23, static and dynamic axes, each attention implementation."""
    for attention in entry.attentions:
        if entry.torchscript != "none":
            yield Way("torchscript", 17, attention, entry.torchscript == "dynamic")
            yield Way("torchscript", 14, attention, False)
    for attention in _dynamo_attentions(entry):
        yield Way("dynamo", 18, attention, False)
        yield Way("dynamo", 20, attention, True)
        yield Way("dynamo", 23, attention, True)


def _dynamo_attentions(entry: Entry) -> list[str]:
    return [attention for attention in entry.attentions if (entry.name, attention) not in NOT_EXPORTABLE]
