"""Compiling ends with a comparison: what is wrong is not written, and what could not be compared is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from tvm import relax

import xopt
from tests.ir.net import Net
from xopt import cli
from xopt.errors import InputError, VerificationError
from xopt.ir import save
from xopt.targets import ops
from xopt.targets.cpu import CpuTarget


def sine(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    net = Net("sine")
    x = net.input("x", ["batch", "length", 4], dtype)
    net.output(net.op("Tanh", net.op("Sin", x)), "y")
    return net.build()


def compiled(model: ir.Model, folder: Path, **options: Any) -> dict[str, Any]:
    """What the comparison found."""
    found: dict[str, Any] = {}
    xopt.compile(model, output=folder / "model.so", threads=1, database=False, verified=found.update, **options)
    return found


def cosine(call: ops.Call) -> relax.Var:
    return call.emit(relax.op.cos(call.x()))


def right_for_one(call: ops.Call) -> relax.Var:
    """Of the first sample only."""
    x = call.x()
    first = relax.op.sin(relax.op.strided_slice(x, [0], [0], [1]))
    return call.emit(relax.op.broadcast_to(first, x.ty.shape))


def test_what_is_right_is_written_and_said(tmp_path: Path) -> None:
    found = compiled(sine(), tmp_path)
    assert found["compared"]
    assert 0 < found["outputs"]["y"]["scale"] <= 1
    assert found["outputs"]["y"]["max_abs"] < 1e-5
    assert (tmp_path / "model.so").is_file()


def test_a_file_format_newer_than_onnxruntime_is_compared(tmp_path: Path) -> None:
    model = sine()
    model.ir_version = 99
    assert compiled(model, tmp_path)["compared"] is True


def test_a_model_without_inputs(tmp_path: Path) -> None:
    net = Net("constant")
    net.output(net.op("Exp", net.constant("c", np.float32([[0, 1]]))), "y")
    assert compiled(net.build(), tmp_path)["compared"] is True
    found = xopt.Session.load(tmp_path / "model.so").run({})["y"]
    np.testing.assert_allclose(found, np.exp(np.float32([[0, 1]])), rtol=1e-6)


@pytest.mark.parametrize("emitter", [cosine, right_for_one])
def test_what_is_wrong_is_not_written(
    emitter: Callable[[ops.Call], relax.Var], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was there stays, also when it is wrong for another batch only."""
    compiled(sine(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), emitter)
    with pytest.raises(VerificationError, match="disagree on output 'y'") as caught:
        compiled(sine(), tmp_path)
    assert caught.value.code == "E-VERIFY"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    compiled(sine(), tmp_path, verify=False)
    assert (tmp_path / "manifest.json").read_bytes() != before["manifest.json"]


def test_what_an_exact_rewrite_does_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(pass_: object, model: ir.Model, context: object) -> Any:
        for node in model.graph:
            node.op_type = "Cos" if node.op_type == "Sin" else node.op_type
        return done(pass_, model, context)

    from xopt.passes.canonicalize import Canonicalize

    done = Canonicalize.run
    monkeypatch.setattr(Canonicalize, "run", wrong)
    with pytest.raises(VerificationError, match="disagree"):
        compiled(sine(), tmp_path)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.DOUBLE])
def test_types_are_compared_by_their_own_rounding(dtype: ir.DataType, tmp_path: Path) -> None:
    assert compiled(sine(dtype), tmp_path)["compared"]


def test_fixed_sizes_are_those_of_the_comparison(tmp_path: Path) -> None:
    assert compiled(sine(), tmp_path, dims={"length": 3})["compared"]
    assert compiled(sine(), tmp_path, dims={"length": 3, "batch": 5})["compared"]


def test_a_target_that_does_not_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuTarget, "can_run", lambda target: False)
    assert compiled(sine(), tmp_path) == {"compared": False, "reason": "cpu does not run here"}


def test_random_inputs_that_a_model_does_not_take(tmp_path: Path) -> None:
    """They are no fault of the model: it is written, and the reason is said."""
    net = Net("fitting")
    x = net.input("x", ["n"])
    net.output(net.op("Reshape", x, net.ints(7, -1)), "y")
    found = compiled(net.build(), tmp_path)
    assert not found["compared"]
    assert "does not run on this data" in found["reason"]
    [y] = xopt.Session.load(tmp_path).run({"x": np.ones(14, np.float32)}).values()
    assert y.shape == (7, 2)


def test_sizes_that_only_the_canonical_form_tells(tmp_path: Path) -> None:
    """Of an axis that the file calls open, and fixes further on."""
    net = Net("fixed")
    x = net.input("x", ["length", 2, 8])
    net.output(net.op("Tanh", net.op("Reshape", x, net.ints(5, 4, 4))), "y")
    assert compiled(net.build(), tmp_path)["compared"]


def test_the_command_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(sine(), tmp_path / "m.onnx")

    def run(*options: str) -> Any:
        arguments = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "new" / "m.so"), *options]
        return CliRunner().invoke(cli.cli, arguments)

    plain = run()
    assert plain.stdout.strip() == str(tmp_path / "new" / "m.so")
    assert plain.stderr.startswith("verified: equal to the model in onnxruntime to ")
    told = json.loads(run("--json").stdout)
    assert told["verification"]["compared"]
    assert told["verification"]["outputs"]["y"]["max_abs"] < 1e-5
    assert run("--no-verify").stderr == ""
    assert json.loads(run("--no-verify", "--json").stdout)["verification"]["reason"] == "not asked for"
    monkeypatch.setitem(ops.OPERATORS, ("", "Sin"), cosine)
    wrong = run()
    assert isinstance(wrong.exception, (VerificationError, InputError))


def test_random_inputs_have_sizes_that_fit_together(tmp_path: Path) -> None:
    net = Net("joined")
    x, past, mask = (
        net.input("x", ["batch", "n", 4]),
        net.input("past", ["b", "p", 4]),
        net.input("mask", ["batch", "t"]),
    )
    whole = net.op("Concat", past, x, axis=1)
    net.output(net.op("Add", whole, net.op("Unsqueeze", mask, net.ints(2))), "y")
    assert compiled(net.build(), tmp_path)["compared"]
