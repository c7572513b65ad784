"""A model that the target has no code for is still optimized: its file and report are there, and say what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import xopt
from tests.ir import builders
from xopt import cli, targets
from xopt.errors import InputError
from xopt.ir import save
from xopt.runtime.reference import ReferenceSession
from xopt.targets import ops

PASSES = "prune-heads{keep=0.5}"


def refuse(call: ops.Call) -> object:
    raise call.unsupported("it is a test")


@pytest.fixture
def without_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target knows no LayerNormalization."""
    monkeypatch.setitem(ops.KERNELS, ("", "LayerNormalization"), refuse)
    monkeypatch.setitem(ops.OPERATORS, ("", "LayerNormalization"), refuse)
    monkeypatch.setattr("xopt.targets.lowering.has_body", lambda node: False)


def optimized(**options: Any) -> xopt.api.Result:
    return xopt.optimize(builders.bert(), PASSES, peers=(), database=False, **options)


def canonical() -> ir.Model:
    model = builders.bert()
    xopt.ir.canonicalize(model)
    return model


def heads(model: ir.Model) -> list[int]:
    return [node.attributes["q_num_heads"].value for node in model.graph if node.op_type == "Attention"]


@pytest.mark.usefixtures("without_norms")
def test_the_file_and_the_report_are_written(tmp_path: Path) -> None:
    result = optimized()
    folder = result.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".xopt-files.json", "model.onnx", "pipeline.yaml", "report.html", "report.json",
    ]  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert "LayerNormalization cannot be compiled: it is a test" in report["missing"]
    assert report["final"]["judged"] == "onnxruntime"
    assert report["final"]["latency_ms"] is None
    assert not report["verification"]["compared"]
    page = (folder / "report.html").read_text()
    assert "Latency not measured: the model could not be compiled" in page
    assert "it is a test" in page
    with pytest.raises(InputError, match="it is a test"):
        result.session()


@pytest.mark.usefixtures("without_norms")
def test_passes_are_kept_by_the_work_they_save() -> None:
    result = optimized()
    [step] = [step for step in result.outcome.steps if step.report.pass_.name == "prune-heads"]
    assert step.kept
    assert "latency not measured" in step.reason
    assert sum(heads(result.model)) == sum(heads(canonical())) // 2
    feeds = builders.feeds(builders.bert())
    for array in ReferenceSession(result.model).run(feeds).values():
        assert np.isfinite(array).all()


@pytest.mark.slow
def test_what_was_there_before_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model beside another model's file would be taken for its own."""
    optimized().save(tmp_path / "out")
    assert (tmp_path / "out" / "model.so").is_file()
    monkeypatch.setattr(targets, "compile", failing)
    optimized().save(tmp_path / "out")
    assert not (tmp_path / "out" / "model.so").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def failing(*arguments: object, **options: object) -> Path:
    raise InputError("E-UNSUPPORTED-OP", "it is a test")


def test_a_pass_whose_model_cannot_be_compiled_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, whole = targets.compile, canonical()

    def choosy(model: ir.Model, *arguments: Any, **options: Any) -> Path:
        return (compiled if heads(model) == heads(whole) else failing)(model, *arguments, **options)

    monkeypatch.setattr(targets, "compile", choosy)
    result = optimized()
    [step] = [step for step in result.outcome.steps if step.report.pass_.name == "prune-heads"]
    assert not step.kept
    assert step.reason == "it can no longer be compiled: it is a test"
    assert heads(result.model) == heads(whole)
    assert result.report["missing"] is None
    assert result.report["final"]["latency_ms"] is not None


@pytest.mark.parametrize("code", ["E-TOOLCHAIN", "E-OUTPUT"])
def test_what_is_not_the_models_fault_ends_the_run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> Path:
        raise InputError(code, "it is a test")

    monkeypatch.setattr(targets, "compile", broken)
    with pytest.raises(InputError, match="it is a test"):
        optimized()


@pytest.mark.usefixtures("without_norms")
def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    save(builders.bert(), tmp_path / "m.onnx")
    arguments = ["optimize", str(tmp_path / "m.onnx"), "--no-peers", "-o", str(tmp_path / "out")]
    told = CliRunner().invoke(cli.cli, arguments)
    assert told.exit_code == 0
    assert "there is no compiled model: error[E-UNSUPPORTED-OP]: LayerNormalization cannot be compiled" in told.stderr
    assert "latency not measured: the model could not be compiled" in told.stdout
    as_json = json.loads(CliRunner().invoke(cli.cli, [*arguments, "--json"]).stdout)
    assert "it is a test" in as_json["missing"]
