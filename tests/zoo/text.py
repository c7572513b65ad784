"""Encoders (RoBERTa to ModernBERT, with relative and rotary positions) and decoders (OPT to BLOOM) of text."""

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
        Expect(2, 4, mask="bias", scale=24**-0.5),
        **SMALL,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        share_att_key=True,
    ),
    text(
        "DebertaModel",
        "DebertaConfig",
        Expect(2, 4, mask="bias"),
        **SMALL,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        attentions=("eager",),
    ),
    text(
        "BigBirdModel",
        "BigBirdConfig",
        Expect(2, 4, mask="padding"),
        **SMALL,
        block_size=4,
        num_random_blocks=1,
        attentions=("eager",),
    ),
    text(
        "RoFormerModel",
        "RoFormerConfig",
        Expect(2, 4, mask="padding", rotary=True),
        **SMALL,
        embedding_size=32,
        attentions=("eager",),
    ),
    text(
        "EsmModel",
        "EsmConfig",
        Expect(2, 4, mask="padding", rotary=True),
        **SMALL,
        position_embedding_type="rotary",
        attentions=("eager",),
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
    text(
        "SqueezeBertModel",
        "SqueezeBertConfig",
        Expect(2, 4, ffns=0, named=("attention-4d",)),
        **SMALL,
        embedding_size=32,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        intermediate_groups=2,
        output_groups=2,
        attentions=("eager",),
    ),
    text(
        "ConvBertModel",
        "ConvBertConfig",
        Expect(2, 2, mask="padding", named=("no-projection-out", "no-residual", "softmax-axis")),
        **SMALL,
        embedding_size=32,
        conv_kernel_size=3,
        attentions=("eager",),
    ),
    text(
        "XLNetModel",
        "XLNetConfig",
        Expect(0, 4, ffns=2, named=("head-layout",)),
        vocab_size=99,
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=64,
        fixed={"use_mems": False},
        attentions=("eager",),
    ),
)

DECODERS: tuple[Entry, ...] = tuple(
    text(f"{family}ForCausalLM", f"{family}Config", expect, output="logits", fixed=WITHOUT_CACHE, **options)
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
        (
            "GPTJ",
            Expect(2, 4, causal=True, mask="padding", rotary=True, named=("no-projection-q", "no-projection-k")),
            {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        ),
        (
            "GPTNeo",
            Expect(2, 4, causal=True, mask="padding", scale=1.0),
            dict(
                TOKENS,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=4,
            ),
        ),
        (
            "Mpt",
            Expect(2, 4, causal=True, mask="bias"),
            {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
        ),
        (
            "Olmo2",
            Expect(2, 4, causal=True, mask="padding", rotary=True, named=("no-projection-q", "no-projection-k")),
            SMALL,
        ),
        ("Falcon", Expect(2, 4, 1, causal=True, mask="padding", rotary=True), SMALL),
        (
            "Bloom",
            Expect(2, 4, causal=True, mask="bias", fused=True),
            {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        ),
        (
            "Qwen2Moe",
            Expect(2, 4, 2, causal=True, mask="padding", rotary=True, named=("stacked-weights",)),
            dict(
                SMALL,
                num_key_value_heads=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=32,
                num_experts=4,
                num_experts_per_tok=2,
                experts_implementation="batched_mm",
            ),
        ),
        (
            "ModernBertDecoder",
            Expect(2, 4, causal=True, mask=("padding", "bias"), rotary=True),
            dict(SMALL, local_attention=4, layer_types=["full_attention", "sliding_attention"], sep_token_id=2),
        ),
    )
)

ENTRIES = (*ENCODERS, *DECODERS)
