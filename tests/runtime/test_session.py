"""Loading and running artifacts: checks against manifest and CPU, inputs refused or read in place, light imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.net import Net
from tests.targets.running import node_model
from xopt import targets
from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.runtime.manifest import digest, manifest_path, weights_path
from xopt.runtime.session import Session

IDS = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}


def aligned(array: np.ndarray) -> np.ndarray:
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    result = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(manifest_path(path).read_text())
    edit(content)
    manifest_path(path).write_text(json.dumps(content))


def test_manifest_describes_the_artifact(artifact: Path) -> None:
    session = Session.load(artifact)
    manifest = session.manifest
    assert manifest.target == "cpu:avx2"
    assert "fma" in manifest.features
    assert [(info.name, info.dtype, info.shape) for info in session.inputs] == [
        ("input_ids", "int64", ("batch", "seq")),
        ("attention_mask", "int64", ("batch", "seq")),
    ]
    assert session.outputs[0].shape == ("batch", "seq", 16)
    assert manifest.digests == {file.name: digest(file) for file in (artifact, weights_path(artifact))}
    assert all(weight.offset % 64 == 0 for weight in manifest.weights)
    assert manifest.limits == {"seq": 64}


def test_folder_loads_too(artifact: Path) -> None:
    assert Session.load(artifact.parent).run(IDS)["last_hidden_state"].shape == (1, 3, 16)


@pytest.mark.parametrize("which", [0, 1])
def test_changed_file_is_refused(copy: Path, which: int) -> None:
    file = (copy, weights_path(copy))[which]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name} is not the file") as caught:
        Session.load(copy)
    assert caught.value.code == "E-ARTIFACT"


@pytest.mark.parametrize("which", [weights_path, manifest_path])
def test_missing_file_is_refused(copy: Path, which: Callable[[Path], Path]) -> None:
    which(copy).unlink()
    with pytest.raises(InputError, match="missing") as caught:
        Session.load(copy)
    assert caught.value.code == "E-ARTIFACT"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "inputs": 3}'])
def test_bad_manifest_is_refused(copy: Path, text: str) -> None:
    manifest_path(copy).write_text(text)
    with pytest.raises(InputError) as caught:
        Session.load(copy)
    assert caught.value.code == "E-ARTIFACT"


def test_weights_outside_the_file_are_refused(copy: Path) -> None:
    change(copy, lambda content: content["weights"][0].update(offset=1 << 40))
    with pytest.raises(InputError, match="the manifest describes more") as caught:
        Session.load(copy)
    assert caught.value.code == "E-ARTIFACT"


def test_weights_that_overrun_their_bytes_are_refused(copy: Path) -> None:
    change(copy, lambda content: content["weights"][-1].update(shape=[1 << 30]))
    with pytest.raises(InputError) as caught:
        Session.load(copy)
    assert caught.value.code == "E-ARTIFACT"


def test_code_for_another_cpu_is_refused(copy: Path) -> None:
    change(copy, lambda content: content["features"].append("avx4096"))
    with pytest.raises(InputError, match="avx4096") as caught:
        Session.load(copy)
    assert caught.value.code == "E-CPU"


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"input_ids": IDS["input_ids"]}, "attention_mask is missing"),
        (IDS | {"more": IDS["input_ids"]}, "no input more"),
        (IDS | {"input_ids": np.ones((1, 3), np.int32)}, "dtype int32"),
        (IDS | {"input_ids": np.ones(3, np.int64)}, "rank 1"),
        (IDS | {"input_ids": np.ones((1, 4), np.int64)}, "shape"),
        (IDS | {"input_ids": np.ones((1, 0), np.int64)}, "empty"),
        (IDS | {"input_ids": np.array([[1, 2, 97]])}, "outside"),
        ({name: np.ones((1, 65), np.int64) for name in IDS}, "seq is 65"),
        (IDS | {"input_ids": [[1, 2, "x"]]}, "dtype"),
    ],
)
def test_data_that_does_not_fit_is_refused(artifact: Path, feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Session.load(artifact).run(feeds)
    assert caught.value.code == "E-DATA"


AXES = (
    "seq.len",
    "a.b",
    "a_b",
    "2*seq",
    "past + 1",
    "class",
    "7",
    "int64",
    "?",
    "x0_0",
    "",
    "\u00e9",
    "e\u0301",
    "n" * 3000,
)
"""Names that TVM or Python would change, take for others or for something else, and one that is missing."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``y3 = table3[:size of the axis of x3]`` for each of ``AXES``; table i has 4 + i rows."""
    net = Net("tables")
    for index, axis in enumerate(AXES):
        x = net.input(f"x{index}", [axis])
        length = net.op("Squeeze", net.op("Shape", x), net.ints(0))
        places = net.op("Range", net.scalar(0), length, net.scalar(1))
        net.output(net.op("Gather", net.weight(f"table{index}", 4 + index, 2), places), f"y{index}")
    return targets.compile(net.build(), "cpu", tmp_path_factory.mktemp("tables") / "model.so")


