"""The manager and its instruments: good passes go through, bad ones are caught, undone, found and reproduced."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.renaming import Renaming
from xopt.data.dataset import Dataset
from xopt.errors import InputError, InternalError, VerificationError
from xopt.folder import replacing
from xopt.passes import Canonicalize
from xopt.pipeline import registry
from xopt.pipeline.base import Between, Effect, Pass, PassReport
from xopt.pipeline.bisect import bisect
from xopt.pipeline.context import PassContext
from xopt.pipeline.instruments import DumpIR, Progress, TimePasses
from xopt.pipeline.manager import PassManager
from xopt.pipeline.reproduce import Reproducer, rerun
from xopt.pipeline.rounding import rounding_bound
from xopt.pipeline.verify import VerifyEach, attends, compare


def scale_weight(model: ir.Model, name: str, factor: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the weights of some blocks; ``fault`` blocks get another factor."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.EXACT

    factor: float = 1.0
    fault: Annotated[int, Between(-1, 9)] = -1

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        for index in range(2):
            name = f"layers.{index}.ffn.up.weight"
            if report.accepts(name, None):
                scale_weight(model, name, 1.01 if index == self.fault else self.factor)
                report.rewrote(name)
        return report


@dataclass(frozen=True)
class LossyScale(Scale):
    """The same, honest about it."""

    name: ClassVar[str] = "lossy-scale"
    effect: ClassVar[Effect] = Effect.LOSSY


@dataclass(frozen=True)
class Crash(Pass):
    """Change the graph, then fail."""

    name: ClassVar[str] = "crash"
    effect: ClassVar[Effect] = Effect.EXACT
    how: str = "index"

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        scale_weight(model, "layers.0.ffn.up.weight", 2.0)
        model.graph.remove(model.graph.node(len(model.graph) - 1))
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "input":
            raise InputError("E-NO-ATTENTION", "no attention")
        raise IndexError("list index out of range")


@dataclass(frozen=True)
class Invalid(Pass):
    """Leave a graph that is no valid ONNX, or one whose shapes contradict each other."""

    name: ClassVar[str] = "invalid"
    effect: ClassVar[Effect] = Effect.LOSSY
    how: str = "attribute"

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        if self.how == "attribute":
            next(n for n in model.graph if n.op_type == "Attention").attributes.add(ir.AttrInt64("nonsense", 1))
        elif self.how == "shape":
            value = model.graph.initializers["layers.0.ffn.up.weight"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy()[:-1], name=value.name)
        else:
            scale_weight(model, "layers.1.ffn.up.weight", float("nan"))
        return PassReport(self)


@dataclass(frozen=True)
class Meddle(Pass):
    """Change what callers know of the model, or what it does with data that the samples do not hold."""

    name: ClassVar[str] = "meddle"
    effect: ClassVar[Effect] = Effect.EXACT
    how: str = "axis"

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        graph = model.graph
        if self.how == "axis":
            graph.inputs[0].shape = ir.Shape([4, *list(graph.inputs[0].shape or ())[1:]])
        elif self.how == "order":
            graph.inputs.append(graph.inputs.pop(0))
        elif self.how == "type":
            graph.inputs[1].type = ir.TensorType(ir.DataType.INT32)
            cast = ir.node("Cast", [graph.inputs[1]], {"to": ir.DataType.INT64}, name="cast")
            cast.outputs[0].name, cast.outputs[0].type = "cast_out", ir.TensorType(ir.DataType.INT64)
            graph.inputs[1].replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, graph.inputs[1])
            graph.insert_before(graph[0], cast)
        elif self.how == "output":
            graph.outputs.pop()
        elif self.how == "name":
            graph.outputs[0].name = "other"
        else:  # all ids but the last mean what they did
            table = graph.initializers["embeddings.word"]
            array = table.const_value.numpy().copy()  # type: ignore[union-attr]
            array[-1] = array[0]
            table.const_value = ir.tensor(array, name=table.name)
        return PassReport(self)


LOCAL = {cls.name: cls for cls in (Scale, LossyScale, Crash, Invalid, Meddle)}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.get
    monkeypatch.setattr(registry, "get", lambda name: LOCAL.get(name) or real(name))


@pytest.fixture
def model() -> ir.Model:
    return builders.vit()


def fingerprint(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def test_exact_and_lossy_passes_go_through(model: ir.Model) -> None:
    context = PassContext(seed=3)
    steps = PassManager([Scale(), PassManager([LossyScale(factor=1.1)])]).run(model, context)
    assert [step.index for step in steps] == [1, 2]
    assert [step.report.rewritten for step in steps] == [2, 2]
    fidelity = [step.notes["fidelity"] for step in steps]
    assert fidelity[0] == {"logits": pytest.approx(1.0, abs=1e-12)}
    assert 0.5 < fidelity[1]["logits"] < 0.99999  # type: ignore[index]
    assert context.calibration is not None
    assert context.calibration.synthetic


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Scale(fault=1), r"scale breaks output 'logits': max abs difference \S+, relative to .* \(rounding explains"),
        (Invalid(how="attribute"), r"not valid ONNX after invalid .*nonsense"),
        (Invalid(how="shape"), r"initializer 'layers.0.ffn.up.weight' holds \[31,128\], declared \[32,128\], after"),
        (Invalid(how="nan"), r"invalid breaks output 'logits': \d+ elements are no longer finite"),
        (Crash(), r"IndexError: list index out of range"),
    ],
)
def test_a_broken_pass_is_caught_undone_and_reproduced(model: ir.Model, tmp_path: Path, bad: Pass, says: str) -> None:
    PassManager([Scale()], instruments=[]).run(model, PassContext())
    before = fingerprint(model)
    manager = PassManager([Scale(), bad, Scale()], instruments=[VerifyEach(), Reproducer(tmp_path)])
    kind = InternalError if isinstance(bad, Crash) else VerificationError
    with pytest.raises(kind, match=says) as caught:
        manager.run(model, PassContext(seed=5))
    assert fingerprint(model) == before
    assert f"in pass {bad.name} (step 2)" in caught.value.where
    (folder,) = tmp_path.iterdir()
    assert str(folder) in caught.value.cure
    with pytest.raises(kind) as again:
        rerun(folder)
    assert again.value.what == caught.value.what


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("axis", r"changes what callers know of the model: input 'input_ids' was \[batch, seq\] and is \[4, seq\]"),
        ("order", r"the inputs were input_ids, attention_mask and are attention_mask, input_ids"),
        ("type", r"input 'attention_mask' was INT64 and is INT32"),
        ("output", r"the outputs were embedding and are none"),
        ("name", r"the outputs were embedding and are other"),
        ("table", r"meddle breaks output 'embedding' on zeros, the ends of tables"),
    ],
)
def test_callers_and_rare_data_are_looked_after(how: str, says: str) -> None:
    """A mask of ones and small ids are all that calibration shows; the last row of the table is checked, too."""
    bert = builders.bert()
    feeds = builders.feeds(bert, {"batch": 4})
    feeds["input_ids"] %= 10
    context = PassContext(calibration=Dataset(feeds))
    PassManager([Canonicalize(), Scale()]).run(bert, context)
    with pytest.raises(VerificationError, match=says):
        PassManager([Meddle(how=how)], instruments=[VerifyEach()]).run(bert, context)


def test_reproducer_keeps_real_samples(model: ir.Model, tmp_path: Path) -> None:
    random = Dataset.random(model, 3, seed=9)
    data = dataclasses.replace(random, labels=np.array([1, 2, 3]), synthetic=False)
    with pytest.raises(VerificationError) as caught:
        PassManager([Scale(fault=0)], instruments=[VerifyEach(), Reproducer(tmp_path)]).run(
            model, PassContext(calibration=data)
        )
    (folder,) = tmp_path.iterdir()
    assert (folder / "samples.npz").is_file()
    with pytest.raises(VerificationError, match=re.escape(caught.value.what)):
        rerun(folder)


def test_a_cause_of_the_user_or_an_interrupt_leaves_no_reproducer(model: ir.Model, tmp_path: Path) -> None:
    before = fingerprint(model)
    instruments = [Reproducer(tmp_path)]
    with pytest.raises(InputError, match="no attention"):
        PassManager([Crash(how="input")], instruments=instruments).run(model, PassContext())
    with pytest.raises(KeyboardInterrupt):
        PassManager([Crash(how="interrupt")], instruments=instruments).run(model, PassContext())
    assert fingerprint(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_hide_the_failure(model: ir.Model, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InternalError, match=r"IndexError.*no reproducer could be written"):
        PassManager([Crash()], instruments=[Reproducer(blocked / "below")]).run(model, PassContext())


def test_half_a_reproducer_does_not_stay(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(text: str) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xopt.pipeline.text.to_yaml", full)
    with pytest.raises(InternalError, match="no reproducer could be written"):
        PassManager([Crash()], instruments=[Reproducer(tmp_path)]).run(model, PassContext())
    assert list(tmp_path.iterdir()) == []


def test_rerun_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"E-FILE.*the reproducer cannot be read"):
        rerun(tmp_path)


def test_dump_writes_numbered_files_and_spares_foreign_ones(model: ir.Model, tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    PassManager([Scale(), LossyScale(), Scale()], instruments=[DumpIR(folder)]).run(model, PassContext())
    names = ["000_input.onnx", "001_after_scale.onnx", "002_after_lossy-scale.onnx", "003_after_scale.onnx"]
    assert sorted(file.name for file in folder.glob("*.onnx")) == names
    assert len(ir.load(folder / names[1]).graph) == len(model.graph)

    (folder / "mine.onnx").write_text("mine")
    PassManager([Scale()], instruments=[DumpIR(folder)]).run(model, PassContext())
    assert sorted(file.name for file in folder.glob("*.onnx")) == [*names[:2], "mine.onnx"]

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "000_input.onnx").write_text("not ours")
    with pytest.raises(InputError, match=r"E-OUTPUT.*holds other files"):
        PassManager([Scale()], instruments=[DumpIR(foreign)]).run(model, PassContext())
    assert (foreign / "000_input.onnx").read_text() == "not ours"
    for name in ("report.json", ".xopt-dump", ".xopt-files.json"):
        (foreign / name).touch()
    with pytest.raises(InputError, match=r"E-OUTPUT.*holds other files"):
        PassManager([Scale()], instruments=[DumpIR(foreign)]).run(model, PassContext())

    results = tmp_path / "results"
    with replacing(results) as fresh:
        (fresh / "model.onnx").write_text("hours of work")
    with pytest.raises(InputError, match=r"E-OUTPUT.*holds other files"):
        PassManager([Scale()], instruments=[DumpIR(results)]).run(model, PassContext())
    assert (results / "model.onnx").read_text() == "hours of work"

    (folder / "000_input.onnx").write_text("changed")
    with pytest.raises(InputError, match=r"E-OUTPUT.*changed since"):
        PassManager([Scale()], instruments=[DumpIR(folder)]).run(model, PassContext())
    assert (folder / "000_input.onnx").read_text() == "changed"


def test_the_name_of_a_pass_is_no_path(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, "name", "../../out/\x1b\0" + "x" * 300)
    inner = tmp_path / "a" / "b" / "c"
    PassManager([Scale()], instruments=[DumpIR(inner / "dump")]).run(model, PassContext())
    with pytest.raises(VerificationError):
        PassManager([Scale(fault=0)], instruments=[VerifyEach(), Reproducer(inner / "failed")]).run(
            model, PassContext()
        )
    assert [file.name for file in sorted((inner / "dump").glob("*.onnx"))] == [
        "000_input.onnx",
        f"001_after__out_{'x' * 35}.onnx",
    ]
    (folder,) = (inner / "failed").iterdir()
    assert (folder / "model.onnx").is_file()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == [
        "a",
        "b",
        "c",
        "dump",
        "failed",
        folder.name,
    ]


def test_an_input_may_be_called_anything_in_a_reproducer(model: ir.Model, tmp_path: Path) -> None:
    samples = Dataset.random(model, 3, seed=9).inputs
    model = Renaming(lambda kind, name: "file" if name in samples else name).model(model)
    data = Dataset({"file": next(iter(samples.values()))})
    instruments = [VerifyEach(), Reproducer(tmp_path)]
    with pytest.raises(VerificationError) as caught:
        PassManager([Scale(fault=0)], instruments=instruments).run(model, PassContext(calibration=data))
    (folder,) = tmp_path.iterdir()
    with pytest.raises(VerificationError, match=re.escape(caught.value.what)):
        rerun(folder)


def test_time_and_progress(model: ir.Model) -> None:
    calls = []
    timer = TimePasses()
    context = PassContext(progress=lambda *call: calls.append(call))
    steps = PassManager([Scale(), LossyScale()], instruments=[timer, Progress()]).run(model, context)
    assert calls == [("scale", 0, 2), ("scale", 1, 2), ("lossy-scale", 1, 2), ("lossy-scale", 2, 2)]
    assert timer.seconds == [(step.pass_.name, step.seconds) for step in steps]
    assert str(timer).endswith("total")


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("fault", [0, 1])
def test_bisect_finds_pass_and_place(model: ir.Model, position: int, fault: int) -> None:
    passes: list[Pass] = [Scale() for _ in range(5)]
    passes[position] = Scale(fault=fault)
    before = fingerprint(model)
    culprit = bisect(model, passes, PassContext())
    assert culprit is not None
    assert (culprit.index, culprit.application) == (position + 1, fault + 1)
    assert culprit.site == f"layers.{fault}.ffn.up.weight"
    assert "max abs difference" in culprit.reason
    assert fingerprint(model) == before


def test_bisect_with_a_check_of_the_caller(model: ir.Model) -> None:
    def too_big(candidate: ir.Model) -> str | None:
        weight = candidate.graph.initializers["layers.0.ffn.up.weight"].const_value
        assert weight is not None
        return "weight is too big" if np.abs(weight.numpy()).max() > 1.5 * start else None

    start = np.abs(model.graph.initializers["layers.0.ffn.up.weight"].const_value.numpy()).max()  # type: ignore[union-attr]
    culprit = bisect(model, [LossyScale(factor=1.2)] * 8, PassContext(), too_big)
    assert culprit is not None
    assert str(culprit).startswith("pass 3, lossy-scale, application 1 (layers.0.ffn.up.weight): weight is too big")
    assert culprit.probes <= 1 + 1 + 3 + 1 + 2
    assert bisect(model, [LossyScale(factor=1.01)], PassContext()) is None
    assert bisect(model, [Scale()], PassContext(), lambda _: "always").index == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [KeyError("layers"), SystemExit(0)])
def test_a_check_of_the_caller_that_fails(model: ir.Model, error: BaseException) -> None:
    asked = []

    def fails_at(*times: int) -> Callable[[ir.Model], None]:
        def check(candidate: ir.Model) -> None:
            asked.append(candidate)
            if len(asked) in times:
                raise error

        return check

    with pytest.raises(InputError, match=r"E-OPTION.*the check fails"):
        bisect(model, [Scale()], PassContext(), fails_at(1))
    asked.clear()
    assert bisect(model, [Scale()], PassContext(), fails_at(2, 3, 4)).index == 1  # type: ignore[union-attr]
    asked.clear()
    with pytest.raises(InputError, match="fails once and holds once"):
        bisect(model, [Scale()], PassContext(), fails_at(2))


def test_bisect_finds_a_crash_and_a_fault_without_places(model: ir.Model) -> None:
    culprit = bisect(model, [Scale(), Scale(), Crash()], PassContext())
    assert culprit is not None
    assert (culprit.index, culprit.application) == (3, None)
    assert "IndexError" in culprit.reason


def test_verify_runs_a_batch_that_the_model_fixes() -> None:
    model = builders.vit()
    model.graph.inputs[0].shape = ir.Shape([2, *list(model.graph.inputs[0].shape or ())[1:]])
    (step,) = PassManager([LossyScale()], instruments=[VerifyEach(samples=4)]).run(model, PassContext())
    assert set(step.notes["fidelity"]) == {"logits"}  # type: ignore[call-overload]


def _outputs() -> Iterator[tuple[np.ndarray, np.ndarray, str | None]]:
    one = np.array([1.0, -4.0, np.inf, np.nan], np.float32)
    yield one, one.copy(), None
    yield one, np.array([1.0, -4.0001, np.inf, np.nan], np.float32), None
    yield one, np.array([1.0, -4.01, np.inf, np.nan], np.float32), "max abs difference 0.01"
    yield one, np.array([1.0, -4.0, -np.inf, np.nan], np.float32), "1 elements are no longer finite"
    yield one, np.array([1.0, -4.0, np.inf, 0], np.float32), "1 elements are no longer finite"
    yield one, one[:3], "float32[4] became float32[3]"
    yield one, one.astype(np.float64), "float32[4] became float64[4]"
    yield np.array([1, 2]), np.array([1, 3]), "max abs difference 1"


def test_only_attention_makes_a_number_of_what_was_none() -> None:
    """A row without keys is NaN by a softmax and 0 by ONNX's Attention; a number is never NaN afterwards."""
    none, number = np.array([1, np.nan], np.float32), np.array([1, 0], np.float32)
    assert attends(builders.vit())
    assert compare([{"y": none}], [{"y": number}], attends=True)["y"].violation(1e-4) is None
    assert compare([{"y": number}], [{"y": none}], attends=True)["y"].violation(1e-4) is not None


