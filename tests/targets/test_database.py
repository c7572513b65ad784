"""The database of configurations: what is found again, what is carried over, and what can never do harm."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir import builders
from xopt import targets
from xopt.errors import InputError
from xopt.ir import canonicalize
from xopt.kernels import attention, gemm
from xopt.kernels.isa import AVX2, AVX512
from xopt.targets.database import (
    SHIPPED,
    Database,
    Record,
    append,
    complete,
    distance,
    family_of,
    fields_of,
    legal,
    open_database,
    read,
)
from xopt.targets.lowering import lower

LAYER = gemm.Workload((None, None), 384, 1536, bias=True, activation="gelu")
OTHER = gemm.Config(7, 2)
HERE = "this CPU"


def record(workload: Any = LAYER, config: Any = OTHER, family: Any = gemm, **changes: Any) -> Record:
    plain = Record(
        kernel=family.__name__.rpartition(".")[2],
        version=family.VERSION,
        isa="avx512",
        threads=2,
        machine=HERE,
        workload=fields_of(workload),
        shapes=[[1, 197, 384]],
        config=dataclasses.asdict(config),
        seconds=1e-3,
        heuristic=dataclasses.asdict(family.heuristic(workload, AVX512)),
        heuristic_seconds=1.2e-3,
        trials=30,
    )
    return dataclasses.replace(plain, **changes)


def database(path: Path, *records: Record, threads: int = 2, machine: str = HERE) -> Database:
    for one in records:
        append(path, one)
    return Database([path], threads, machine)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuned.jsonl"


# -- the file ----------------------------------------------------------------------------------------------------------
def test_what_is_added_is_read(path: Path) -> None:
    known = database(path)
    assert known.records == []
    known.add(record())
    known.add(record(threads=1))
    assert known.records == [record(threads=1), record()]
    assert list(read(path)) == [record(), record(threads=1)]


def test_a_torn_line_costs_only_itself(path: Path) -> None:
    append(path, record())
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    append(path, record(threads=1))
    assert list(read(path)) == [record(), record(threads=1)]


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_foreign_lines_are_passed_over(line: str) -> None:
    assert Record.parse(line) is None


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([field.name for field in dataclasses.fields(Record)]),
    st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers()) | st.just({"k": -1}),
)
def test_no_record_keeps_a_kernel_from_being_configured(name: str, value: Any) -> None:
    broken = Record.parse(json.dumps({**dataclasses.asdict(record()), name: value}))
    known = Database([], 2, HERE)
    known.__dict__["records"] = [] if broken is None else [broken]
    assert known.config(gemm, LAYER, AVX512) in (OTHER, gemm.heuristic(LAYER, AVX512))


def test_a_folder_in_its_place_is_an_error_for_the_writer_alone(tmp_path: Path) -> None:
    assert Database([tmp_path], 2, HERE).config(gemm, LAYER, AVX512) == gemm.heuristic(LAYER, AVX512)
    with pytest.raises(InputError, match=r"E-FILE.*the database is a folder"):
        append(tmp_path, record())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_never_ends_is_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "it")
    assert Database([tmp_path / "it"], 2, HERE).records == []
    with pytest.raises(InputError, match="E-FILE"):
        append(tmp_path / "it", record())


# -- looking up --------------------------------------------------------------------------------------------------------
def test_the_same_workload(path: Path) -> None:
    assert database(path, record()).config(gemm, LAYER, AVX512) == OTHER


def test_the_later_of_two_records_counts_and_the_first_of_two_files(path: Path, tmp_path: Path) -> None:
    append(path, record())
    append(path, record(config=gemm.Config(9, 3)))
    append(tmp_path / "shipped.jsonl", record(config=gemm.Config(6, 4)))
    assert Database([path, tmp_path / "shipped.jsonl"], 2, HERE).config(gemm, LAYER, AVX512) == gemm.Config(9, 3)


@pytest.mark.parametrize(
    "changes",
    [{"version": -1}, {"kernel": "norm"}, {"isa": "neon"}, {"config": {"mt": 31, "vectors": 6}}, {"config": {}}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_kernel_or_an_illegal_configuration_is_no_answer(path: Path, changes: dict[str, Any]) -> None:
    assert database(path, dataclasses.replace(record(), **changes)).config(gemm, LAYER, AVX512) == gemm.heuristic(
        LAYER, AVX512
    )


@pytest.mark.parametrize("changes", [{"threads": 1}, {"machine": "another"}, {"isa": "avx512-vnni"}])
def test_another_machine_is_believed_where_it_won_clearly(path: Path, changes: dict[str, Any]) -> None:
    known = database(path, record(**changes))
    assert known.config(gemm, LAYER, AVX512) == OTHER
    path.unlink()
    barely = record(heuristic_seconds=1.01e-3, **changes)
    assert database(path, barely).config(gemm, LAYER, AVX512) == gemm.heuristic(LAYER, AVX512)


def test_a_near_shape_is_carried_over_and_a_far_one_is_not(path: Path) -> None:
    known = database(path, record())
    assert known.config(gemm, dataclasses.replace(LAYER, n=1152), AVX512) == OTHER
    assert known.config(gemm, dataclasses.replace(LAYER, rows=(1, 128)), AVX512) == OTHER
    for other in ({"n": 8192}, {"activation": "none"}, {"residual": True}):
        workload = dataclasses.replace(LAYER, **other)
        assert known.config(gemm, workload, AVX512) == gemm.heuristic(workload, AVX512)


def test_the_nearest_record_decides_even_for_the_heuristic(path: Path) -> None:
    unbeaten = record(dataclasses.replace(LAYER, n=1300), gemm.heuristic(LAYER, AVX512), heuristic_seconds=1e-3)
    known = database(path, record(), unbeaten)
    workload = dataclasses.replace(LAYER, n=1280)
    assert known.config(gemm, workload, AVX512) == gemm.heuristic(workload, AVX512)


def test_a_configuration_is_only_carried_to_where_it_is_legal(path: Path) -> None:
    workload = dataclasses.replace(LAYER, rows=(1, 2))
    assert legal(gemm, workload, AVX512, dataclasses.asdict(OTHER)) is None
    assert database(path, record()).config(gemm, workload, AVX512) == gemm.heuristic(workload, AVX512)


def test_a_field_with_a_default_leaves_old_records_valid(path: Path) -> None:
    @dataclass(frozen=True)
    class Workload(gemm.Workload):
        precision_of_tomorrow: str = "float32"

    family = SimpleNamespace(**{**vars(gemm), "Workload": Workload})
    workload = Workload(**dataclasses.asdict(LAYER) | {"rows": (None, None), "results": ("float32",)})
    assert database(path, record()).config(family, workload, AVX512) == OTHER
    assert database(path).config(family, dataclasses.replace(workload, n=1152), AVX512) == OTHER


# -- distance ----------------------------------------------------------------------------------------------------------
workloads = st.builds(
    gemm.Workload,
    rows=st.sampled_from([(None,), (None, None), (1,), (8, 16), (128,)]),
    k=st.integers(1, 4096),
    n=st.integers(1, 4096),
    bias=st.booleans(),
    activation=st.sampled_from(["none", "gelu"]),
)


@settings(deadline=None)
@given(workloads, workloads)
def test_distance_is_symmetric_and_zero_for_the_same(a: gemm.Workload, b: gemm.Workload) -> None:
    known_a, known_b = (json.loads(json.dumps(dataclasses.asdict(workload))) for workload in (a, b))
    assert distance(known_a, b) == pytest.approx(distance(known_b, a))
    assert distance(known_a, b) >= 0
    assert distance(known_a, a) == 0


def test_the_distance_of_attentions_is_that_of_their_sizes() -> None:
    def workload(heads: int, head_dim: int) -> attention.Workload:
        parts = attention.fused(heads, heads, head_dim, head_dim)
        return attention.Workload(None, None, None, heads, heads, head_dim, head_dim, head_dim**-0.5, **parts)

    known = complete(attention, record(workload(6, 64), attention.heuristic(workload(6, 64), AVX512), attention))
    assert distance(known, workload(6, 64)) == 0
    assert 0 < distance(known, workload(12, 64)) < distance(known, workload(12, 32))


# -- in use ------------------------------------------------------------------------------------------------------------
def test_the_lowering_asks_the_database(path: Path) -> None:
    model = builders.vit(layers=1)
    canonicalize(model)
    plain = targets.get("cpu:avx2")
    asked: list[gemm.Workload] = []

    class Noting:
        def config(self, family: Any, workload: Any, isa: Any) -> Any:
            if family is gemm:
                asked.append(workload)
            return family.heuristic(workload, isa)

    plain.configs = Noting()
    lower(model, plain)
    chosen = next(config for config in gemm.space(asked[0], AVX2) if config != gemm.heuristic(asked[0], AVX2))
    append(path, record(asked[0], chosen, isa="avx2", machine=Database([]).machine))
    tuned = targets.configured("cpu:avx2", path, threads=2)
    names = {variable.name_hint for variable in lower(model, tuned).module.get_global_vars()}
    assert gemm.name(asked[0], chosen, AVX2) in names
    untuned = targets.configured("cpu:avx2", False)
    names = {variable.name_hint for variable in lower(model, untuned).module.get_global_vars()}
    assert gemm.name(asked[0], gemm.heuristic(asked[0], AVX2), AVX2) in names


def test_every_shipped_record_is_legal_today() -> None:
    lines = SHIPPED.read_text().splitlines()
    shipped = list(read(SHIPPED))
    assert len(shipped) == len(lines) > 0
    for one in shipped:
        family = family_of(one.kernel)
        assert one.version == family.VERSION, f"{one.kernel} was tuned as version {one.version}: tune it again"


def test_the_users_file_comes_before_the_shipped_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = open_database(True)
    assert isinstance(found, Database)
    assert found.paths == (tmp_path / "xopt" / "tuned.jsonl", SHIPPED)
