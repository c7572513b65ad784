"""Finished steps: found again only where they would come out the same, and gone on with as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.ir import builders
from xopt import api
from xopt.ir.io import load, save
from xopt.pipeline.registry import create
from xopt.search import identity
from xopt.search.cache import StepCache
from xopt.search.job import EXACT, Job
from xopt.targets.database import Record, append

PRUNE = "prune-heads{score=magnitude, rearrange=false, keep=0.5}"


def plan(**settings: Any) -> Job:
    given: dict[str, Any] = {"peers": (), "target": "arm", "threads": 2, **settings}
    return api.plan(given.pop("model", None) or builders.vit(layers=1), PRUNE, **given)


# -- what a step depends on --------------------------------------------------------------------------------------------
def test_the_same_job_is_the_same(tmp_path: Path) -> None:
    save(builders.vit(layers=1), tmp_path / "m.onnx")
    plans = [plan(), plan(), plan(model=builders.vit(layers=1))]
    assert len({identity.of_job(job) for job in plans}) == 1
    assert identity.of_job(plan(model=tmp_path / "m.onnx")) == identity.of_job(plan(model=load(tmp_path / "m.onnx")))


def samples(shift: float = 0.0) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    images[-1] += shift
    return {"pixel_values": images}


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "threads": {"threads": 1},
    "target": {"target": "cpu"},
    "variant": {"target": "arm:cortex-a76"},
    "metric": {"metric": "agreement"},
    "limit": {"max_drop": 0.5},
    "unverified": {"verify_each": False},
    "database": {"database": False},
    "batch": {"batch": 2},
    "data": {"data": samples()},
    "weights": {"model": builders.vit(layers=1, seed=1)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_job_is_another(name: str) -> None:
    assert identity.of_job(plan()) != identity.of_job(plan(**CHANGES[name]))


def test_other_samples_or_labels_are_another_job() -> None:
    labels = np.arange(4)
    jobs = [
        plan(data=samples(), metric="cosine"),
        plan(data=samples(1.0), metric="cosine"),
        plan(data={**samples(), "labels": labels}, metric="cosine"),
        plan(data={**samples(), "labels": labels[::-1]}, metric="cosine"),
        plan(data=samples(), eval_data=samples(1.0), metric="cosine"),
    ]
    assert len({identity.of_job(job) for job in jobs}) == len(jobs)


def test_sizes_of_axes_are_part_of_it() -> None:
    bert = builders.bert()
    jobs = [api.plan(bert, (), peers=(), target="arm", dims={"seq": size}) for size in (8, 16)]
    assert identity.of_job(jobs[0]) != identity.of_job(jobs[1])


def test_what_was_tuned_is_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tuned.jsonl"
    path.touch()
    before = identity.of_job(plan(database=path))
    assert before == identity.of_job(plan(database=path))
    fields = {f.name: {"int": 1, "float": 1.0, "str": "x"}.get(str(f.type), {}) for f in dataclasses.fields(Record)}
    record = Record(**{**fields, "shapes": [], "isa": "neon"})  # type: ignore[arg-type]
    append(path, record)
    assert before != identity.of_job(plan(database=path))


def metric_file(path: Path, sign: str) -> str:
    path.write_text(f"def quality(outputs, labels): return {sign}1.0\n")
    return f"{path}:quality"


def test_the_code_of_a_metric_is_part_of_it(tmp_path: Path) -> None:
    data = samples()
    before = identity.of_job(plan(data=data, metric=metric_file(tmp_path / "m.py", "+")))
    assert before == identity.of_job(plan(data=data, metric=metric_file(tmp_path / "m.py", "+")))
    assert before != identity.of_job(plan(data=data, metric=metric_file(tmp_path / "m.py", "-")))


def test_a_metric_that_remembers_something_is_equal_to_nothing() -> None:
    scale = 2.0
    job = plan(data=samples(), metric=lambda outputs, labels: scale)
    assert identity.of_job(job) != identity.of_job(job)


def external_subgraph(folder: Path, value: float) -> ir.Model:
    """A model whose branches have weights in a file of their own."""
    np.full(4096, value, np.float32).tofile(folder / "w.bin")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4096])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", "w.bin"), ("length", str(4096 * 4))):
        tensor.external_data.add(key=key, value=text)
    out = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [4096])
    branch = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["w"], ["o"])], "branch", [], [out], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    c = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4096])
    graph = onnx.helper.make_graph([node], "g", [c], [y])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        folder / "m.onnx",
    )
    return load(folder / "m.onnx")


def test_a_model_is_all_of_it(tmp_path: Path) -> None:
    """Weights of branches that lie in other files, the order of weights, attributes, names."""
    digests = [identity.of_model(external_subgraph(tmp_path, value)) for value in (1.0, 2.0)]
    assert digests[0] != digests[1]
    model = builders.vit(layers=1)
    digests = [identity.of_model(model)]
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in reversed(values):
        model.graph.initializers[str(value.name)] = value
    digests.append(identity.of_model(model))
    model.graph.name = "another"
    digests.append(identity.of_model(model))
    model.ir_version += 1
    digests.append(identity.of_model(model))
    assert len(set(digests)) == len(digests)


# -- what is recalled --------------------------------------------------------------------------------------------------
def cache_of(folder: Path, job: Job, one: str = "canonicalize") -> StepCache:
    cache = StepCache(folder, job, resume=True)
    cache.enter(create(one, {}))
    return cache


def spoilt_record(folder: Path) -> None:
    (record,) = folder.glob("*.json")
    record.write_text(record.read_text()[:-20])


def another_model(folder: Path) -> None:
    (model,) = folder.glob("*.onnx")
    save(builders.vit(layers=1, seed=5), model)


def nothing_of_ours(folder: Path) -> None:
    (record,) = folder.glob("*.json")
    record.write_text("[1, 2]")


@pytest.mark.parametrize("spoil", [spoilt_record, another_model, nothing_of_ours])
def test_a_broken_cache_is_not_used(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    job = plan()
    cache_of(tmp_path / "cache", job).keep(builders.vit(layers=1), {"kept": True})
    recalled = cache_of(tmp_path / "cache", job).recall()
    assert recalled is not None and recalled[1] == {"kept": True}
    spoil(tmp_path / "cache")
    assert cache_of(tmp_path / "cache", job).recall() is None


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "model.onnx").touch()
    cache = cache_of(tmp_path, plan())
    cache.keep(builders.vit(layers=1), {})
    assert len(list(tmp_path.iterdir())) == 4
    StepCache(tmp_path, plan(), resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "thesis.tex"]


MODELS: dict[str, Callable[[], ir.Model]] = {
    "vit": lambda: builders.vit(layers=2),
    "bert": builders.bert,
    "llama": builders.llama,
    "swin": builders.swin,
}


QUICK = ("bert", len(EXACT))
"""The others are slow."""
RUNS = [
    pytest.param(name, steps, marks=() if (name, steps) == QUICK else pytest.mark.slow)
    for name in MODELS
    for steps in (1, 3, len(EXACT))
]


@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_a_run_that_goes_on_ends_the_same(name: str, steps: int, tmp_path: Path) -> None:
    """Byte for byte, the library too; interrupted after so many passes."""
    job = api.plan(MODELS[name](), PRUNE if name == "vit" else (), peers=(), target="arm", threads=2)
    whole = api.run_plan(job, cache=tmp_path / "whole").save(tmp_path / "a")

    def interrupt(stage: str, count: int, total: int) -> None:
        if len(list((tmp_path / "cache").glob("*.json"))) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run_plan(job, cache=tmp_path / "cache", progress=interrupt)
    assert len(list((tmp_path / "cache").glob("*.json"))) == steps
    again = api.run_plan(job, cache=tmp_path / "cache", resume=True).save(tmp_path / "b")
    for file in ("model.onnx", "model.so", "model.weights", "manifest.json", "pipeline.yaml"):
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, again)]
    assert [step["reason"] for step in reports[0]["steps"]] == [step["reason"] for step in reports[1]["steps"]]


@pytest.mark.slow
def test_decisions_by_latency_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another measurement might decide otherwise."""
    job = plan(target="cpu")

    def interrupt(stage: str, count: int, total: int) -> None:
        if len(list((tmp_path / "cache").glob("*.json"))) == len(EXACT) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run_plan(job, cache=tmp_path / "cache", progress=interrupt)

    def measured_again(*anything: object) -> None:
        raise AssertionError("the decision was made before")

    monkeypatch.setattr("xopt.search.steps._decide_by_latency", measured_again)
    result = api.run_plan(job, cache=tmp_path / "cache", resume=True)
    assert result.report["steps"][-1]["decision_samples_ms"] is not None
