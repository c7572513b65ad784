"""ONNX's backend tests, compiled and run: in scope they are right, the others are refused."""

from __future__ import annotations

import pytest

from xopt.errors import InputError

from . import suite

RIGHT = frozenset({"gathernd", "gelu", "gru", "if_", "lstm", "nonzero", "softmax", "where"})
"""Groups that are always tested; more of them would take long."""


def outcome(case: suite.Case) -> str:
    """How a test ends: "" (right), "refused: …", or what is wrong."""
    try:
        return suite.disagreement(case, suite.compiled(case.model))
    except InputError as error:
        return f"refused: {error.what}"


def _not_right(group: str) -> dict[suite.Case, str]:
    return {case: ending for case in suite.cases(group) if (ending := outcome(case))}


@pytest.mark.parametrize("group", sorted(RIGHT))
def test_right(group: str) -> None:
    found = _not_right(group)
    wrong = {case.name: ending for case, ending in found.items() if not suite.out_of_scope(case)}
    assert not wrong


@pytest.mark.parametrize(("group", "word"), [
    ("image_decoder", "it decodes images"), ("bernoulli", "it draws random numbers"), ("adam", "is for training"),
    ("ai_onnx_ml.binarizer", "is for trees and tables"), ("string_concat", "texts"), ("sequenceinsert", "sequence"),
])  # fmt: skip
def test_what_is_out_of_scope_is_refused_by_a_word(group: str, word: str) -> None:
    endings = [ending for case, ending in _not_right(group).items() if suite.out_of_scope(case)]
    assert endings
    assert all(ending.startswith("refused: ") and word in ending for ending in endings)


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(set(suite.groups()) - RIGHT))
def test_right_or_out_of_scope(group: str) -> None:
    wrong = {
        case.name: ending
        for case, ending in _not_right(group).items()
        if not (ending.startswith("refused: ") and suite.out_of_scope(case))
    }
    assert not wrong


def test_the_groups_are_there() -> None:
    assert set(suite.groups()) > RIGHT
