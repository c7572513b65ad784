"""The whole flow on small models: what is written, that it agrees, that it can stop anywhere and go on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import yaml

import xopt
from tests.ir import builders
from tests.ir.net import Net
from xopt import api
from xopt.data.dataset import Dataset
from xopt.errors import InputError, VerificationError
from xopt.ir.io import save
from xopt.ir.shapes import bind_dims
from xopt.measure.latency import Latency
from xopt.pipeline.manager import PassManager
from xopt.runtime.reference import ReferenceSession
from xopt.search.cache import StepCache

PRUNE = "prune-heads{score=magnitude, rearrange=false, compensate=false, keep=0.5, ffn=true}"
FILES = [".xopt-files.json", "manifest.json", "model.onnx", "model.so", "model.weights", "pipeline.yaml"]
FILES += ["report.html", "report.json"]


def model() -> ir.Model:
    return builders.vit(layers=1, width=32, heads=4)


@pytest.fixture(scope="module")
def result() -> api.Result:
    return xopt.optimize(model(), PRUNE, peers=["onnxruntime"], batch=2, threads=2)


@pytest.fixture(scope="module")
def saved(result: api.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("flow") / "out")


def test_everything_is_written(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == FILES


def test_the_steps_say_what_happened(result: api.Result) -> None:
    steps = result.report["steps"]
    assert steps[0]["pass"] == "canonicalize"
    assert steps[-1]["pass"] == "prune-heads"
    assert steps[-1]["rewritten"] > 0
    assert steps[-1]["macs"] < steps[-2]["macs"]
    assert "slower" in steps[-1]["reason"] or "faster" in steps[-1]["reason"]
    assert all(step["latency_ms"]["median"] > 0 for step in steps)
    assert all(step["quality"] == pytest.approx(1.0, abs=1e-6) for step in steps[:-1])


def test_passes_see_the_canonical_model_even_when_there_was_nothing_to_rewrite(tmp_path: Path) -> None:
    """A file in canonical form has no shapes inside; canonicalize infers them, which is no rewrite."""
    save(model(), tmp_path / "m.onnx")
    done = xopt.optimize(tmp_path / "m.onnx", target="arm")
    fused = next(step for step in done.report["steps"] if step["pass"] == "fuse-qkv")
    assert fused["rewritten"] == 1


def test_without_data_quality_is_fidelity_and_says_so(result: api.Result) -> None:
    metric = result.report["metric"]
    assert (metric["name"], metric["synthetic"], metric["baseline"]) == ("cosine", True, 1.0)


def test_onnx_file_and_artifact_agree(result: api.Result, saved: Path) -> None:
    feeds = Dataset.random(model(), 5, 3).inputs
    expected = onnxruntime.InferenceSession(saved / "model.onnx").run(None, dict(feeds))[0]
    for session in (result.session(), xopt.Session.load(saved)):
        # float32 sums of at most 256 terms: rounding of 1e-5 of a magnitude of a few
        np.testing.assert_allclose(session.run(feeds)["logits"], expected, atol=1e-4, rtol=1e-4)


def test_raw_samples_are_kept(saved: Path) -> None:
    report = json.loads((saved / "report.json").read_text())
    assert report["schema"] == 1
    times = report["runtimes"]["onnxruntime"]
    assert len(times["samples_ms"]) == len(times["waits"]) >= 5
    assert times["median_ms"] == Latency(tuple(times["samples_ms"]), tuple(times["waits"])).median
    assert report["steps"][-1]["samples_ms"] and report["steps"][-1]["decision_samples_ms"]["best"]
    assert report["verification"]["compared"]


def test_the_recipe_holds_the_kept_passes(result: api.Result, saved: Path) -> None:
    steps = yaml.safe_load((saved / "pipeline.yaml").read_text())
    names = [step if isinstance(step, str) else next(iter(step)) for step in steps]
    assert names == [step["pass"] for step in result.report["steps"] if step["kept"]]


def test_the_callers_model_stays_as_it_is(tmp_path: Path) -> None:
    given = model()
    before = ir.to_proto(given).SerializeToString(deterministic=True)
    xopt.compile(given, output=tmp_path / "new" / "small.so")
    assert ir.to_proto(given).SerializeToString(deterministic=True) == before
    assert xopt.Session.load(tmp_path / "new" / "small.so").inputs[0].name == "pixel_values"


def interrupting(stage: str) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    "stage", ["canonicalize", "prune-heads", pytest.param("evaluate", marks=pytest.mark.slow), "compile", "measure"]
)
def test_ctrl_c_at_any_step_leaves_nothing_behind(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    job = api.plan(model(), PRUNE, peers=(), threads=2)
    with pytest.raises(KeyboardInterrupt):
        api.run_plan(job, progress=interrupting(stage))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = api.plan(model(), PRUNE, peers=(), threads=2)
    with pytest.raises(KeyboardInterrupt):
        api.run_plan(job, progress=interrupting("prune-heads"), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.json"))) == 5  # the exact passes
    ran: list[str] = []
    step = PassManager.step

    def spied(self: PassManager, one: object, *args: object, **options: object) -> object:
        ran.append(one.name)  # type: ignore[attr-defined]
        return step(self, one, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PassManager, "step", spied)
    result = api.run_plan(job, cache=tmp_path / "cache", resume=True)
    assert set(ran) == {"prune-heads"}
    assert [s["pass"] for s in result.report["steps"]][:2] == ["canonicalize", "fold-constants"]
    (tmp_path / "taken").touch()
    with pytest.raises(InputError) as caught:
        result.save(tmp_path / "taken")
    assert caught.value.code == "E-OUTPUT"
    assert len(list((tmp_path / "cache").glob("*.json"))) == 6  # a place that cannot be written does not lose them
    result.save(tmp_path / "out")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_run_that_would_fail_again_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*anything: object) -> None:
        raise VerificationError("E-VERIFY", "they differ")

    result = api.run_plan(api.plan(model(), peers=(), target="arm"), cache=tmp_path / "cache")
    monkeypatch.setattr("xopt.search.proof.prove", broken)
    with pytest.raises(VerificationError):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_job_is_not_used(tmp_path: Path) -> None:
    job = api.plan(model(), PRUNE, peers=())
    with pytest.raises(KeyboardInterrupt):
        api.run_plan(job, progress=interrupting("prune-heads"), cache=tmp_path / "cache")
    other = api.plan(model(), PRUNE, peers=(), seed=1)
    cache = StepCache(tmp_path / "cache", other, resume=True)
    cache.enter(other.exact[0])
    assert cache.recall() is None


def test_a_budget_rolls_back_what_costs_too_much() -> None:
    destroy = "prune-heads{score=magnitude, rearrange=false, compensate=false, keep=0.05, ffn=true}"
    done = xopt.optimize(model(), destroy, target="arm", max_drop=0.0)
    step = done.report["steps"][-1]
    assert not step["kept"] and "drop" in step["reason"]
    assert done.report["final"]["macs"] == done.report["steps"][0]["macs"]


@pytest.mark.slow
def test_a_target_that_cannot_run_here_is_not_timed(tmp_path: Path) -> None:
    done = xopt.optimize(model(), PRUNE, target="arm")
    step = done.report["steps"][-1]
    assert step["latency_ms"] is None and step["reason"].endswith("latency not measured")
    assert step["kept"]
    out = done.save(tmp_path / "out")
    assert json.loads((out / "report.json").read_text())["verification"]["compared"] is False
    with pytest.raises(InputError) as caught:
        done.session()
    assert caught.value.code == "E-CPU"


def test_a_model_file_is_its_own_peer(tmp_path: Path) -> None:
    save(model(), tmp_path / "m.onnx")
    job = api.plan(tmp_path / "m.onnx")
    assert job.path == tmp_path / "m.onnx"
    assert job.plan()["evaluation"]["samples"] == len(job.evaluation) > 0


def test_defaults_search_only_with_data_and_a_budget() -> None:
    data = Dataset.random(model(), 8, 0).inputs
    assert api.plan(model()).passes == ()
    assert api.plan(model(), data=data).passes == ()
    searched = api.plan(model(), data=data, max_drop=0.01)
    assert [one.name for one in searched.passes] == ["prune-heads", "merge-tokens"]
    assert searched.optional


def test_an_axis_that_is_fixed_further_on_is_respected() -> None:
    net = Net("later")
    x = net.op("Relu", net.input("x", ["batch", "length", 6]))
    net.output(net.op("Reshape", x, net.ints(4, 5, 6)), "y")
    halves = net.build()
    halves.graph.inputs[0].shape = ir.Shape(["batch", 5, 6])
    job = api.plan(halves, batch=1)
    assert {array.shape for array in job.feeds.values()} == {(4, 5, 6)}
    assert len(job.calibration) % 4 == 0
    result = api.optimize(halves, peers=(), threads=1)
    assert result.report["agreement"]["samples"] == len(job.evaluation)


def test_a_fixed_batch_is_respected() -> None:
    fixed = bind_dims(model(), {"batch": 4})
    job = api.plan(fixed, batch=1)
    assert {array.shape[0] for array in job.feeds.values()} == {4}
    few = api.plan(fixed, data=Dataset.random(model(), 3, 0)).evaluation
    assert len(few) == 3
    assert [{array.shape[0] for array in feeds.values()} for feeds in few.batches(4)] == [{4}]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"target": "toaster"}, "E-TARGET"),
        ({"passes": "no-such-pass"}, "E-PASS"),
        ({"passes": "prune-heads{keep=7}"}, "E-OPTION"),
        ({"metric": "beauty"}, "E-OPTION"),
        ({"metric": "top-1"}, "E-DATA"),
        ({"data": "missing.npz"}, "E-FILE"),
        ({"data": {"pixels": np.zeros((1, 3, 16, 16), np.float32)}}, "E-DATA"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(settings: dict[str, object], code: str) -> None:
    with pytest.raises(InputError) as caught:
        api.plan(model(), **settings)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_quality_is_that_of_the_artifact(result: api.Result) -> None:
    final, precision = result.report["final"], result.report["precision"]
    assert {step["judged"] for step in result.report["steps"]} == {"artifact"} == {final["judged"]}
    assert final["onnx_quality"] == pytest.approx(final["quality"], abs=1e-5)  # float32: rounding
    assert precision["name"] == "fp32" and abs(precision["drop"]) < 1e-5
    agreement = result.report["agreement"]
    assert agreement["samples"] == result.report["metric"]["samples"] and agreement["bound"] < 1e-3
    assert agreement["outputs"]["logits"]["max_abs"] <= agreement["bound"] * agreement["outputs"]["logits"]["scale"]


@pytest.mark.slow
def test_elsewhere_it_is_that_of_the_file() -> None:
    report = xopt.optimize(model(), PRUNE, target="arm").report
    assert {step["judged"] for step in report["steps"]} == {"onnxruntime"} == {report["final"]["judged"]}
    assert report["agreement"] is None


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[ir.Model, np.ndarray], np.ndarray]) -> None:
    """Compiled models whose outputs are other ones than those of their graphs."""
    from xopt.search.lab import Lab

    compile_ = Lab._compile

    def compiled(self: Lab, graph: ir.Model) -> tuple[Path, object]:
        library, runner = compile_(self, graph)
        assert runner is not None
        return library, lambda feeds: {name: spoil(graph, array) for name, array in runner(feeds).items()}

    monkeypatch.setattr(Lab, "_compile", compiled)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda graph, array: array * 1.001, "output 'logits' of the evaluation data, max abs difference"),
        (lambda graph, array: array * np.nan, "the compiled model's outputs are not numbers"),
    ],
)
def test_an_artifact_that_is_another_model_ends_the_run(
    spoil: Callable[[ir.Model, np.ndarray], np.ndarray], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, spoil)
    with pytest.raises(VerificationError, match=says) as caught:
        xopt.optimize(model(), peers=[], threads=2)
    assert caught.value.code == "E-VERIFY"


@pytest.mark.slow
def test_what_only_the_artifact_loses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned model whose file would do, but whose compiled code is bad: it is left out, by the drop."""
    whole = model().graph.initializers["layers.0.ffn.up.weight"].shape

    def spoil(graph: ir.Model, array: np.ndarray) -> np.ndarray:
        pruned = graph.graph.initializers["layers.0.ffn.up.weight"].shape != whole
        return -array if pruned else array

    spoiled(monkeypatch, spoil)
    done = xopt.optimize(model(), PRUNE, max_drop=0.2, peers=[], threads=2)
    step = done.report["steps"][-1]
    assert not step["kept"] and re.match(r"drop [0-9.]+ > 0.2", step["reason"]), step["reason"]
    assert done.report["final"]["drop"] < 1e-5


def test_a_precision_that_costs_the_budget_is_refused_with_the_cure() -> None:
    with pytest.raises(InputError, match=r"bf16 alone loses .* give --precision fp32 or allow --max-drop") as caught:
        xopt.optimize(model(), PRUNE, precision="bf16", max_drop=0.0, peers=[], threads=2)
    assert caught.value.code == "E-BUDGET"
    done = xopt.optimize(model(), "", precision="fp32", max_drop=0.0, peers=[], threads=2)
    assert done.report["final"]["judged"] == "artifact"


def test_a_precision_is_compiled_and_reported(tmp_path: Path) -> None:
    done = xopt.optimize(model(), "", precision="bf16", peers=[], threads=2)
    assert done.report["target"]["precision"] == "bf16"
    feeds = Dataset.random(model(), 5, 3).inputs
    exact, found = ReferenceSession(model()).run(feeds), done.session().run(feeds)
    for name, values in exact.items():
        # bfloat16 rounds each operand by up to 2**-8: too much for float32, and little for a classifier.
        error = np.abs(found[name] - values).max() / np.abs(values).max()
        assert 1e-5 < error < 0.03
