"""Detection, segmentation, poses, depth and super-resolution: backbones with decoders, of transformers."""

from __future__ import annotations

from .entry import Entry, Expect
from .hf import PYRAMID, VIT, image

EAGER = ("eager",)
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage1", "stage2"]}
DETECTOR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 5,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def _backbone(config: str, **options: object) -> dict[str, object]:
    import transformers

    return {"backbone_config": getattr(transformers, config)(**options)}


ENTRIES: tuple[Entry, ...] = (
    image(
        "Segformer",
        Expect(2, (1, 2), ffns=0),
        model="SegformerForSemanticSegmentation",
        output="logits",
        side=64,
        **PYRAMID,
        decoder_hidden_size=16,
        num_labels=5,
    ),
    image(
        "Detr",
        Expect(5, 4, ffns=3, mask=("bias", "none", "bias", "none", "bias")),
        output="logits",
        model="DetrForObjectDetection",
        side=64,
        attentions=EAGER,
        **_backbone("ResNetConfig", **RESNET),
        **DETECTOR,
    ),
    image(
        "DeformableDetr",
        Expect(2, 4, ffns=3),
        attentions=EAGER,
        model="DeformableDetrForObjectDetection",
        output="logits",
        side=64,
        **_backbone("ResNetConfig", **RESNET),
        **DETECTOR,
        num_feature_levels=2,
        encoder_n_points=2,
        decoder_n_points=2,
        disable_custom_kernels=True,
    ),
    image(
        "Mask2Former",
        Expect(8, (2, 2, 2, 2, 4, 4, 4, 4), ffns=7, mask=("bias",) * 4 + ("bias", "none") * 2, named=("no-residual",)),
        attentions=EAGER,
        output="transformer_decoder_last_hidden_state",
        side=64,
        **_backbone("SwinConfig", **SWIN),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=5,
        num_labels=5,
    ),
    image(
        "UperNet",
        Expect(4, 2, mask="bias"),
        attentions=EAGER,
        model="UperNetForSemanticSegmentation",
        torchscript="none",
        output="logits",
        side=64,
        **_backbone("SwinConfig", **SWIN),
        hidden_size=16,
        pool_scales=[1, 2],
        num_labels=5,
        use_auxiliary_head=False,
    ),
    image(
        "VitPose",
        Expect(2, 4),
        attentions=EAGER,
        model="VitPoseForPoseEstimation",
        output="heatmaps",
        side=32,
        **_backbone(
            "VitPoseBackboneConfig",
            image_size=[32, 32],
            patch_size=[8, 8],
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            out_indices=[2],
        ),
        num_labels=5,
        scale_factor=4,
        use_simple_decoder=True,
    ),
    image(
        "Cvt",
        Expect(6, (1, 2, 2, 2, 2, 2)),
        side=64,
        patch_sizes=[7, 3, 3],
        patch_stride=[4, 2, 2],
        patch_padding=[2, 1, 1],
        embed_dim=[16, 32, 32],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        drop_path_rate=[0.0, 0.0, 0.0],
        mlp_ratio=[2.0, 2.0, 2.0],
        attentions=EAGER,
    ),
    image(
        "DPT",
        Expect(4, 4),
        model="DPTForDepthEstimation",
        output="predicted_depth",
        **{**VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
    ),
    image(
        "Swin2SR",
        Expect(2, 2, mask="bias", scale=1.0, named=("no-projection-q", "no-projection-k")),
        attentions=EAGER,
        model="Swin2SRForImageSuperResolution",
        output="reconstruction",
        side=16,
        image_size=16,
        patch_size=1,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=4,
        upscale=2,
        upsampler="pixelshuffle",
    ),
    image(
        "GLPN",
        Expect(2, (1, 2), ffns=0),
        attentions=EAGER,
        side=64,
        **PYRAMID,
    ),
)
"""SegFormer, DETR, deformable DETR, Mask2Former, UPerNet, ViTPose, CvT, DPT, Swin2SR, GLPN."""
