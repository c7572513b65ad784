"""Time series and recommendation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .entry import Axes, Entry, Expect, normal
from .hf import hub

BATCH: Axes = {0: "batch"}
PAST, FUTURE = 16, 4
LAYERS = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def _windows(batch: int, seq: int) -> tuple[Tensor, ...]:
    lags = 3
    observed = torch.ones(batch, PAST + lags)
    return (
        normal(batch, PAST + lags),
        normal(batch, PAST + lags, 2),
        observed,
        normal(batch, FUTURE),
        normal(batch, FUTURE, 2),
    )


def _forecaster(family: str, expect: Expect, **options: Any) -> Entry:
    inputs = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")
    names = (family.lower(), f"{family}Model", f"{family}Config")
    lengths = {"prediction_length": FUTURE, "context_length": PAST, "lags_sequence": [1, 2, 3], "num_time_features": 2}
    options = {**lengths, **LAYERS, **options}
    return hub(*names, inputs, _windows, (BATCH,) * 5, expect, attentions=("eager",), **options)


ENTRIES: tuple[Entry, ...] = (
    hub(
        "patchtst",
        "PatchTSTModel",
        "PatchTSTConfig",
        ("past_values",),
        lambda batch, seq: (normal(batch, 16, 3),),
        (BATCH,),
        Expect(2, 4),
        torchscript="none",
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        do_mask_input=False,
    ),
    hub(
        "patchtsmixer",
        "PatchTSMixerModel",
        "PatchTSMixerConfig",
        ("past_values",),
        lambda batch, seq: (normal(batch, 16, 3),),
        (BATCH,),
        Expect(0, 4, named=("no-residual",)),
        torchscript="none",
        d_model=16,
        num_layers=2,
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        attentions=("eager",),
    ),
    _forecaster("TimeSeriesTransformer", Expect(4, 2, ffns=3, causal=(False, False, True, False))),
    _forecaster("Informer", Expect(4, 2, ffns=3, causal=(False, False, True, False)), attention_type="full"),
    hub(
        "timesfm",
        "TimesFmModel",
        "TimesFmConfig",
        ("past_values", "past_values_padding", "freq"),
        lambda batch, seq: (normal(batch, 16), torch.zeros(batch, 16), torch.zeros(batch, 1, dtype=torch.int64)),
        (BATCH, BATCH, BATCH),
        Expect(2, 4, mask="bias", scale=1.0, named=("no-residual",)),
        patch_length=4,
        context_length=16,
        horizon_length=4,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        head_dim=8,
        num_attention_heads=4,
    ),
)
"""PatchTST, PatchTSMixer, a plain forecaster, Informer, TimesFM."""
