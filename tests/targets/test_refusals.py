"""What cannot be compiled is refused in one line that names the node, and nothing else reaches the terminal."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tvm import relax

from tests.ir.net import Net
from xopt import targets
from xopt.errors import InputError
from xopt.targets import lowering, ops


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


def test_what_tvm_finds_out_late_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """An operator that is given what it does not take, which only its legalization looks at."""

    def late(call: ops.Call) -> relax.Var:
        return call.emit(relax.op.permute_dims(relax.op.nn.max_pool1d(call.x(), 3, layout="NCX"), [0, 1]))

    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), late)
    said = compiled(plain(), tmp_path)
    assert "\n" not in said
    gc.collect()
    assert capfd.readouterr() == ("", "")


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
