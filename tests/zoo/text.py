"""RoBERTa, ELECTRA, ALBERT, MPNet, DeBERTa v2, ModernBERT, OPT, Phi-3, Gemma, Gemma 2, Qwen 2 and 3, GPT-NeoX, Falcon,
BLOOM.
"""

from __future__ import annotations

from .entry import Entry, Expect
from .hf import BERT, TOKENS, text

CAUSAL = Expect(2, 4, causal=True, mask="padding", rotary=True)
WITHOUT_CACHE = {"use_cache": False}
SMALL = dict(TOKENS, **BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2)

ENCODERS: tuple[Entry, ...] = (
    text("RobertaModel", "RobertaConfig", Expect(2, 4, mask="padding"), **SMALL),
    text("ElectraModel", "ElectraConfig", Expect(2, 4, mask="padding"), **SMALL, embedding_size=16),
    text("AlbertModel", "AlbertConfig", Expect(2, 4, mask="padding"), **SMALL, embedding_size=16),
    text("MPNetModel", "MPNetConfig", Expect(2, 4, mask="bias"), **SMALL),
    text(
        "DebertaV2Model",
        "DebertaV2Config",
        Expect(0, 4, ffns=2, named=("mask-sizes",)),
        **SMALL,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        share_att_key=True,
    ),
    text(
        "ModernBertModel",
        "ModernBertConfig",
        Expect(2, 4, mask=("padding", "bias"), rotary=True),
        **SMALL,
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
)

DECODERS: tuple[Entry, ...] = tuple(
    text(f"{family}ForCausalLM", f"{family}Config", expect, "logits", WITHOUT_CACHE, **options)
    for family, expect, options in (
        ("OPT", Expect(2, 4, causal=True, mask="padding"), dict(SMALL, ffn_dim=64, word_embed_proj_dim=32)),
        ("Phi3", CAUSAL, SMALL),
        (
            "Gemma",
            Expect(2, 4, 1, causal=True, mask="padding", rotary=True),
            dict(SMALL, num_key_value_heads=1, head_dim=8),
        ),
        (
            "Gemma2",
            Expect(2, 4, 2, causal=True, mask="padding", rotary=True, softcap=50.0),
            dict(SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
        ),
        ("Qwen2", Expect(2, 4, 2, causal=True, mask="padding", rotary=True), dict(SMALL, num_key_value_heads=2)),
        (
            "Qwen3",
            Expect(2, 4, 2, causal=True, mask="padding", rotary=True),
            dict(SMALL, num_key_value_heads=2, head_dim=8),
        ),
        ("GPTNeoX", CAUSAL, SMALL),
        ("Falcon", Expect(2, 4, 1, causal=True, mask="padding", rotary=True), SMALL),
        (
            "Bloom",
            Expect(0, 4, ffns=2, named=("mask-sizes",)),
            {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        ),
    )
)

ENTRIES = (*ENCODERS, *DECODERS)
