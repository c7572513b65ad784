"""Passes of other packages, good and bad: what is broken is listed as such, and takes nothing else down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from xopt import commands
from xopt.errors import InputError, VerificationError
from xopt.pipeline import registry

GOOD = """
from dataclasses import dataclass
from typing import ClassVar
from xopt.pipeline.base import Effect, Pass, PassReport
@dataclass(frozen=True)
class Good(Pass):
    "Does nothing."
    name: ClassVar[str] = "NAME"
    effect: ClassVar[Effect] = Effect.EXACT
    def run(self, model, context):
        return PassReport(self)
"""
MODULES = {  # name of the pass: source of its module
    "good": GOOD.replace("NAME", "good"),
    "raises": "raise RuntimeError('no licence')",
    "exits": "import sys; sys.exit(3)",
    "leaves": "class Away(BaseException): pass\nraise Away('gone')",
    "wanders": "import os; os.chdir('/'); os.environ['XOPT_WANDERED'] = '1'; print('{')\n"
    + GOOD.replace("NAME", "wanders"),
    "no-such-class": "x = 1",
    "a-function": "def Good(): pass",
    "another-name": GOOD.replace("NAME", "something-else"),
    "no-run": GOOD.replace("NAME", "no-run").replace("def run", "def walk"),
    "no-default": GOOD.replace("NAME", "no-default").replace("    def run", "    width: int\n    def run"),
    "no-effect": GOOD.replace("NAME", "no-effect").replace("Effect.EXACT", "'exact'"),
    "no-end": GOOD.replace("NAME", "no-end") + "    def check(self): raise SystemExit(5)\n",
    "no-good-option": GOOD.replace("NAME", "no-good-option")
    + "    x: int = 0\n    def check(self):\n        if self.x: raise SystemExit(5)\n",
    "no-syntax": "def (",
    "canonicalize": GOOD.replace("NAME", "canonicalize"),
    "two words": GOOD.replace("NAME", "two words"),
    "esc\x1b[2J": GOOD,
}
USABLE = {"good", "wanders", "no-good-option"}


def install(site: Path, package: str, name: str, source: str) -> None:
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[xopt.passes]\n{name} = {module}:Good\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for index, (name, source) in enumerate(MODULES.items()):
        install(tmp_path, f"third-party-{index}", name, source)
    for package in ("twin-a", "twin-b"):
        install(tmp_path, package, "twin", GOOD.replace("NAME", "twin"))
    for index, rubbish in enumerate((b"\xff\xfe[xopt.passes", b"[xopt.passes]\nodd = not a reference:\n")):
        info = tmp_path / f"rubbish{index}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_bytes(b"\xff\n" if index == 0 else b"Name: rubbish\n")
        (info / "entry_points.txt").write_bytes(rubbish)
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (registry._entry_points, registry._third_party):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (registry._entry_points, registry._third_party):
        cached.cache_clear()


@pytest.mark.usefixtures("installed")
def test_what_is_broken_is_listed_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    folder, environment = os.getcwd(), dict(os.environ)
    commands.passes(None, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    names = [one["name"] for one in listed["passes"]]
    assert names[: len(registry.BUILT_IN)] == list(registry.BUILT_IN)
    assert set(names[len(registry.BUILT_IN) :]) == USABLE
    broken = {one["name"]: one for one in listed["broken"]}
    assert set(broken) >= {*MODULES, "twin", "odd"} - USABLE
    for name, word in {
        "raises": "no licence",
        "exits": "SystemExit 3",
        "leaves": "Away gone",
        "no-end": "SystemExit 5",
        "no-run": "abstract",
    }.items():
        assert word in broken[name]["reason"] and broken[name]["package"].startswith("third-party-")
    assert (os.getcwd(), dict(os.environ)) == (folder, environment)
    commands.passes(None, as_json=False)
    assert "\x1b[2J" not in capsys.readouterr().out
    commands.passes("prune-heads", as_json=True)
    assert json.loads(capsys.readouterr().out)["passes"][0]["name"] == "prune-heads"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", sorted({*MODULES, "twin", "odd"} - USABLE - {"canonicalize"}))
def test_to_use_a_broken_one_is_an_error_that_names_the_package(name: str) -> None:
    with pytest.raises(InputError) as caught:
        registry.create(name, {})
    assert caught.value.code == "E-PASS"
    assert any(word in caught.value.where for word in ("third-party-", "twin-a, twin-b", "rubbish"))


@pytest.mark.usefixtures("installed")
def test_others_are_none_the_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.create("good", {}).name == "good"
    with pytest.raises(VerificationError, match=r"pass no-good-option tries to end the process \(SystemExit 5\)"):
        registry.create("no-good-option", {"x": 1})
    assert registry.get("canonicalize").__module__ == "xopt.passes.canonicalize"
    monkeypatch.setattr(registry, "_load", lambda point: pytest.fail(f"{point} was imported"))
    assert set(USABLE) <= set(registry.names())
    registry.create("prune-heads", {})
    with pytest.raises(InputError, match="unknown pass 'prune-head', did you mean prune-heads"):
        registry.create("prune-head", {})
