"""Tiny transformers models with random weights, as modules with plain tensor inputs and one output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry, Expect, ids, mask, normal

TEXT = ("input_ids", "attention_mask")
BATCH_SEQ = {0: "batch", 1: "seq"}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
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


def vision(family: str, expect: Expect, **options: Any) -> Entry:
    names = ("pixel_values",)
    build = builder(f"{family}Model", f"{family}Config", names, "last_hidden_state", {}, options)

    def feeds(batch: int, seq: int) -> tuple[Tensor, ...]:
        return (normal(batch, 3, 32, 32),)

    return Entry(family.lower(), build, names, feeds, ({0: "batch"},), expect, ("sdpa", "eager"))


def text(
    model: str,
    config: str,
    expect: Expect,
    output: str = "last_hidden_state",
    fixed: dict[str, Any] | None = None,
    **options: Any,
) -> Entry:
    build = builder(model, config, TEXT, output, fixed or {}, options)

    def feeds(batch: int, seq: int) -> tuple[Tensor, ...]:
        return ids(batch, seq, 99), mask(batch, seq)

    name = config.removesuffix("Config").lower()
    return Entry(name, build, TEXT, feeds, (BATCH_SEQ, BATCH_SEQ), expect, ("sdpa", "eager"))


def audio(expect: Expect, **options: Any) -> Entry:
    names = ("input_features",)
    build = builder("WhisperEncoder", "WhisperConfig", names, "last_hidden_state", {}, options)

    def feeds(batch: int, seq: int) -> tuple[Tensor, ...]:
        return (normal(batch, 16, 40),)

    return Entry("whisper", build, names, feeds, ({0: "batch"},), expect, ("sdpa", "eager"))


ENTRIES: tuple[Entry, ...] = (
    vision("ViT", Expect(2, 4), **VIT),
    vision("DeiT", Expect(2, 4), **VIT),
    vision(
        "Swin",
        Expect(4, (2, 2, 4, 4), mask="bias"),
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    vision("CLIPVision", Expect(2, 4), **VIT),
    text("BertModel", "BertConfig", Expect(2, 4, mask="padding"), **TOKENS, **BERT),
    text(
        "DistilBertModel",
        "DistilBertConfig",
        Expect(2, 4, mask="padding"),
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
        "logits",
        {"use_cache": False},
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
        "logits",
        {"use_cache": False},
        **TOKENS,
        **BERT,
        num_key_value_heads=2,
    ),
    text(
        "T5EncoderModel",
        "T5Config",
        Expect(2, 4, mask="bias", scale=1.0),
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    ),
    audio(
        Expect(2, 4),
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
        **TOKENS,
        **BERT,
        eos_token_id=98,
        bos_token_id=97,
        pad_token_id=1,
    ),
)
"""ViT, DeiT, Swin, CLIP (both), BERT, DistilBERT, GPT-2, Llama, T5 encoder, Whisper encoder."""
