"""Passes of third parties that write where they must not, lie, leave or fork: an error that names the pass, no harm."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from xopt.data.dataset import Dataset
from xopt.errors import VerificationError
from xopt.ir.unshared import checksum, read_only
from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager

WEIGHT = "layers.0.ffn.up.weight"


@dataclass(frozen=True)
class Calls(Pass):
    """Runs a function of the test."""

    name: ClassVar[str] = "calls"
    effect: ClassVar[Effect] = Effect.LOSSY
    function: ClassVar[Callable[[ir.Model, PassContext, PassReport], Any]]

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        answer = type(self).function(model, context, report)
        return report if answer is None else answer  # type: ignore[no-any-return]


def run(function: Callable[[ir.Model, PassContext, PassReport], Any], model: ir.Model, context: PassContext) -> Any:
    Calls.function = staticmethod(function)
    return PassManager([Calls()], instruments=[]).run(model, context)[0].report


@pytest.fixture
def model() -> ir.Model:
    model = builders.bert()
    first = model.graph[0]
    table = ir.node("Constant", [], {"value": ir.tensor(np.ones(3, np.float32))}, name="table")
    table.outputs[0].name = "table_out"
    model.graph.insert_before(first, table)
    return model


@pytest.fixture
def context(model: ir.Model) -> PassContext:
    return PassContext(calibration=Dataset(builders.feeds(model), np.arange(2)), dims={"seq": 4})


def state(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def weight(model: ir.Model) -> np.ndarray:
    return model.graph.initializers[WEIGHT].const_value.numpy()  # type: ignore[union-attr]


def constant(model: ir.Model) -> np.ndarray:
    return model.graph.node("table").attributes["value"].as_tensor().numpy()


def by_torch(array: np.ndarray) -> None:
    import torch

    torch.from_numpy(array).mul_(2)


IN_PLACE: dict[str, Callable[[ir.Model, PassContext, PassReport], Any]] = {
    "a weight": lambda model, context, report: np.multiply(weight(model), 2, out=weight(model)),
    "a view of a weight": lambda model, context, report: weight(model)[1:].sort(),
    "the raw array": lambda model, context, report: model.graph.initializers[WEIGHT].const_value.raw.fill(0),  # type: ignore[union-attr]
    "a weight made writeable": lambda model, context, report: weight(model).setflags(write=True),
    "an attribute": lambda model, context, report: constant(model).fill(7),
    "the data": lambda model, context, report: context.samples.inputs["input_ids"].fill(1),
    "the labels": lambda model, context, report: context.samples.labels.fill(1),  # type: ignore[union-attr]
}
IN_SECRET: dict[str, Callable[[ir.Model, PassContext, PassReport], Any]] = {
    "value 'layers.0.ffn.up.weight' of the model": lambda model, context, report: by_torch(weight(model)),
    "attribute 'value' of node 'table'": lambda model, context, report: by_torch(constant(model)),
    "data 'input_ids'": lambda model, context, report: by_torch(context.samples.inputs["input_ids"]),
    "the labels": lambda model, context, report: by_torch(context.samples.labels),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_writing_in_place_is_an_error_of_the_pass(case: str, model: ir.Model, context: PassContext) -> None:
    before, data = state(model), checksum(context.samples.inputs["input_ids"])
    with pytest.raises(VerificationError, match=r"read-only|WRITEABLE") as caught:
        run(IN_PLACE[case], model, context)
    assert caught.value.code == "E-PASS" and "in pass calls" in caught.value.where
    assert "tensor of its own" in caught.value.cure
    assert (state(model), checksum(context.samples.inputs["input_ids"])) == (before, data)


@pytest.mark.parametrize("case", IN_SECRET)
def test_writing_past_the_lock_is_found_out(case: str, model: ir.Model, context: PassContext) -> None:
    """torch takes no notice of arrays that are read-only; what it has written cannot be put back."""
    with pytest.raises(VerificationError) as caught:
        run(IN_SECRET[case], model, context)
    assert caught.value.code == "E-PASS" and "in pass calls" in caught.value.where
    assert "has written in place" in caught.value.what and case in caught.value.what


def test_a_fault_of_the_pass_does_not_hide_that_it_has_written(model: ir.Model, context: PassContext) -> None:
    def write_and_fail(model: ir.Model, context: PassContext, report: PassReport) -> None:
        by_torch(weight(model))
        raise IndexError

    with pytest.raises(VerificationError, match="has written in place"):
        run(write_and_fail, model, context)


def test_small_things_are_not_shared(model: ir.Model, context: PassContext) -> None:
    """Types, attributes, shapes, names, properties: a copy made before stays as it was, and a failure is undone."""
    twin = model.clone()
    before = state(twin)

    def meddle(model: ir.Model, context: PassContext, report: PassReport) -> None:
        for node in model.graph:
            for attribute in node.attributes.values():
                attribute.doc_string = "changed"
            for value in node.outputs:
                if value.type is not None:
                    value.dtype = ir.DataType.DOUBLE
                if value.shape is not None and len(value.shape) and not value.shape.frozen:
                    value.shape[0] = 77
            node.metadata_props["changed"] = "yes"
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value.name = "changed"
            value.const_value.metadata_props["changed"] = "yes"
            value.const_value = ir.tensor(np.zeros(3, np.float32))
        model.ir_version, model.producer_name, model.doc_string = 7, "changed", "changed"
        model.graph.opset_imports["changed"] = 1
        model.metadata_props["changed"] = "yes"
        raise IndexError

    with pytest.raises(Exception, match="IndexError"):
        run(meddle, model, context)
    assert state(twin) == before
    assert state(model) == before


def test_the_context_is_the_pass_s_own(model: ir.Model, context: PassContext) -> None:
    samples = context.samples

    def meddle(model: ir.Model, context: PassContext, report: PassReport) -> None:
        context.dims["seq"] = 99
        context.seed, context.tile = 99, 99
        context.samples.inputs.clear()
        context.calibration = None

    run(meddle, model, context)
    assert context.dims == {"seq": 4} and (context.seed, context.tile) == (0, 8)
    assert context.calibration is samples and len(samples.inputs) == 2


WRONG_ANSWERS: dict[str, tuple[Callable[[PassReport], Any], str]] = {
    "a word": (lambda report: "done", r"returns str 'done' instead of a report"),
    "a number": (lambda report: 3, r"returns int 3 instead of a report"),
    "a class": (lambda report: PassReport, r"instead of a report"),
    "counts": (lambda report: setattr(report, "rewritten", "many"), r"the report's rewritten is str 'many'"),
    "numbers": (lambda report: setattr(report, "numbers", [1]), r"the report's numbers is list \[1\]"),
    "a number in it": (lambda report: report.numbers.update(it=object()), r"numbers\['it'\] is object"),
    "refusals": (lambda report: report.refused.append("no"), r"the report's refused is str 'no'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_a_report_is_a_report(case: str, model: ir.Model, context: PassContext) -> None:
    answer, says = WRONG_ANSWERS[case]
    before = state(model)
    with pytest.raises(VerificationError, match=says) as caught:
        run(lambda model, context, report: answer(report), model, context)
    assert caught.value.code == "E-PASS" and "in pass calls" in caught.value.where
    assert state(model) == before


def test_no_report_at_all(model: ir.Model, context: PassContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calls, "run", lambda self, model, context: None)
    with pytest.raises(VerificationError, match="returns nothing instead of a report"):
        run(lambda *_: None, model, context)


def test_numbers_of_numpy_are_numbers(model: ir.Model, context: PassContext) -> None:
    found = run(lambda model, context, report: report.numbers.update(a=np.float32(2), b=np.int64(3)), model, context)
    assert [type(value) for value in found.numbers.values()] == [float, int]


class Leave(BaseException):
    """Like an exit, of another kind."""


@pytest.mark.parametrize("signal", [SystemExit(0), SystemExit("bye"), GeneratorExit(), Leave("bye")])
def test_a_pass_does_not_end_the_process(signal: BaseException, model: ir.Model, context: PassContext) -> None:
    def leave(model: ir.Model, context: PassContext, report: PassReport) -> None:
        model.graph.outputs.clear()
        raise signal

    before = state(model)
    with pytest.raises(VerificationError, match=f"tries to end the process .{type(signal).__name__}") as caught:
        run(leave, model, context)
    assert caught.value.code == "E-PASS" and "in pass calls" in caught.value.where
    assert state(model) == before


def test_ctrl_c_is_the_users(model: ir.Model, context: PassContext) -> None:
    def interrupt(model: ir.Model, context: PassContext, report: PassReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupt, model, context)


def test_surroundings_are_put_back(
    model: ir.Model, context: PassContext, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def wander(model: ir.Model, context: PassContext, report: PassReport) -> None:
        os.chdir(tmp_path)
        os.environ["XOPT_WANDERED"] = "1"
        os.environ.pop("PATH")
        print("not json")

    folder, environment = os.getcwd(), dict(os.environ)
    run(wander, model, context)
    assert (os.getcwd(), dict(os.environ)) == (folder, environment)
    assert capsys.readouterr().out == ""


def test_a_process_that_a_pass_forks_does_not_go_on(model: ir.Model, context: PassContext) -> None:
    children = []

    def fork(model: ir.Model, context: PassContext, report: PassReport) -> None:
        sys.stdout.flush()
        children.append(os.fork())

    run(fork, model, context)
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 1


def test_read_only_arrays_of_every_kind() -> None:
    import ml_dtypes

    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = [whole, whole.T, whole[:, ::2], np.array(3.0), np.zeros((0, 3)), np.zeros(2, bool), np.zeros(2, np.int8)]
    arrays += [np.zeros((2, 2), ml_dtypes.bfloat16), np.zeros(3, ml_dtypes.int4), np.zeros(2, np.complex64)]
    for array in arrays:
        found = read_only(array)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.shares_memory(found, array) or not array.size
        with pytest.raises(ValueError, match="WRITEABLE"):
            found.setflags(write=True)
