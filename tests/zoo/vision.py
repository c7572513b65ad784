"""Vision encoders of transformers, tiny and with random weights: one entry per form of attention or hierarchy."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from .entry import Entry, Expect, normal
from .hf import VIT, builder

PIXELS = ("pixel_values",)
SIDE = 32
"""Pixels of the images' sides where a model does not need more."""


def image(
    family: str,
    expect: Expect,
    *,
    side: int = SIDE,
    frames: int = 0,
    model: str = "",
    config: str = "",
    output: str = "last_hidden_state",
    eager: bool = True,
    torchscript: Literal["dynamic", "none"] = "dynamic",
    **options: Any,
) -> Entry:
    """``family`` names model and config; ``frames`` makes the input a video [B, frames, 3, side, side]."""
    names = (model or f"{family}Model", config or f"{family}Config")
    build = builder(*names, PIXELS, output, {}, options)
    shape = (frames, 3, side, side) if frames else (3, side, side)

    def feeds(batch: int, seq: int) -> tuple[Tensor, ...]:
        return (normal(batch, *shape),)

    attentions = ("eager", "sdpa") if eager else ("eager",)
    return Entry(family.lower(), build, PIXELS, feeds, ({0: "batch"},), expect, attentions, torchscript)


TURNED = ("no-projection-q", "no-projection-k")
"""Queries and keys that are normed, or turned but for some tokens, after their projections."""

ENTRIES: tuple[Entry, ...] = (
    image(
        "Swinv2",
        Expect(4, (2, 2, 4, 4), mask="bias", scale=1.0, named=TURNED),
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    image("Beit", Expect(2, 4, mask="bias"), use_relative_position_bias=True, **VIT),
    image("Dinov2", Expect(2, 4), **{**VIT, "mlp_ratio": 2}),
    image("DINOv3ViT", Expect(2, 4, rotary=True, named=TURNED), num_register_tokens=2, **VIT),
    image("DINOv3ConvNext", Expect(0, 4, ffns=2), depths=[1, 1], hidden_sizes=[8, 16]),
    image(
        "Levit",
        Expect(
            5,
            2,
            ffns=0,
            mask="bias",
            fused=(False, False, False, False, True),
            named=("no-projection-q", "no-projection-k", "no-projection-v", "no-projection-out", "no-residual"),
        ),
        torchscript="none",
        side=64,
        image_size=64,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    image(
        "MobileViT",
        Expect(9, 4),
        image_size=64,
        side=64,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
    ),
    image(
        "MobileViTV2",
        Expect(0, 4, named=("scores-conv",)),
        side=64,
        torchscript="none",
        image_size=64,
        width_multiplier=0.25,
        base_attn_unit_dims=[32, 32, 32],
    ),
    image(
        "Hiera",
        Expect(3, (1, 2, 4), scale=(None, 1.0, 1.0), named=("no-projection-q", "no-residual")),
        image_size=[32, 32],
        patch_stride=[4, 4],
        embed_dim=16,
        depths=[1, 1, 1],
        num_heads=[1, 2, 4],
        num_query_pool=2,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False],
    ),
    image(
        "Pvt",
        Expect(2, (1, 2)),
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    image(
        "PvtV2",
        Expect(2, (1, 2), ffns=0),
        torchscript="none",
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        linear_attention=True,
    ),
    image(
        "PoolFormer",
        Expect(0, 4, ffns=0),
        side=64,
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        eager=False,
    ),
    image("ConvNextV2", Expect(0, 4, ffns=0), hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, eager=False),
    image(
        "FocalNet",
        Expect(0, 4, ffns=2),
        image_size=32,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        eager=False,
    ),
    image(
        "SamVision",
        Expect(2, 4, mask="bias"),
        side=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_dim=64,
        image_size=32,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=16,
    ),
    image(
        "VitDet",
        Expect(2, 4, mask="bias"),
        torchscript="none",
        **VIT,
        window_block_indices=[0],
        window_size=3,
        use_relative_position_embeddings=True,
        eager=False,
    ),
    image("SwiftFormer", Expect(0, 4, named=("rank",)), depths=[1, 1], embed_dims=[16, 16], side=64, eager=False),
    image("Timesformer", Expect(4, 4, ffns=2, fused=True, named=("no-residual",)), frames=2, num_frames=2, **VIT),
    image("VideoMAE", Expect(2, 4), frames=4, num_frames=4, tubelet_size=2, **VIT),
    image("Vivit", Expect(2, 4), frames=4, num_frames=4, tubelet_size=[2, 8, 8], **VIT),
    image("SiglipVision", Expect(3, 4, named=("no-residual",)), output="pooler_output", **VIT),
    image("Aimv2Vision", Expect(2, 4), **VIT),
    image("Yolos", Expect(2, 4), **{**VIT, "image_size": [32, 32], "num_detection_tokens": 3}),
    image("ViTMSN", Expect(2, 4), **VIT),
)
"""Swin 2, BEiT, DINO 2 and 3, LeViT, MobileViT 1 and 2, Hiera, PVT 1 and 2, PoolFormer, ConvNeXt 2, FocalNet, SAM,
ViTDet, SwiftFormer, TimeSformer, VideoMAE, ViViT, SigLIP, AIM 2, YOLOS.
"""