def test_axes_are_told_apart_whatever_they_are_called(tables: Path) -> None:
    session = Session.load(tables)
    called = [info.shape[0] for info in session.inputs]
    assert called == [axis or f"x{index}_0" for index, axis in enumerate(AXES)]
    assert session.manifest.limits == {name: 4 + index for index, name in enumerate(called)}
    assert [info.shape[0] for info in session.outputs] == called
    outputs = session.run({info.name: np.ones(4 + index, np.float32) for index, info in enumerate(session.inputs)})
    assert [outputs[f"y{index}"].shape for index in range(len(AXES))] == [(4 + index, 2) for index in range(len(AXES))]


@pytest.mark.parametrize("index", range(len(AXES)), ids=lambda index: ascii(AXES[index][:8]))
def test_more_than_a_table_holds_is_refused_whatever_the_axis_is_called(tables: Path, index: int) -> None:
    session = Session.load(tables)
    feeds = {info.name: np.ones(4, np.float32) for info in session.inputs}
    with pytest.raises(InputError, match=f"is {5 + index}, give at most {4 + index}") as caught:
        session.run(feeds | {f"x{index}": np.ones(5 + index, np.float32)})
    assert caught.value.code == "E-DATA"


def test_alignment_and_strides_do_not_matter(artifact: Path) -> None:
    session = Session.load(artifact)
    expected = session.run({name: aligned(value) for name, value in IDS.items()})["last_hidden_state"]
    wide = np.repeat(IDS["input_ids"], 2, axis=1)
    shifted = np.frombuffer(b"\0" * 8 + IDS["attention_mask"].tobytes(), np.int64, 3, 8).reshape(1, 3)
    result = session.run({"input_ids": wide[:, ::2], "attention_mask": shifted})["last_hidden_state"]
    np.testing.assert_array_equal(result, expected)


def test_outputs_are_the_caller_s(artifact: Path) -> None:
    session = Session.load(artifact)
    first = session.run(IDS)["last_hidden_state"]
    kept = first.copy()
    session.run(IDS | {"input_ids": np.array([[9, 8, 7]])})
    np.testing.assert_array_equal(first, kept)


def test_torch_in_torch_out(artifact: Path) -> None:
    torch = pytest.importorskip("torch")
    session = Session.load(artifact)
    result = session.run({name: torch.from_numpy(value) for name, value in IDS.items()})["last_hidden_state"]
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), session.run(IDS)["last_hidden_state"])


def test_aligned_input_is_read_in_place(artifact: Path) -> None:
    from xopt.runtime import session as module

    array = aligned(IDS["input_ids"])
    tensor = module._aligned(array)
    array[0, 0] = 42
    assert np.from_dlpack(tensor)[0, 0] == 42


def test_replaced_artifact_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    results = []
    for seed in range(2):
        model = builders.vit(layers=1, width=16, heads=2, seed=seed)
        session = Session.load(targets.compile(model, "cpu:avx2", path, dims={"batch": 1}))
        results.append(session.run(builders.feeds(model, {"batch": 1}))["logits"])
    assert not np.allclose(*results)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".xopt")]


