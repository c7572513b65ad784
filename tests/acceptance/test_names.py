"""Names are data: a model under any other names is loaded, rewritten, compiled and run as it is under its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import xopt
from tests.ir import builders
from tests.ir.renaming import Renaming
from xopt.data.dataset import Dataset
from xopt.ir.fx import run_with_values, to_fx
from xopt.passes import FuseQKV, PruneHeads, Quantize, RemovePadding
from xopt.pipeline.base import Pass
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session

HOSTILE = (
    "'", '"', "\\", "\n", "\r", "\0", "\x1b[31m", "\x85", "\u2028", "\u202e", "\U0001f600", " ", "\t", "/", ".", "..",
    "../../x", "/etc/x", "a.b", "a_b", "a/b", "${x}", "$(x)", "%s", "%n", "{0}", "{{x}}", "[red]", "<b>", "x.npy",
    "\u00e9", "e\u0301", "\ufb01", "fi", "\u0660", "x" * 10_000, "y\r    raise SystemExit\r    ",
    "training');raise SystemExit;('", "class", "None", "self", "torch", "getattr", "int64", "main", "weights", "file",
    "input_0", "weight_0", "dim_0", "val_0", "labels", "node_Add_0", "unk__0", "past + 1", "2*seq", "?0", "@key",
    "floor((a)/(2))", "min(8,a)", "<>", "-1", "0", "1.5", "mask",
)  # fmt: skip
"""Names that mean something to torch, TVM, Python, a shell, a terminal, a file system, or to us."""

NAMES = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)),
    min_size=8,
    max_size=60,
    unique=True,
)
PASSES: dict[str, Callable[[], Pass]] = {
    "fuse-qkv": FuseQKV,
    "prune-heads": lambda: PruneHeads(keep=0.5),
    "quantize": Quantize,
    "remove-padding": RemovePadding,
}
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""Without shrinking: an example takes a second, and the list of names is clear enough."""
TOLERANCE = 1e-5
"""The same operators on the same numbers, some in another order; outputs are of order 1."""


def _model() -> ir.Model:
    """BERT's first layer, before it a call of a function of the model's own, with an attribute."""
    model = builders.bert(layers=1, width=16, heads=2)
    x, by = ir.Value(name="x"), ir.RefAttr("alpha", "by", ir.AttributeType.FLOAT)
    body = ir.Node("", "LeakyRelu", [x], [by], name="body")
    graph = ir.Graph([x], body.outputs, nodes=[body], opset_imports={"": 24})
    default = ir.Attr("by", ir.AttributeType.FLOAT, 0.5)
    function = ir.Function("own.domain", "Scaled", graph=graph, attributes=[default])
    model.functions[function.identifier()] = function
    model.opset_imports["own.domain"] = 1
    (words,) = [value for value in model.graph.initializers.values() if value.name == "embeddings.word"]
    call = ir.Node("own.domain", "Scaled", [words], [ir.AttrFloat32("by", 0.25)], name="call")
    call.outputs[0].name = "scaled"
    reader = next(iter(words.uses()))
    reader.node.replace_input_with(reader.idx, call.outputs[0])
    model.graph.insert_before(reader.node, call)
    return model


def _after(one: Pass, model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the written model computes after a pass, which has rewritten something."""
    context = PassContext(calibration=Dataset(feeds), dims={})
    (step,) = PassManager([one], instruments=(VerifyEach(),)).run(model, context)
    assert step.report.rewritten
    with tempfile.TemporaryDirectory() as folder:
        xopt.ir.save(model, Path(folder) / "model.onnx")
        return ReferenceSession(xopt.load(Path(folder) / "model.onnx")).run(feeds)


@cache
def _expected() -> dict[str, dict[str, np.ndarray]]:
    """Outputs under plain names: of the model, and after each pass."""
    model = _model()
    xopt.ir.canonicalize(model)
    feeds = builders.feeds(model)
    passes = {name: _after(make(), model.clone(), feeds) for name, make in PASSES.items()}
    return {"model": ReferenceSession(model).run(feeds), **passes}


class _Renamed:
    """The model, canonical, under other names, with its inputs."""

    def __init__(self, names: list[str]) -> None:
        taken: dict[str, list[str]] = {}

        def choose(kind: str, name: str) -> str:
            others = taken.setdefault(kind, [])
            index = len(others)
            chosen = names[index] if index < len(names) else f"{names[index % len(names)]} {index}"
            while chosen in others:
                chosen += "'"
            others.append(chosen)
            return chosen

        self.name = Renaming(choose)
        renamed = self.name.model(_model())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(ir.to_proto(renamed).SerializeToString())
            self.model = xopt.load(path)
        xopt.ir.canonicalize(self.model)
        self.feeds = {self.name("value", name): array for name, array in builders.feeds(_model()).items()}

    def check(self, outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        assert list(outputs) == [self.name("value", name) for name in expected]
        for got, wanted in zip(outputs.values(), expected.values()):
            np.testing.assert_allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@settings(max_examples=6, deadline=None, phases=PHASES)
@given(NAMES)
def test_a_model_under_any_names_is_rewritten_as_under_its_own(names: list[str]) -> None:
    given_ = _Renamed(names)
    given_.check(ReferenceSession(given_.model).run(given_.feeds), _expected()["model"])
    view = run_with_values(to_fx(given_.model), given_.feeds)
    given_.check({name: value.detach().numpy() for name, value in view.items()}, _expected()["model"])
    for name, make in PASSES.items():
        given_.check(_after(make(), given_.model.clone(), given_.feeds), _expected()[name])


@settings(max_examples=1, deadline=None, phases=PHASES)
@given(NAMES)
def test_a_model_under_any_names_is_compiled_as_under_its_own(names: list[str]) -> None:
    given_ = _Renamed(names)
    with tempfile.TemporaryDirectory() as folder:
        session = Session.load(xopt.compile(given_.model, "cpu", Path(folder) / "model.so"))
        given_.check(session.run(given_.feeds), _expected()["model"])
    assert {info.name for info in session.inputs} == set(given_.feeds)
    axes = tuple(given_.name("axis", name) for name in ("batch", "seq"))
    assert {info.shape for info in session.inputs} == {axes}
    assert session.manifest.limits == {axes[1]: 64}
