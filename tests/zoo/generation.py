"""Encoder-decoders, and decoders that take a past of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .entry import Axes, Entry, Expect, ids, mask, normal
from .hf import BATCH_SEQ, BERT, TOKENS, Wrapped, builder, hub

PAIR = ("input_ids", "attention_mask", "decoder_input_ids")
TARGET: Axes = {0: "batch", 1: "target"}
DECODER = (False, False, True, False, True, False)
"""Two layers of an encoder; two of a decoder, each with causal and with cross attention."""
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def _pair(batch: int, seq: int) -> tuple[Tensor, ...]:
    return ids(batch, seq, 99), mask(batch, seq), ids(batch, seq + 2, 99)


def _translator(name: str, model: str, config: str, expect: Expect, **options: Any) -> Entry:
    axes = (BATCH_SEQ, BATCH_SEQ, TARGET)
    fixed = {"use_cache": False}
    return hub(name, model, config, PAIR, _pair, axes, expect, output="logits", fixed=fixed, **SPECIAL, **options)


GIVEN = ("no-projection-k", "no-projection-v")
"""Keys and values are those of the past and of the projections, joined."""
LAYERS, HEAD = 2, 8
PAST: Axes = {0: "batch", 2: "past"}


class WithPast(nn.Module):
    """A decoder of transformers that takes keys and values of earlier tokens, and gives them back with its own."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        assert isinstance(wrapped, Wrapped)
        self.model = wrapped.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        kept = [part for layer in result.past_key_values.layers for part in (layer.keys, layer.values)]
        return result.logits, *kept


def _decoder(family: str, expect: Expect, kv_heads: int, past: int, **options: Any) -> Entry:
    """``past`` tokens for a sequence of 7; as many more or fewer for another length."""
    names = tuple(f"past_{layer}_{part}" for layer in range(LAYERS) for part in ("key", "value"))
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    build = builder(family + head, f"{family}Config", (), "logits", {}, options)

    def feeds(batch: int, seq: int) -> tuple[Tensor, ...]:
        length = max(past + seq - 7, 0)
        cache = tuple(normal(batch, kv_heads, length, HEAD) for _ in names)
        return ids(batch, seq, 99), torch.ones(batch, seq + length, dtype=torch.int64), *cache

    axes = (BATCH_SEQ, {0: "batch", 1: "total"}, *(PAST for _ in names))
    name = f"{family.lower()}_past"
    inputs = ("input_ids", "attention_mask", *names)
    return Entry(name, lambda attention: WithPast(build(attention)), inputs, feeds, axes, expect, ("eager", "sdpa"))


ENTRIES: tuple[Entry, ...] = (
    _translator(
        "t5_pair",
        "T5ForConditionalGeneration",
        "T5Config",
        Expect(6, 4, ffns=4, causal=DECODER, mask=("bias", "bias", "bias", "padding", "bias", "padding"), scale=1.0),
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        attentions=("eager",),
    ),
    _translator(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        Expect(6, 4, ffns=4, causal=DECODER, mask=("padding", "padding", "none", "padding", "none", "padding")),
        **TOKENS,
        **BART,
    ),
    _translator(
        "marian",
        "MarianMTModel",
        "MarianConfig",
        Expect(6, 4, ffns=4, causal=DECODER, mask=("padding", "padding", "none", "padding", "none", "padding")),
        **TOKENS,
        **BART,
    ),
    hub(
        "whisper_pair",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        ("input_features", "decoder_input_ids"),
        lambda batch, seq: (normal(batch, 16, 40), ids(batch, seq, 99)),
        ({0: "batch"}, BATCH_SEQ),
        Expect(6, 4, ffns=4, causal=DECODER),
        output="logits",
        fixed={"use_cache": False},
        torchscript="none",
        **BART,
        **SPECIAL,
        vocab_size=99,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=64,
    ),
    _decoder(
        "GPT2",
        Expect(2, 4, mask="bias", named=GIVEN),
        4,
        3,
        vocab_size=99,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
    ),
    _decoder(
        "Llama", Expect(2, 4, mask="bias", rotary=True, named=GIVEN), 2, 3, **TOKENS, **BERT, num_key_value_heads=2
    ),
    _decoder(
        "Qwen3",
        Expect(2, 4, mask="bias", rotary=True, named=GIVEN),
        2,
        3,
        **TOKENS,
        **BERT,
        num_key_value_heads=2,
        head_dim=8,
    ),
)
"""T5, BART, Marian, Whisper with its decoder; GPT-2, Llama, Qwen 3 with a past."""
