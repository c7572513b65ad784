"""Tiny transformers models with random weights, as modules with plain tensor inputs and one output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .entry import Axes, Entry, Expect, ids, mask, normal

Script = Literal["dynamic", "static", "none"]
PIXELS = ("pixel_values",)
SIDE = 32
"""Pixels of the images' sides where a model does not need more."""
SDPA_FIRST = ("sdpa", "eager")
TEXT = ("input_ids", "attention_mask")
BATCH: Axes = {0: "batch"}
BATCH_SEQ: Axes = {0: "batch", 1: "seq"}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PYRAMID: dict[str, object] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
"""Two stages whose keys are reduced: PVT v2, SegFormer, GLPN."""
VIT = dict(BERT, image_size=32, patch_size=8, num_channels=3)
TOKENS = {"vocab_size": 99, "max_position_embeddings": 64}


class Wrapped(nn.Module):
    """Call a transformers model by keyword and return one of its outputs."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.output, self.fixed = model, names, output, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.names, inputs)), **self.fixed), self.output)


def builder(
    model: str, config: str, names: tuple[str, ...], output: str, fixed: dict[str, Any], options: dict[str, Any]
) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import importlib

        transformers = importlib.import_module("transformers")
        settings = getattr(transformers, config)(**options)
        settings._attn_implementation = attention
        torch.manual_seed(0)
        module = _class(transformers, model)(settings)
        for parameter in module.parameters():  # biases and norms start at 0 and 1: hide nothing
            parameter.data += 0.05 * torch.randn(parameter.shape)
        return Wrapped(module.eval(), names, output, fixed)

    return build


def _class(transformers: Any, name: str) -> Any:
    if hasattr(transformers, name):
        return getattr(transformers, name)
    import importlib

    family = name.removesuffix("Encoder").lower()
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def hub(
    name: str,
    model: str,
    config: str,
    inputs: tuple[str, ...],
    feeds: Callable[[int, int], tuple[Tensor, ...]],
    axes: tuple[Axes, ...],
    expect: Expect,
    *,
    output: str = "last_hidden_state",
    fixed: dict[str, Any] | None = None,
    attentions: tuple[str, ...] = ("eager", "sdpa"),
    torchscript: Script = "dynamic",
    **options: Any,
) -> Entry:
    """An entry for a model of transformers.

    Args:
        model, config: names of classes; the options are those of the config.
        inputs: arguments that the model is called with, by keyword, beside the ``fixed`` ones.
        output: which of its outputs is read.
    """
    build = builder(model, config, inputs, output, fixed or {}, options)
    return Entry(name, build, inputs, feeds, axes, expect, attentions, torchscript)


def image(
    family: str,
    expect: Expect,
    *,
    side: int = SIDE,
    frames: int = 0,
    model: str = "",
    config: str = "",
    **options: Any,
) -> Entry:
    """``family`` names model and config; ``frames`` makes the input a video [B, frames, 3, side, side]."""
    shape = (frames, 3, side, side) if frames else (3, side, side)
    classes = (model or f"{family}Model", config or f"{family}Config")
    return hub(
        family.lower(), *classes, PIXELS, lambda batch, seq: (normal(batch, *shape),), (BATCH,), expect, **options
    )


def text(model: str, config: str, expect: Expect, output: str = "last_hidden_state", **options: Any) -> Entry:
    """A model of token ids and a mask over them."""
    name = options.pop("name", config.removesuffix("Config").lower())
    return hub(name, model, config, TEXT, words, (BATCH_SEQ, BATCH_SEQ), expect, output=output, **options)


def words(batch: int, seq: int) -> tuple[Tensor, ...]:
    return ids(batch, seq, 99), mask(batch, seq)


ENTRIES: tuple[Entry, ...] = (
    image("ViT", Expect(2, 4), attentions=SDPA_FIRST, **VIT),
    image("DeiT", Expect(2, 4), attentions=SDPA_FIRST, **VIT),
    image(
        "Swin",
        Expect(4, (2, 2, 4, 4), mask="bias"),
        attentions=SDPA_FIRST,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    image("CLIPVision", Expect(2, 4), attentions=SDPA_FIRST, **VIT),
    text("BertModel", "BertConfig", Expect(2, 4, mask="padding"), attentions=SDPA_FIRST, **TOKENS, **BERT),
    text(
        "DistilBertModel",
        "DistilBertConfig",
        Expect(2, 4, mask="padding"),
        attentions=SDPA_FIRST,
        **TOKENS,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
    ),
    text(
        "GPT2LMHeadModel",
        "GPT2Config",
        Expect(2, 4, causal=True, mask="padding", fused=True),
        attentions=SDPA_FIRST,
        output="logits",
        fixed={"use_cache": False},
        vocab_size=99,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
    ),
    text(
        "LlamaForCausalLM",
        "LlamaConfig",
        Expect(2, 4, 2, causal=True, mask="padding", rotary=True),
        attentions=SDPA_FIRST,
        output="logits",
        fixed={"use_cache": False},
        **TOKENS,
        **BERT,
        num_key_value_heads=2,
    ),
    text(
        "T5EncoderModel",
        "T5Config",
        Expect(2, 4, mask="bias", scale=1.0),
        attentions=SDPA_FIRST,
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    ),
    hub(
        "whisper",
        "WhisperEncoder",
        "WhisperConfig",
        ("input_features",),
        lambda batch, seq: (normal(batch, 16, 40),),
        (BATCH,),
        Expect(2, 4),
        attentions=SDPA_FIRST,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
    ),
    text(
        "CLIPTextModel",
        "CLIPTextConfig",
        Expect(2, 4, causal=True, mask="padding"),
        attentions=SDPA_FIRST,
        **TOKENS,
        **BERT,
        eos_token_id=98,
        bos_token_id=97,
        pad_token_id=1,
    ),
)
"""ViT, DeiT, Swin, CLIP (both), BERT, DistilBERT, GPT-2, Llama, T5 encoder, Whisper encoder."""
