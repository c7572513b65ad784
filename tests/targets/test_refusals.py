"""What cannot be compiled is refused in one line that names the node, and nothing else reaches the terminal."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tvm import relax, tirx

from tests.ir.net import Net
from xopt import targets
from xopt.errors import InputError
from xopt.runtime.manifest import manifest_path
from xopt.targets import lowering, ops
from xopt.targets.culprits import culprit


def compiled(model: ir.Model, folder: Path) -> str:
    """What the refusal says."""
    with pytest.raises(InputError) as caught:
        targets.compile(model, targets.get("cpu"), folder / "model.so")
    assert caught.value.code == "E-UNSUPPORTED-OP"
    assert list(folder.iterdir()) == []
    return str(caught.value)


def plain() -> ir.Model:
    net = Net("plain")
    x = net.input("x", ["n", 4])
    net.output(net.op("Tanh", net.op("Sin", x, name="here")), "y")
    return net.build()


def branching() -> ir.Model:
    """Its node that is refused is inside a branch inside a branch."""

    def graph(name: str, *nodes: ir.Node) -> ir.Graph:
        nodes[-1].outputs[0].name = f"{name}_out"
        nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), x.shape
        return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=name)

    def choice(inner: ir.Node, name: str) -> ir.Node:
        branches = {"then_branch": graph(f"{name}_then", inner), "else_branch": graph(f"{name}_else", node("Neg", x))}
        return ir.Node("", "If", [condition], [ir.AttrGraph(k, g) for k, g in branches.items()], num_outputs=1)

    def node(op: str, *inputs: ir.Value, name: str | None = None) -> ir.Node:
        return ir.Node("", op, inputs, num_outputs=1, name=name)

    net = Net("branching")
    x, condition = net.input("x", [2, 4]), net.input("c", [], ir.DataType.BOOL)
    outer = choice(choice(node("Sin", x, name="here"), "inner"), "outer")
    net.nodes.append(outer)
    outer.outputs[0].name = "chosen"
    outer.outputs[0].type, outer.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    net.output(net.op("Tanh", outer.outputs[0]), "y")
    return net.build()


@pytest.mark.parametrize("model", [plain, branching])
@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError, AssertionError, RecursionError])
def test_whatever_an_emitter_raises_is_a_refusal(
    model: object, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fails(call: ops.Call) -> object:
        call.emit(relax.op.negative(call.x()))  # something has been built already
        raise error("no such thing\n  %dump = of code")

    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), fails)
    said = compiled(model(), tmp_path)  # type: ignore[operator]
    assert "Sin cannot be compiled: no such thing, node here" in said
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_an_emitter_out_of_memory_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: ops.Call) -> object:
        raise MemoryError

    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), fails)
    with pytest.raises(MemoryError):
        targets.compile(plain(), targets.get("cpu"), tmp_path / "model.so")


@pytest.mark.parametrize("step", ["widen", "InlinePass", "plan_fusion", "check_indices", "finish"])
def test_what_fails_beside_the_emitters_is_a_refusal(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fails(*arguments: object, **named: object) -> object:
        raise ValueError("no such thing")

    place = {
        "widen": lowering,
        "InlinePass": lowering,
        "plan_fusion": ops.fusion,
        "check_indices": lowering.checks,
        "finish": lowering.Lowering,
    }[step]
    monkeypatch.setattr(place, step, fails)
    assert "the model cannot be compiled: no such thing" in compiled(plain(), tmp_path)
    gc.collect()
    assert capfd.readouterr() == ("", "")


def wrong_layout(call: ops.Call) -> relax.Var:
    """What Relax looks at as soon as the operator is there."""
    return call.emit(relax.op.permute_dims(relax.op.nn.max_pool1d(call.x(), 3, layout="NCX"), [0, 1]))


def wrong_method(call: ops.Call) -> relax.Var:
    """What only the legalization of the operator looks at."""
    image = relax.op.expand_dims(call.x(), [0, 1])
    return call.emit(relax.op.squeeze(relax.op.image.resize2d(image, (4, 4), method="none"), [0, 1]))


def wrong_intrinsic(call: ops.Call) -> relax.Var:
    """What only the code generator looks at."""
    name, shape = "tirx.no_such_thing", call.lowering.shape_of(call.x())
    return call.lowering.compute("late", shape, lambda x, *i: tirx.call_intrin("float32", name, x(*i)), call.x())


LATE = [wrong_layout, wrong_method, wrong_intrinsic]


def long() -> ir.Model:
    """Its sine is in the middle."""
    net = Net("long")
    x = net.input("x", [4, 4])
    for place in range(7):
        x = net.op("Sin", x, name="here") if place == 3 else net.op("Tanh", x)
    net.output(x, "y")
    return net.build()


@pytest.mark.parametrize("late", LATE)
def test_what_tvm_finds_out_late_names_the_node(
    late: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), late)
    said = compiled(long(), tmp_path)
    assert "Sin cannot be compiled: " in said
    assert "node here" in said
    assert not any(noise in said for noise in ("\n", "ir.Op(", "Check failed"))
    gc.collect()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("late", LATE)
def test_what_tvm_finds_out_late_runs_in_onnxruntime(
    late: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xopt.runtime.session import Session

    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), late)
    library = targets.compile(long(), targets.configured("cpu", False, 1, fallback=True), tmp_path / "model.so")
    x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(4, 4)
    want = np.sin(np.tanh(np.tanh(np.tanh(x))))
    for _ in range(3):
        want = np.tanh(want)
    session = Session.load(library, threads=1)
    np.testing.assert_allclose(session.run({"x": x})["y"], want, atol=1e-6)
    manifest = json.loads(manifest_path(library).read_text())
    assert list(manifest["segments"].values()) == ["Sin (here)"]


def test_the_node_is_found_by_halving() -> None:
    """In a graph with a branch whose inside reads what is computed before."""
    model = branching()
    names = [node.name for node in model.graph]
    for wanted in names:
        asked: list[int] = []

        def fails(part: ir.Model, wanted: str | None = wanted, asked: list[int] = asked) -> bool:
            asked.append(len(part.graph))
            assert part.graph.outputs
            return wanted in [node.name for node in part.graph]

        assert culprit(model, fails).name == wanted
        assert len(asked) <= len(names).bit_length()
    assert [node.name for node in model.graph] == names


def test_the_state_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal other models compile."""

    def fails(call: ops.Call) -> object:
        raise RuntimeError("no such thing")

    with monkeypatch.context() as patch:
        patch.setitem(ops.OPERATORS, ("", "Sin"), fails)
        compiled(branching(), tmp_path)
    library = targets.compile(branching(), targets.get("cpu"), tmp_path / "model.so")
    from xopt.runtime.session import Session

    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    [found] = Session.load(library).run({"x": x, "c": np.array(True)}).values()
    np.testing.assert_allclose(found, np.tanh(np.sin(x)), atol=1e-6)
