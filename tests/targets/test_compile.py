"""Whole models, compiled: equal to their reference at several sizes, on the kernels that they should use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.acceptance.command import xopt as command
from tests.ir import builders
from tests.ir.net import Net
from tests.targets.running import execute, kernel_names
from xopt import targets
from xopt.errors import InputError
from xopt.ir import bind_dims, export, save
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets import schedule
from xopt.targets.lowering import lower

SIZES = ({"batch": 2, "seq": 9}, {"batch": 1, "seq": 3}, {"batch": 3, "seq": 17})
QUICK = ("vit-fused", "bert", "llama-qk-norm", "gpt-parallel", "table", "swin", "cross")


def expect_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Two layers of float32 sums in another order; values are of order 1 behind the last norm.
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in builders.ZOO])
def test_model_equals_its_reference(name: str, tmp_path: Path) -> None:
    model = builders.ZOO[name]()
    session = Session.load(targets.compile(model, "cpu", tmp_path / "model.so"))
    expected = ReferenceSession(model)
    for seed, dims in enumerate(SIZES):
        feeds = builders.feeds(model, dims, seed)
        expect_equal(session.run(feeds), expected.run(feeds))


def test_narrower_vectors_give_the_same(tmp_path: Path) -> None:
    model = builders.llama(layers=1)
    session = Session.load(targets.compile(model, "cpu:avx2", tmp_path / "model.so"))
    feeds = builders.feeds(model)
    expect_equal(session.run(feeds), ReferenceSession(model).run(feeds))


def vit_kernels() -> list[str]:
    model = builders.vit(layers=12, width=384, heads=6, image=224, patch=16, classes=1000, fused=True)
    return kernel_names(lower(bind_dims(model, {"batch": 1}), targets.get("cpu")))


def test_vision_transformer_runs_on_the_kernels_alone() -> None:
    names = vit_kernels()
    ours = [name for name in names if name.startswith(("gemm_", "attention_", "layer_norm_"))]
    # 12 blocks of two norms, attention and four linear layers; patches, last norm and head; what else there is
    # cuts the image, joins the class token and the positions, and takes the class token out.
    assert len(ours) == 12 * 7 + 3
    assert len(names) - len(ours) <= 3
    assert sum("residual" in name for name in names) == 24
    assert sum("gelu" in name for name in names) == 12


def net_model(residual_rows: int) -> ir.Model:
    """y = x W + r where r has as many rows as x, or one."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["b", 5, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    r = ir.Value(name="r", shape=ir.Shape(["b", residual_rows, 12]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(random.standard_normal((8, 12)).astype(np.float32)))
    product = ir.node("MatMul", [x, w])
    active = ir.node("Relu", product.outputs)
    total = ir.node("Add", [r, active.outputs[0]])
    total.outputs[0].name = "y"
    for node in (product, active, total):
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x, r], total.outputs, nodes=[product, active, total], initializers=[w], opset_imports={"": 24})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("rows", [5, 1])
def test_residual_is_fused_when_its_shape_fits(rows: int) -> None:
    model = net_model(rows)
    random = np.random.default_rng(1)
    feeds = {"x": random.standard_normal((2, 5, 8)), "r": random.standard_normal((2, rows, 12))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    expected = np.maximum(feeds["x"] @ weight.numpy(), 0) + feeds["r"]
    lowered = lower(model, targets.get("cpu"))
    names = kernel_names(lowered)
    assert ("residual" in names[0]) == (rows == 5)
    assert "relu" in names[0]
    np.testing.assert_allclose(execute(lowered, feeds)[0], expected, rtol=1e-5, atol=1e-5)


def test_shared_weights_are_stored_once() -> None:
    model = builders.bert(layers=1)
    lowered = lower(model, targets.get("cpu"))
    stored = sum(array.nbytes for _, array in lowered.weights)
    written = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    # Packing pads rows of 32 to panels; nothing is stored twice.
    assert stored <= 1.6 * written


def test_model_is_left_as_it_was() -> None:
    model = builders.gpt(layers=1)
    before = ir.to_proto(model).SerializeToString()
    lower(model, targets.get("cpu"))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("name", ["tpu", "cpu:avx9", "arm:z80", "cuda:big"])
def test_unknown_target_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        targets.get(name)
    assert caught.value.code == "E-TARGET"


def test_a_width_that_is_not_fixed_is_named(tmp_path: Path) -> None:
    """Whoever traced the model with two samples wrote the width as half of what a run has."""
    net = Net("half")
    flat = net.op("Reshape", net.input("x", ["batch", 16, 4]), net.ints(2, 16, -1))
    net.output(net.op("MatMul", flat, net.weight("w", 4, 8)), "y")
    with pytest.raises(InputError, match=r"E-UNSUPPORTED-OP.*a fixed width.*'w'.*--dim"):
        targets.compile(net.build(), "cpu", tmp_path / "model.so")


def test_unwritable_output_leaves_nothing(tmp_path: Path) -> None:
    model = builders.vit(layers=1, width=16, heads=2)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        targets.compile(model, "cpu", tmp_path / "file" / "model.so")
    assert caught.value.code == "E-OUTPUT"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_linker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xopt.targets.base.Target.linker", "no-such-linker")
    with pytest.raises(InputError, match="no-such-linker") as caught:
        targets.compile(builders.vit(layers=1, width=16, heads=2), "cpu", tmp_path / "model.so")
    assert caught.value.code == "E-TOOLCHAIN"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_ends_a_process_is_itself_when_it_comes_from_below_tvm(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise kind

    monkeypatch.setattr(schedule, "schedule_leftovers", interrupted)
    with pytest.raises(kind):
        targets.compile(builders.vit(layers=1), "cpu", tmp_path / "model.so")
    assert list(tmp_path.iterdir()) == []


def test_compiling_a_file_does_without_torch(tmp_path: Path) -> None:
    """Which takes seconds to import, and 200 MB."""
    save(export(builders.bert(layers=1)), tmp_path / "model.onnx")
    code = (
        "import sys, xopt; xopt.compile(sys.argv[1], output=sys.argv[2], verify=False); "
        "print([name for name in ('torch', 'onnxruntime', 'transformers') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.onnx"), str(tmp_path / "model.so")]
    assert subprocess.run(arguments, check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.slow
def test_the_same_model_gives_the_same_library_in_every_process(tmp_path: Path) -> None:
    """The compiler's hash tables are keyed by addresses, which differ from process to process."""
    save(builders.vit(layers=1), tmp_path / "m.onnx")
    seen = set()
    for index in range(5):
        library = tmp_path / ("long name" * index) / "model.so"
        done = command("compile", tmp_path / "m.onnx", "-o", library, env={"PYTHONHASHSEED": str(index)})
        assert done.status == 0, done.err
        seen.add(tuple(path.read_bytes() for path in sorted(library.parent.glob("m*.*")) if path.suffix != ".onnx"))
    assert len(seen) == 1
