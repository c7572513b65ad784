"""Nodes that are not compiled run in onnxruntime inside the compiled model: values, sizes, types, refusals, forks."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import xopt
from tests.ir.net import Net
from tests.targets.test_refusals import branching
from xopt import cli, targets
from xopt.errors import InputError
from xopt.ir import save
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session
from xopt.targets import ops


def refuse(call: ops.Call) -> object:
    for dim in call.shape():
        if not isinstance(dim, int):
            call.require(call.dims.same(dim, 1234), "what was required before it was given up does not count")
    raise call.unsupported("it is a test")


@pytest.fixture(autouse=True)
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Sin", "NonZero", "TopK", "Clip", "Where"):
        monkeypatch.setitem(ops.OPERATORS, ("", name), refuse)
    monkeypatch.setattr("xopt.targets.ops.parameters.emitter", lambda call: None)


def compiled(model: ir.Model, folder: Path, **options: Any) -> Session:
    options = {"threads": 1, "database": False, "fallback": True, **options}
    return Session.load(xopt.compile(model, output=folder / "model.so", **options), threads=2)


def equal(model: ir.Model, session: Session, feeds: dict[str, np.ndarray]) -> None:
    wanted, found = ReferenceSession(model).run(feeds), session.run(feeds)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name].astype(np.float64), array.astype(np.float64), rtol=1e-3, atol=1e-5)


def sine(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    net = Net("sine")
    x = net.input("x", ["batch", "length", 4], dtype)
    net.output(net.op("Add", net.op("Sin", net.op("Tanh", x), name="here"), x), "y")
    return net.build()


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16])
def test_values_between_compiled_ones(dtype: ir.DataType, tmp_path: Path) -> None:
    session = compiled(sine(dtype), tmp_path)
    assert list(session.manifest.segments.values()) == ["Sin (here)"]
    random = np.random.default_rng(0)
    for batch, length in ((1, 1), (3, 5)):
        x = random.standard_normal((batch, length, 4)).astype(dtype.numpy())
        exact = np.sin(np.tanh(x.astype(np.float64))) + x.astype(np.float64)
        tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype.numpy().name, 1e-5)
        np.testing.assert_allclose(session.run({"x": x})["y"].astype(np.float64), exact, atol=tolerance * 3)


def test_constants_optional_inputs_and_several_outputs(tmp_path: Path) -> None:
    net = Net("parts")
    x = net.input("x", ["n", 6])
    values, indices = net.op("TopK", net.op("Neg", x), net.ints(2), n=2)
    least = net.constant("least", np.array(-0.5, np.float32))
    bounded = net.op("Clip", values, least, None, name="low")
    net.output(net.op("Exp", bounded), "y")
    net.output(net.op("Neg", indices), "i")
    model = net.build()
    session = compiled(model, tmp_path)
    assert len(session.manifest.segments) == 2
    assert "least" not in {weight.name for weight in session.manifest.weights}
    equal(model, session, {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)})


def test_sizes_that_the_data_decide(tmp_path: Path) -> None:
    net = Net("sizes")
    x = net.input("x", ["n", 6])
    places = net.op("NonZero", net.op("Relu", x))
    net.output(net.op("Add", places, places), "twice")
    net.output(net.op("Shape", places), "size")
    model = net.build()
    session = compiled(model, tmp_path)
    for n in (1, 4):
        equal(model, session, {"x": np.random.default_rng(n).standard_normal((n, 6)).astype(np.float32)})


def test_sizes_are_read_where_only_they_are_known(tmp_path: Path) -> None:
    """A known integer is a tensor to onnxruntime."""
    net = Net("known")
    x = net.input("x", ["n", 6])
    size = net.op("Shape", x)
    chosen = net.op("Where", net.op("Greater", size, net.ints(3)), size, net.ints(3))
    net.output(net.op("Expand", net.op("ReduceSum", x, keepdims=1), chosen), "y")
    model = net.build()
    session = compiled(model, tmp_path, fallback=True)
    equal(model, session, {"x": np.ones((5, 6), np.float32)})


def test_inside_a_branch(tmp_path: Path) -> None:
    model = branching()
    session = compiled(model, tmp_path)
    assert list(session.manifest.segments.values()) == ["Sin (here)"]
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    for choice in (True, False):
        equal(model, session, {"x": x, "c": np.array(choice)})


def test_a_node_that_holds_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its branches read of the graph around it is given to the segment."""
    monkeypatch.setitem(ops.OPERATORS, ("", "If"), refuse)
    model = branching()
    session = compiled(model, tmp_path)
    [name] = session.manifest.segments.values()
    assert name.startswith("If")
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    for choice in (True, False):
        equal(model, session, {"x": x, "c": np.array(choice)})


