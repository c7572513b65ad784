"""Audio: encoders of waveforms and spectra, of transformers and of our own."""

from __future__ import annotations

from torch import Tensor

from .entry import Axes, Entry, Expect, normal
from .hf import hub

BATCH: Axes = {0: "batch"}
WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_adapter_layers": 1,
    "apply_spec_augment": False,
}


def _wave(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (normal(batch, 8 * seq + 40),)


def _waves(family: str, expect: Expect, **options: object) -> Entry:
    return hub(
        family.lower(), f"{family}Model", f"{family}Config", ("input_values",), _wave, ({0: "batch", 1: "samples"},),
        expect, **{**WAVE, **options},
    )  # fmt: skip


ENTRIES: tuple[Entry, ...] = (
    _waves("Wav2Vec2", Expect(2, 4)),
    _waves("Hubert", Expect(2, 4), do_stable_layer_norm=True, feat_extract_norm="layer"),
    _waves("WavLM", Expect(2, 4, mask="bias"), attentions=("eager",), num_buckets=8, max_bucket_distance=16),
    _waves(
        "Wav2Vec2Conformer",
        Expect(2, 4, ffns=4, mask="bias"),
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=3,
    ),
    hub(
        "ast",
        "ASTModel",
        "ASTConfig",
        ("input_values",),
        lambda batch, seq: (normal(batch, 24, 16),),
        (BATCH,),
        Expect(2, 4),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=16,
    ),
)
"""wav2vec 2, HuBERT, WavLM, Conformer, AST."""
