"""Every zoo model through the FX view, the compiler and the lossy passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from xopt import targets
from xopt.errors import InputError
from xopt.ir.canonical import canonicalize
from xopt.ir.fx import run_with_values, to_fx
from xopt.pipeline import registry
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session

from . import hf, own
from .entry import Entry
from .exporting import TRACED, exported, load
from .test_zoo import _onnxruntime, _sizes, with_padding
from .ways import default_ways

TOLERANCE = 1e-5
"""Of the largest output: two blocks of float32 sums in another order, and exp, tanh and erf by polynomials."""


def _canonical(entry: Entry) -> ir.Model:
    model = load(exported(entry, next(default_ways(entry))))
    canonicalize(model)
    return model


def _feeds(entry: Entry, model: ir.Model, batch: int, seq: int) -> dict[str, np.ndarray]:
    taken = {value.name for value in model.graph.inputs}
    return {
        name: with_padding(tensor.numpy()) if "mask" in name else tensor.numpy()
        for name, tensor in zip(entry.inputs, entry.feeds(batch, seq), strict=True)
        if name in taken
    }


def _close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("entry", [*hf.ENTRIES, *own.ENTRIES], ids=lambda entry: entry.name)
def test_fx_view_equals_the_export(entry: Entry) -> None:
    way = next(default_ways(entry))
    model, original = _canonical(entry), _onnxruntime(exported(entry, way))
    view = to_fx(model)
    for batch, seq in _sizes(entry, way)[:2]:
        feeds = _feeds(entry, model, batch, seq)
        (got,) = run_with_values(view, feeds).values()
        _close(got.detach().numpy(), original(feeds))


SLOW = (pytest.mark.slow,)
COMPILED = ("vit", "swin", "bert", "gpt2", "llama", "t5", "whisper", "alibi", "soft_cap", "qk_norm", "cross")
"""Between them these show every operator and attention form; the others are compiled in the long run."""


def _compiled_cases() -> list[object]:
    names = {entry.name for entry in (*hf.ENTRIES, *own.ENTRIES)}
    assert set(COMPILED) <= names, set(COMPILED) - names
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name in COMPILED else SLOW)
        for entry in (*hf.ENTRIES, *own.ENTRIES)
    ]


@pytest.mark.parametrize("entry", _compiled_cases())
def test_compiled_model_equals_the_export(entry: Entry, tmp_path: Path) -> None:
    way = next(default_ways(entry))
    model, original = _canonical(entry), _onnxruntime(exported(entry, way))
    session = Session.load(targets.compile(model, "cpu", tmp_path / "model.so"))
    for batch, seq in _sizes(entry, way):
        feeds = _feeds(entry, model, batch, seq)
        (got,) = session.run(feeds).values()
        _close(got, original(feeds))


LOSSY = {"prune-heads": {"keep": 0.5, "ffn": True}, "merge-tokens": {"ratio": 0.2}}


PRUNED = ("bert", "gpt2", "llama", "swin", "t5", "alibi", "qk_norm", "fused_per_head", "windows")
MERGED = ("vit", "clipvision", "bert", "swin", "whisper", "weights_read")


def _lossy_cases() -> list[object]:
    quick = {("prune-heads", name) for name in PRUNED} | {("merge-tokens", name) for name in MERGED}
    return [
        pytest.param(entry, name, id=f"{entry.name}-{name}", marks=() if (name, entry.name) in quick else SLOW)
        for entry in (*hf.ENTRIES, *own.ENTRIES)
        for name in LOSSY
    ]


@pytest.mark.parametrize(("entry", "name"), _lossy_cases())
def test_lossy_pass_rewrites_and_verifies_or_says_why_not(entry: Entry, name: str) -> None:
    model = _canonical(entry)
    named = {dim.value for value in model.graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
    dims = {axis: size for axis, size in zip(("batch", "seq"), TRACED, strict=True) if axis in named}
    manager, context = PassManager([registry.get(name)(**LOSSY[name])]), PassContext(dims=dims, tile=8)
    try:
        (step,) = manager.run(model, context)
    except InputError as error:
        if error.code == "E-NO-ATTENTION" and entry.expect.count == 0:
            return
        raise
    assert step.report.rewritten > 0 or step.report.refused, "neither done nor refused"
    assert all(refusal.reason for refusal in step.report.refused)
    if step.report.rewritten:
        feeds = _feeds(entry, model, *TRACED)
        outputs = ReferenceSession(model, threads=1).run(feeds)
        assert all(np.isfinite(value).all() for value in outputs.values())