def test_only_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Sin cannot be compiled: it is a test, node here, give --fallback"):
        compiled(sine(), tmp_path, fallback=False)


def test_not_beside_code_for_other_processors() -> None:
    with pytest.raises(InputError, match="onnxruntime does not run beside code for") as caught:
        targets.configured("cuda:sm_80", fallback=True)
    assert caught.value.code == "E-OPTION"


def test_what_onnxruntime_does_not_take_is_refused_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xopt.runtime.segments.opened", none)
    monkeypatch.setattr("xopt.targets.segments.opened", none)
    with pytest.raises(InputError, match="Sin cannot be compiled: it is a test"):
        compiled(sine(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def none(content: bytes, threads: int) -> Any:
    raise InputError("E-UNSUPPORTED-OP", "onnxruntime refuses a part of the model")


def test_a_machine_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(sine(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="a part of the model runs in onnxruntime, which is not installed") as caught:
        Session.load(tmp_path)
    assert caught.value.code == "E-TOOLCHAIN"


def test_data_that_a_segment_does_not_take(tmp_path: Path) -> None:
    net = Net("fitting")
    x, k = net.input("x", ["n"]), net.input("k", [1], ir.DataType.INT64)
    values, _ = net.op("TopK", x, k, n=2, name="here")
    net.output(net.op("Neg", values), "y")
    session = compiled(net.build(), tmp_path)
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(session.run({"x": x, "k": np.array([2])})["y"], [-3, -2])
    with pytest.raises(InputError, match=r"TopK \(here\) does not run in onnxruntime on this data") as caught:
        session.run({"x": x, "k": np.array([7])})
    assert caught.value.code == "E-DATA"
    np.testing.assert_array_equal(session.run({"x": x, "k": np.array([1])})["y"], [-3])


def _in_child(session: Session, x: np.ndarray, queue: Any) -> None:
    queue.put(session.run({"x": x})["y"])


def test_a_forked_child(tmp_path: Path) -> None:
    session = compiled(sine(), tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    expected = session.run({"x": x})["y"]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(session, x, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join(timeout=60)
    assert child.exitcode == 0


def test_an_optimization_names_its_segments(tmp_path: Path) -> None:
    save(sine(), tmp_path / "m.onnx")
    arguments = ["optimize", str(tmp_path / "m.onnx"), "--no-peers", "-o", str(tmp_path / "out"), "--fallback"]
    told = CliRunner().invoke(cli.cli, arguments)
    assert told.exit_code == 0, told.output
    assert "in onnxruntime, inside of the compiled model: Sin (here)" in told.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["segments"] == ["Sin (here)"]
    assert "inside of the compiled model: Sin (here)" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_names_them(tmp_path: Path) -> None:
    save(sine(), tmp_path / "m.onnx")
    arguments = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "--fallback"]
    assert "in onnxruntime: Sin (here)" in CliRunner().invoke(cli.cli, arguments).stderr
    told = json.loads(CliRunner().invoke(cli.cli, [*arguments, "--json"]).stdout)
    assert told["segments"] == ["Sin (here)"]
    assert told["verification"]["compared"]
