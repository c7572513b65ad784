"""ONNX's backend tests, compiled and run: those of common operators are right, no other is wrong or breaks."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import xopt
from xopt.errors import InputError

from . import suite

RIGHT = frozenset({"gathernd", "gelu", "gru", "if_", "lstm", "nonzero", "qlinearmatmul", "softmax", "where"})
"""Groups all of whose tests in scope must be right; more of them would take long."""


def outcome(case: suite.Case, folder: Path) -> str:
    """How a test ends: "" (right), "refused: …", or what is wrong."""
    path = folder / "model.onnx"
    onnx.save(case.model, str(path))
    try:
        library = xopt.compile(path, "cpu", folder / "out", threads=1, database=False, verify=False)
        session = xopt.Session.load(library, threads=1)
        return suite.disagreement(case, session.run)
    except InputError as error:
        return f"refused: {error.what}"


def _not_right(group: str, folder: Path) -> dict[suite.Case, str]:
    found = {}
    for number, case in enumerate(suite.cases(group)):
        (place := folder / str(number)).mkdir()
        if ending := outcome(case, place):
            found[case] = ending
    return found


@pytest.mark.parametrize("group", sorted(RIGHT))
def test_right(group: str, tmp_path: Path) -> None:
    found = _not_right(group, tmp_path)
    wrong = {case.name: ending for case, ending in found.items() if not suite.out_of_scope(case)}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(set(suite.groups()) - RIGHT))
def test_right_or_refused(group: str, tmp_path: Path) -> None:
    found = _not_right(group, tmp_path)
    wrong = {case.name: ending for case, ending in found.items() if not ending.startswith("refused: ")}
    assert not wrong


def test_the_groups_are_there() -> None:
    assert set(suite.groups()) > RIGHT
