"""Which ways of exporting each zoo model are tried, by default and in the long run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from . import (
    choices,
    chosen,
    dense,
    diffusion,
    experts,
    fusions,
    generation,
    graphs,
    hf,
    hybrid,
    linear,
    modalities,
    own,
    scenes,
    series,
    spans,
    speech,
    stages,
    states,
    stories260k,
    streams,
    text,
    tokens,
    towers,
    vision,
)
from .entry import Entry, Expect
from .exporting import Way

PICTURES: tuple[Entry, ...] = (
    *vision.ENTRIES, *hybrid.ENTRIES, *linear.ENTRIES, *tokens.ENTRIES, *spans.ENTRIES, *diffusion.ENTRIES,
    *dense.ENTRIES, *states.ENTRIES, *stages.ENTRIES, *scenes.ENTRIES,
    *chosen.ENTRIES, *fusions.ENTRIES, *modalities.PICTURES,
)  # fmt: skip
"""Models of images and videos."""
SEQUENCES: tuple[Entry, ...] = (
    *text.ENTRIES, *generation.ENTRIES, *towers.ENTRIES, *experts.ENTRIES, *speech.ENTRIES, *streams.ENTRIES,
    *series.ENTRIES, *choices.ENTRIES, *graphs.ENTRIES, *modalities.SEQUENCES,
)  # fmt: skip
"""Models of text, speech, series and items."""
IN_TWO_WAYS: tuple[Entry, ...] = (*SEQUENCES, *PICTURES)
MODELS: tuple[Entry, ...] = (*hf.ENTRIES, stories260k.TINY, *IN_TWO_WAYS)
"""Models of the literature; own.ENTRIES are forms of attention."""
ENTRIES: tuple[Entry, ...] = (*MODELS, *own.ENTRIES)

NOT_EXPORTABLE = {("swin", "sdpa"), ("t5", "sdpa")}
"""Models whose masked sdpa torch's dynamo exporter cannot decompose (torch 2.13)."""

NOT_BY_DYNAMO: set[str] = {
    "looped", "looped_as_asked", "until_still", "early_exit", "layer_gates", "one_of_three", "xlnet",
    "informer", "farthest_points",
}  # fmt: skip
"""Models that torch.export does not take."""

FIXED_BY_DYNAMO = {"sequencer"}
"""Models whose axes torch.export makes numbers."""

OTHERWISE_BY_DYNAMO: dict[str, dict[str, Any]] = {
    "abinet": {"named": ("no-residual",)},
    "dat_sr": {"named": ("no-projection-out", "no-residual")},
    "wav2vec2": {"named": ("attention-4d",)},
    "hubert": {"named": ("attention-4d",)},
    "wavlm": {
        "heads": 1,
        "named": ("no-projection-k", "no-projection-out", "no-projection-q", "no-projection-v", "no-residual"),
    },
    "wav2vec2conformer": {"count": 0, "named": ("batch-sizes",)},
    "lsh": {"count": 0, "ffns": 2, "named": ("batch-sizes",)},
    "prob_sparse": {"count": 0, "ffns": 2, "named": ("batch-sizes",)},
}
"""What is expected of a model by that exporter, where it differs: sizes behind convolutions, and of chosen tokens, are
written as arithmetic on the input's, which hides that they are equal; constants are not folded.
"""

DYNAMO_BY_DEFAULT = {
    "vit", "bert", "llama", "alibi", "grouped", "qk_norm", "windows",
}  # fmt: skip

BY_DEFAULT = {
    "twins", "maxvit", "cosine", "axial", "hilo", "eva", "irpe", "xcit", "efficientvit", "crossvit", "perceiver",
    "pixart", "samvision", "siglipvision", "hiera", "albert", "modernbert", "phi3", "gemma2", "falcon", "bloom",
    "debertav2", "t5_pair", "llama_past", "sasrec", "clip", "wav2vec2conformer", "conformer", "segformer",
}  # fmt: skip
"""Of the models that are exported in at most two ways, those that between them show all their idioms."""


def default_ways(entry: Entry) -> Iterator[Way]:
    """One export by TorchScript (cheap), and by dynamo for models that between them show all its idioms."""
    if entry in IN_TWO_WAYS:
        yield from list(two_ways(entry))[: entry.name in BY_DEFAULT]
        return
    if entry.torchscript != "none":
        yield Way("torchscript", 17, entry.attentions[0], entry.torchscript == "dynamic")
    if entry.name in DYNAMO_BY_DEFAULT or entry.torchscript == "none":
        yield Way("dynamo", 20, _dynamo_attentions(entry)[0], True)


def all_ways(entry: Entry) -> Iterator[Way]:
    """Opsets 14 to 23, static or dynamic, each attention implementation; of most models, one or two."""
    if entry in IN_TWO_WAYS:
        yield from two_ways(entry)
        return
    for attention in entry.attentions:
        if entry.torchscript != "none":
            yield Way("torchscript", 17, attention, entry.torchscript == "dynamic")
            yield Way("torchscript", 14, attention, False)
    for attention in _dynamo_attentions(entry):
        yield Way("dynamo", 18, attention, False)
        yield Way("dynamo", 20, attention, True)
        yield Way("dynamo", 23, attention, True)


def two_ways(entry: Entry) -> Iterator[Way]:
    """One export by each exporter that can, with dynamic axes where that works."""
    if entry.torchscript != "none":
        yield Way("torchscript", 17, entry.attentions[0], entry.torchscript == "dynamic")
    attentions = _dynamo_attentions(entry)
    if attentions and entry.name not in NOT_BY_DYNAMO:
        yield Way("dynamo", 20, attentions[0], entry.name not in FIXED_BY_DYNAMO)


def expected(entry: Entry, way: Way) -> Expect:
    """What an export of a model must show."""
    return (
        replace(entry.expect, **OTHERWISE_BY_DYNAMO.get(entry.name, {})) if way.exporter == "dynamo" else entry.expect
    )


def _dynamo_attentions(entry: Entry) -> list[str]:
    return [attention for attention in entry.attentions if (entry.name, attention) not in NOT_EXPORTABLE]
