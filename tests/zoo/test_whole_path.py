"""Every zoo model through the FX view, the compiler and the passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from xopt.ir.fx import run_with_values, to_fx

from . import hf, own
from .entry import Entry
from .exporting import exported
from .measuring import COMPILED, PASSES, canonical, compiled, difference, feeds_of, onnxruntime_of, outcome, sizes
from .ways import ENTRIES, all_ways, default_ways


@pytest.mark.parametrize("entry", [*hf.ENTRIES, *own.ENTRIES], ids=lambda entry: entry.name)
def test_fx_view_equals_the_export(entry: Entry) -> None:
    way = next(default_ways(entry))
    (model, _), original = canonical(entry, way), onnxruntime_of(exported(entry, way))
    view = to_fx(model)
    for batch, seq in sizes(entry, way)[:2]:
        feeds = feeds_of(entry, model, batch, seq)
        got = {name: value.detach().numpy() for name, value in run_with_values(view, feeds).items()}
        assert difference(got, original(feeds)) < COMPILED


SLOW = (pytest.mark.slow,)
COMPILED_BY_DEFAULT = (
    "vit",
    "bert",
    "llama",
    "t5",
    "whisper",
    "soft_cap",
    "qk_norm",
    "cross",
    "windows",
)
"""Between them these show every operator and attention form; the others are compiled in the long run."""


def _compiled_cases() -> list[object]:
    names = {entry.name for entry in ENTRIES}
    assert set(COMPILED_BY_DEFAULT) <= names, set(COMPILED_BY_DEFAULT) - names
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name in COMPILED_BY_DEFAULT else SLOW) for entry in ENTRIES
    ]


@pytest.mark.parametrize("entry", _compiled_cases())
def test_compiled_model_equals_the_export(entry: Entry, tmp_path: Path) -> None:
    way = next(all_ways(entry))
    (model, _), original = canonical(entry, way), onnxruntime_of(exported(entry, way))
    run = compiled(model, tmp_path)
    for batch, seq in sizes(entry, way):
        feeds = feeds_of(entry, model, batch, seq)
        assert difference(run(feeds), original(feeds)) < COMPILED


PRUNED = ("bert", "gpt2", "llama", "swin", "t5", "alibi", "qk_norm", "fused_per_head", "windows")
MERGED = ("vit", "clipvision", "bert", "swin", "whisper", "weights_read")


def _cases_of_passes() -> list[object]:
    quick = {("prune-heads", name) for name in PRUNED} | {("merge-tokens", name) for name in MERGED}
    return [
        pytest.param(entry, name, id=f"{entry.name}-{name}", marks=() if (name, entry.name) in quick else SLOW)
        for entry in ENTRIES
        for name in PASSES
    ]


@pytest.mark.parametrize(("entry", "name"), _cases_of_passes())
def test_pass_rewrites_and_verifies_or_says_why_not(entry: Entry, name: str) -> None:
    """Verified by the manager; what is refused has a place and a reason (see `outcome`)."""
    model, _ = canonical(entry, next(all_ways(entry)))
    verdict, words = outcome(name, entry, model)
    assert verdict in ("rewritten", "refused", "nothing")
    assert words or verdict == "nothing"
