"""The seven models that are mutated: exported once by their own exporters, then read from a folder that git ignores."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "fuzz" / "seeds"
MODEL, DATA = "model.onnx", "weights.bin"


@dataclass(frozen=True)
class Seed:
    """A model file, and the file of its external data (empty where it has none)."""

    name: str
    model: bytes
    data: bytes = b""

    @functools.cached_property
    def typed(self) -> onnx.ModelProto:
        """The model with the types of all values, as far as ONNX can infer them."""
        model = onnx.load_from_string(self.model)
        del model.graph.value_info[:]
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """All seeds, in the order that indices of cases count them."""
    return tuple(_cached(name) for name in BUILDERS)


def _cached(name: str) -> Seed:
    folder = FOLDER / name
    if not (folder / MODEL).is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            _in_process(name, Path(temporary) / MODEL)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(temporary, folder)
    data = folder / DATA
    return Seed(name, (folder / MODEL).read_bytes(), data.read_bytes() if data.is_file() else b"")


def _in_process(name: str, path: Path) -> None:
    """Build a seed in a process of its own: exporters leave threads behind, and who forks must have none."""
    script = "import sys; sys.path[:] = eval(sys.argv[1]); from tests.fuzz import seeds; seeds.build(*sys.argv[2:])"
    subprocess.run([sys.executable, "-c", script, repr([*sys.path, str(ROOT)]), name, str(path)], check=True)


def build(name: str, path: str) -> None:
    """Write the seed of that name."""
    BUILDERS[name](Path(path))


def digits(path: Path) -> None:
    """A trained ViT, of dynamo's exporter: a patch convolution, LayerNorm, GELU, fused attention."""
    shutil.copy(ROOT / "examples" / "digits" / "digits_vit.onnx", path)


def bert(path: Path) -> None:
    """One layer of BERT with a padding mask, by dynamo's exporter."""
    from tests.zoo import hf
    from tests.zoo.exporting import Way, exported

    options = {**hf.TOKENS, **hf.BERT, "num_hidden_layers": 1}
    entry = hf.text("BertModel", "BertConfig", hf.Expect(1, 4, mask="padding"), **options)
    path.write_bytes(exported(entry, Way("dynamo", 20, "eager")))


def decoder(path: Path) -> None:
    """One decoder layer with a key-value cache, rotary embedding, grouped queries and SwiGLU, by TorchScript."""
    import torch

    from tests.fuzz.decoder import Decoder

    torch.manual_seed(0)
    feeds = (torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))
    names = ["input_ids", "past_key", "past_value"]
    axes = {"input_ids": {0: "batch", 1: "seq"}, "past_key": {0: "batch", 2: "past"}}
    axes["past_value"] = axes["past_key"]
    torch.onnx.export(
        Decoder().eval(), feeds, str(path), dynamo=False, opset_version=17, input_names=names,
        output_names=["logits", "key", "value"], dynamic_axes=axes,
    )  # fmt: skip


def quantized(path: Path) -> None:
    """A padded attention block in 8 bits, as onnxruntime's own quantizer writes it (QDQ)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from tests.zoo import own
    from tests.zoo.exporting import Way, exported

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            random = np.random.default_rng(0)
            mask = np.array([[1] * 7, [1] * 5 + [0] * 2])
            self.feeds = iter(
                {"x": random.standard_normal((2, 7, own.WIDTH)).astype(np.float32), "extra": mask} for _ in range(4)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    entry = next(entry for entry in own.ENTRIES if entry.name == "padded_additive")
    plain = path.with_name("plain.onnx")
    plain.write_bytes(exported(entry, Way("torchscript", 17, "")))
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(plain, path, Samples(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    plain.unlink()


def external(path: Path) -> None:
    """One layer of GPT-2 (a causal and a padding mask, fused projections) with its weights in a second file."""
    from tests.zoo import hf
    from tests.zoo.exporting import Way, exported

    options = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    expect = hf.Expect(1, 4, causal=True, mask="padding", fused=True)
    entry = hf.text("GPT2LMHeadModel", "GPT2Config", expect, "logits", use_cache=False, **options)
    model = onnx.load_from_string(exported(entry, Way("dynamo", 18, "sdpa")))
    onnx.save_model(model, path, save_as_external_data=True, location=DATA, size_threshold=64)


def mixed(path: Path) -> None:
    """Local functions, a convolution, gathers and scatters, written by hand."""
    from tests.fuzz.mixed import model

    path.write_bytes(model().SerializeToString())


def branches(path: Path) -> None:
    """The same with an If whose branches capture."""
    from tests.fuzz.mixed import model

    path.write_bytes(model(control_flow=True).SerializeToString())


BUILDERS: dict[str, Callable[[Path], None]] = {
    builder.__name__: builder for builder in (digits, bert, decoder, quantized, external, mixed, branches)
}
