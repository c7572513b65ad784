"""Modules become the graphs that their ONNX exports become."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from xopt.errors import InputError
from xopt.ir import canonicalize, load, save, trace
from xopt.runtime.reference import ReferenceSession


class Layer(torch.nn.Module):
    """Self-attention, dropout and a feed-forward layer over [batch, sequence, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.drop = torch.nn.Dropout(0.5)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        keep = mask[:, None, None].bool() if mask is not None else None
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.down(torch.nn.functional.gelu(self.up(x))), x.mean(1)


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


def dims(model, index: int = 0) -> list[str]:
    return [str(dim) for dim in model.graph.inputs[index].shape]


def test_dynamic_dimensions_and_values(layer: Layer) -> None:
    """Traced with one sample of 5 tokens, run with 3 of 9; the example need not be larger than one sample."""
    model = trace(layer, (torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.int64)), output_names=["y", "mean"])
    assert dims(model) == ["batch", "sequence", "16"]
    assert dims(model, 1) == ["batch", "sequence"]
    canonicalize(model)
    x, mask = torch.randn(3, 9, 16), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    got = ReferenceSession(model).run({"x": x.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        want = layer.eval()(x, mask)
    for name, array in zip(("y", "mean"), want):
        np.testing.assert_allclose(got[name], array.numpy(), rtol=1e-4, atol=1e-5)


def test_keyword_inputs_and_left_out_arguments(layer: Layer) -> None:
    by_name = trace(layer, {"x": torch.randn(2, 5, 16)})
    by_place = trace(layer, (torch.randn(2, 5, 16), None), input_names=["tokens"])
    assert [value.name for value in by_name.graph.inputs] == ["x"]
    assert [value.name for value in by_place.graph.inputs] == ["tokens"]
    assert [n.op_type for n in by_name.graph] == [n.op_type for n in by_place.graph]


def test_static(layer: Layer) -> None:
    model = trace(layer, (torch.randn(1, 5, 16),), dynamic=False)
    assert dims(model) == ["1", "5", "16"]


def test_sequence_that_the_module_fixes_stays_fixed() -> None:
    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.nn.Parameter(torch.randn(5, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.positions

    assert dims(trace(Positions(), (torch.randn(2, 5, 16),))) == ["batch", "5", "16"]


def test_two_sequences_get_two_names() -> None:
    class Cross(torch.nn.Module):
        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x @ memory.transpose(1, 2), -1) @ memory

    model = trace(Cross(), (torch.randn(2, 5, 8), torch.randn(2, 7, 8)))
    assert dims(model) == ["batch", "sequence", "8"]
    assert dims(model, 1) == ["batch", "sequence_1", "8"]


def test_variadic_forward(layer: Layer) -> None:
    class Variadic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return self.layer(*args)[0]

    x, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.int64)
    model = trace(Variadic(), (x, mask), input_names=["x", "mask"])
    assert dims(model) == ["batch", "sequence", "16"]
    assert dims(model, 1) == ["batch", "sequence"]


def test_module_is_left_as_it_was(layer: Layer, capfd: pytest.CaptureFixture[str]) -> None:
    layer.train()
    layer.norm.eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model = trace(layer, (torch.randn(2, 5, 16),))
    assert layer.training
    assert layer.drop.training
    assert not layer.norm.training
    assert capfd.readouterr() == ("", "")
    want = ReferenceSession(model).run({"x": np.ones((1, 2, 16), np.float32)})
    with torch.no_grad():
        layer.up.weight.zero_()
    got = ReferenceSession(model).run({"x": np.ones((1, 2, 16), np.float32)})
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
    assert not torch.equal(layer.up.weight, before["up.weight"])


def test_output_name_that_the_graph_uses_already(layer: Layer) -> None:
    inner = next(node.outputs[0].name for node in trace(layer, (torch.randn(2, 5, 16),)).graph)
    model = trace(layer, (torch.randn(2, 5, 16),), output_names=[inner, "mean"])
    assert [value.name for value in model.graph.outputs] == [inner, "mean"]
    assert "mean" in ReferenceSession(model).run({"x": np.ones((1, 2, 16), np.float32)})


def test_control_flow_on_data_is_refused() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match="E-TRACE") as caught:
        trace(Branch(), (torch.ones(2, 3),))
    assert "\n" not in str(caught.value)


def test_bad_weights_and_names_are_refused(layer: Layer) -> None:
    with pytest.raises(InputError, match="E-OPTION"):
        trace(layer, (torch.randn(2, 5, 16),), output_names=["one"])
    with torch.no_grad():
        layer.up.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="E-NAN-WEIGHTS"):
        trace(layer, (torch.randn(2, 5, 16),))


class Sentence(torch.nn.Module):
    """MiniLM with mean pooling and normalization, as sentence-transformers runs it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        with contextlib.redirect_stderr(io.StringIO()):
            self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


@pytest.mark.slow
def test_minilm_equals_its_onnx_export(minilm_folder: Path, tmp_path: Path) -> None:
    module = Sentence(minilm_folder).eval()
    example = torch.randint(0, 30000, (2, 16)), torch.ones(2, 16, dtype=torch.int64)
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["sentence"]}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            module, example, tmp_path / "m.onnx", dynamic_shapes=({0: batch, 1: sequence},) * 2, verbose=False, **names
        )
    exported, traced = load(tmp_path / "m.onnx"), trace(module, example, **names)
    for model in (exported, traced):
        canonicalize(model)
    found = [Counter(n.op_type for n in model.graph if n.op_type != "Where") for model in (traced, exported)]
    assert found[0] == found[1]  # hidden keys are a boolean mask in the one, what is added in the other
    save(traced, tmp_path / "traced.onnx")

    random = np.random.default_rng(0)
    feeds = {"input_ids": random.integers(0, 30000, (3, 24)), "attention_mask": np.ones((3, 24), np.int64)}
    feeds["attention_mask"][1, 10:] = 0
    results = [ReferenceSession(m).run(feeds)["sentence"] for m in (exported, traced, load(tmp_path / "traced.onnx"))]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    with torch.no_grad():
        want = module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
    np.testing.assert_allclose(results[0], want, atol=1e-6)  # 2**-23 of a unit vector's entries, six layers deep


class Hidden(torch.nn.Module):
    def forward(self, x: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, shown)


def test_a_query_without_keys_gets_what_torch_gives_it() -> None:
    """Zeros, though torch's own exporter writes the mean of all values."""
    x, shown = torch.randn(2, 2, 3, 4), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    shown[1] = False
    want = Hidden()(x, shown)
    assert not want[1].any() and want[0].any()
    model = trace(Hidden(), (x, shown), dynamic=False)
    for _ in range(2):
        (got,) = ReferenceSession(model).run({"x": x.numpy(), "shown": shown.numpy()}).values()
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)
        canonicalize(model)
