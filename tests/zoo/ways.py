"""Which ways of exporting each zoo model are tried, by default and in the long run."""

from __future__ import annotations

from collections.abc import Iterator

from . import diffusion, hf, hybrid, linear, own, stories260k, text, tokens, vision
from .entry import Entry
from .exporting import Way

PICTURES: tuple[Entry, ...] = (
    *vision.ENTRIES, *hybrid.ENTRIES, *linear.ENTRIES, *tokens.ENTRIES, *diffusion.ENTRIES,
)  # fmt: skip
"""Models of images and videos, each exported in at most two ways."""
ENTRIES: tuple[Entry, ...] = (*hf.ENTRIES, *own.ENTRIES, stories260k.TINY, *text.ENTRIES, *PICTURES)

NOT_EXPORTABLE = {("swin", "sdpa"), ("t5", "sdpa")}
"""Models whose masked sdpa torch's dynamo exporter cannot decompose (torch 2.13)."""

DYNAMO_BY_DEFAULT = {
    "vit", "swin", "bert", "gpt2", "llama", "alibi", "grouped", "qk_norm", "fused_per_head", "rotary_interleaved",
    "windows",
}  # fmt: skip

TEXT_BY_DEFAULT = {"albert", "modernbert", "phi3", "gemma2", "falcon"}
"""Of the text models, those that between them show all their idioms."""
TEXT_BY_DYNAMO = {"roberta", "electra", "albert"}


PICTURES_BY_DEFAULT = {
    "twins", "maxvit", "cosine", "axial", "hilo", "eva", "irpe", "xcit", "efficientvit", "crossvit", "perceiver",
    "pixart", "samvision", "siglipvision", "hiera",
}  # fmt: skip
"""Of these, those that between them show all their idioms."""


def default_ways(entry: Entry) -> Iterator[Way]:
    """One export by TorchScript (cheap), and by dynamo for models that between them show all its idioms."""
    if entry in text.ENTRIES:
        yield from list(_text_ways(entry))[: entry.name in TEXT_BY_DEFAULT]
        return
    if entry in PICTURES:
        yield from list(_ways_of_a_picture(entry))[: entry.name in PICTURES_BY_DEFAULT]
        return
    if entry.torchscript != "none":
        yield Way("torchscript", 17, entry.attentions[0], entry.torchscript == "dynamic")
    if entry.name in DYNAMO_BY_DEFAULT or entry.torchscript == "none":
        yield Way("dynamo", 20, _dynamo_attentions(entry)[0], True)


def all_ways(entry: Entry) -> Iterator[Way]:
    """Opsets 14 to 23, static or dynamic, each attention implementation; of pictures and text models, one or two."""
    if entry in text.ENTRIES:
        yield from _text_ways(entry)
        return
    if entry in PICTURES:
        yield from _ways_of_a_picture(entry)
        return
    for attention in entry.attentions:
        if entry.torchscript != "none":
            yield Way("torchscript", 17, attention, entry.torchscript == "dynamic")
            yield Way("torchscript", 14, attention, False)
    for attention in _dynamo_attentions(entry):
        yield Way("dynamo", 18, attention, False)
        yield Way("dynamo", 20, attention, True)
        yield Way("dynamo", 23, attention, True)


def _text_ways(entry: Entry) -> Iterator[Way]:
    yield Way("torchscript", 17, "eager", True)
    if entry.name in TEXT_BY_DYNAMO:
        yield Way("dynamo", 20, "sdpa", True)


def _ways_of_a_picture(entry: Entry) -> Iterator[Way]:
    if entry.torchscript != "none":
        yield Way("torchscript", 17, entry.attentions[0], entry.torchscript == "dynamic")
    yield Way("dynamo", 20, entry.attentions[0], True)


def _dynamo_attentions(entry: Entry) -> list[str]:
    return [attention for attention in entry.attentions if (entry.name, attention) not in NOT_EXPORTABLE]