@pytest.mark.parametrize(("before", "after", "says"), list(_outputs()))
def test_comparison_of_outputs(before: np.ndarray, after: np.ndarray, says: str | None) -> None:
    violation = compare([{"y": before}], [{"y": after}])["y"].violation(1e-4)
    assert violation is None if says is None else says in (violation or "")


def test_a_cosine_that_is_no_number_is_no_agreement() -> None:
    huge = np.full(4, 1e200)
    (change,) = compare([{"y": huge}], [{"y": -huge}]).values()
    assert change.violation(None, 0.95) is not None


def test_an_output_that_is_gone_or_new() -> None:
    y = np.zeros(1)
    assert compare([{"y": y}], [{}])["y"].violation(None) == "it is gone"
    assert compare([{}], [{"y": y}])["y"].violation(None) == "it is new"


def test_rounding_bound_is_above_reordering_and_below_a_small_fault(model: ir.Model) -> None:
    """The bound must let through what a change of summation order does, here float32 against float64 sums."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 1536), np.float32), rng.standard_normal((1536, 64), np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    sequential = np.zeros((64, 64), np.float32)
    for k in range(1536):
        sequential += a[:, k : k + 1] * b[k]
    graph = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]>'
        "g (float[64,1536] a, float[1536,64] b) => (float[64,64] y) { y = MatMul(a, b) }"
    )
    bound = rounding_bound(graph) * np.abs(exact).max()
    assert np.abs(sequential - exact).max() < bound < 1e-3 * np.abs(exact).max()
