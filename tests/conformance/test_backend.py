"""ONNX's backend tests are right when they are compiled and run; what is refused is known, and refused in words."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import xopt
from xopt.errors import InputError

from . import suite

REFUSED = Path(__file__).with_name("refused.txt")
"""Names of the tests that are refused although they ask for nothing out of scope, each with the reason."""
BY_DEFAULT = frozenset({
    "add", "attention", "cast", "concat", "conv", "convtranspose", "expand", "gather", "gathernd", "gelu",
    "groupnormalization", "hardswish", "if_", "layernormalization", "loop", "lstm", "matmul", "maxpool", "pad",
    "quantizelinear", "reducesum", "reshape", "resize", "rmsnormalization", "rotaryembedding", "scan", "scatternd",
    "slice", "softmax", "topk", "where",
})  # fmt: skip
"""Groups of the operators that transformers are made of; the others take long in all."""


def known() -> dict[str, str]:
    """The tests that are refused, by name, with the reason."""
    lines = (line.partition(": ") for line in REFUSED.read_text(encoding="utf-8").splitlines() if line)
    return {name: reason for name, _, reason in lines}


def outcome(case: suite.Case, folder: Path) -> str:
    """How a test ends: "" (right), "refused: …", or what is wrong."""
    path = folder / "model.onnx"
    onnx.save(case.model, str(path))
    try:
        library = xopt.compile(path, "cpu", folder / "out", threads=1, database=False)
        session = xopt.Session.load(library, threads=1)
        return suite.disagreement(case, session.run)
    except InputError as error:
        return f"refused: {error.what}"


def _check(group: str, folder: Path) -> None:
    expected, wrong = known(), []
    for number, case in enumerate(suite.cases(group)):
        (place := folder / str(number)).mkdir()
        found = outcome(case, place)
        may_be_refused = suite.out_of_scope(case) or case.name in expected
        if found and not (found.startswith("refused") and may_be_refused):
            wrong.append(f"{case.name}: {found}")
        if not found and case.name in expected:
            wrong.append(f"{case.name}: right, and listed as refused")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("group", sorted(BY_DEFAULT))
def test_operators_of_transformers(group: str, tmp_path: Path) -> None:
    _check(group, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(set(suite.groups()) - BY_DEFAULT))
def test_all_others(group: str, tmp_path: Path) -> None:
    _check(group, tmp_path)


def test_every_group_by_default_is_there() -> None:
    assert set(suite.groups()) >= BY_DEFAULT