def test_running_imports_only_the_runtime(artifact: Path, tmp_path: Path) -> None:
    """Sorting is in a library of its own, so the model that is run sorts."""
    model = node_model("TopK", {"x": ["b", 40], "k": np.array([3])}, outputs=2)
    model.graph.outputs[1].dtype = ir.DataType.INT64
    path = targets.compile(model, "cpu:avx2", tmp_path / "top.so")
    script = f"""
import sys, numpy as np
from xopt.runtime.session import Session
Session.load({str(artifact)!r}, threads=2)
assert Session.load({str(path)!r}).run({{"x": np.ones((2, 40), np.float32)}})["y0"].shape == (2, 3)
print(sorted({{"tvm", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_index_outside_ends_the_run_and_leaves_the_session_usable(tmp_path: Path) -> None:
    model = node_model("GatherElements", {"x": ["b", 4], "i": ["c", 3]}, dtypes={"i": ir.DataType.INT64}, axis=0)
    session = Session.load(targets.compile(model, "cpu:avx2", tmp_path / "model.so"), threads=2)
    x, indices = np.arange(8, dtype=np.float32).reshape(2, 4), np.array([[0, -2, 1], [-1, 1, 0]])
    for wrong in (2, -3, 2**62, -(2**63)):
        with pytest.raises(InputError, match=r"E-DATA.*GatherElements \(tested\): an index is outside of the b"):
            session.run({"x": x, "i": np.full((2, 3), wrong)})
        np.testing.assert_array_equal(session.run({"x": x, "i": indices})["y0"], [[0, 1, 6], [4, 5, 2]])


def test_sizes_that_do_not_fit_end_the_run(tmp_path: Path) -> None:
    session = Session.load(
        targets.compile(
            node_model("Reshape", {"x": ["b", 6], "s": np.array([4, -1])}), "cpu:avx2", tmp_path / "model.so"
        )
    )
    with pytest.raises(InputError, match=r"E-DATA.*Reshape \(tested\): its result would have another number"):
        session.run({"x": np.zeros((1, 6), np.float32)})
    assert session.run({"x": np.zeros((2, 6), np.float32)})["y0"].shape == (4, 3)
    model = node_model("Add", {"x": ["b", 6], "y": ["c", 6]})
    session = Session.load(targets.compile(model, "cpu:avx2", tmp_path / "model.so"))
    with pytest.raises(InputError, match=r"E-DATA.*Add \(tested\): two sizes differ"):
        session.run({"x": np.zeros((2, 6), np.float32), "y": np.zeros((3, 6), np.float32)})


PAST = """<ir_version: 10, opset_import: ["": 20]>
g (float[b, s, 4] x, float[b, p, 4] past, float[0, 4] none) => (y, k, n) {
    k = Concat <axis: int = 1> (past, x)
    t = Transpose <perm: ints = [0, 2, 1]> (k)
    scores = MatMul (x, t)
    weights = Softmax <axis: int = -1> (scores)
    y = MatMul (weights, k)
    axes = Constant <value_ints: ints = [0]> ()
    n = ReduceSum <keepdims: int = 0> (none, axes)
}"""


def test_what_may_be_empty_and_what_may_not(tmp_path: Path) -> None:
    model = ir.from_proto(onnx.parser.parse_model(PAST))
    canonicalize(model)
    session = Session.load(targets.compile(model, "cpu", tmp_path / "model.so"))
    assert session.manifest.empty == ("p",)
    random = np.random.default_rng(0)
    for batch, length, past in ((1, 3, 0), (2, 1, 2), (2, 1, 0)):
        x, before = (random.standard_normal((batch, n, 4)).astype(np.float32) for n in (length, past))
        results = session.run({"x": x, "past": before, "none": np.empty((0, 4), np.float32)})
        keys = np.concatenate([before, x], 1)
        scores = np.exp(x @ keys.swapaxes(1, 2))
        np.testing.assert_allclose(results["y"], scores / scores.sum(-1, keepdims=True) @ keys, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(results["k"], keys)
        np.testing.assert_array_equal(results["n"], np.zeros(4, np.float32))
    with pytest.raises(InputError, match="input x is empty"):
        session.run({"x": x[:, :0], "past": before, "none": np.empty((0, 4), np.float32)})
