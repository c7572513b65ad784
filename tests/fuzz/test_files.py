"""A small sample of altered recipes, data, reproducers, databases and options: an end, or one clear error."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from tests.fuzz import files
from xopt.errors import InputError

SAMPLE = [index for index in range(60) if files.altered(1, index).name != files.REPORT]


def test_a_case_is_made_again_byte_for_byte() -> None:
    made = [files.altered(3, index) for index in range(120)]
    assert made == [files.altered(3, index) for index in range(120)]
    assert len({one.content for one in made}) > 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize("index", SAMPLE)
def test_altered_files(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["xopt"])
    verdict = "refused"
    with contextlib.suppress(InputError):
        verdict = files.check(files.altered(1, index), tmp_path / "case", lambda phase: None)["verdict"]
    assert verdict in ("equal", "refused")
