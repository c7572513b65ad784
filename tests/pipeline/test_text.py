"""Options and pipelines: round trips, legal ranges, and one clear line for each mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xopt.errors import InputError
from xopt.pipeline import registry, text
from xopt.pipeline.base import Between, Choice, Effect, Pass, PassReport, application_limit
from xopt.pipeline.context import PassContext


@dataclass(frozen=True)
class Everything(Pass):
    """One option of each kind."""

    name: ClassVar[str] = "every-kind"
    effect: ClassVar[Effect] = Effect.EXACT

    flag: bool = False
    count: Annotated[int, Between(0, 10**9)] = 3
    share: Annotated[float, Between(0.0, 1.0)] = 0.5
    tau: float = 1.0
    score: Annotated[str, Choice("fisher", "optin")] = "fisher"
    label: str = ""
    schedule: Annotated[tuple[int, ...], Between(-5, 5)] = ()
    words: tuple[str, ...] = ("a", "b")
    limit: int | None = None

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        return PassReport(self)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.get
    monkeypatch.setattr(registry, "get", lambda name: Everything if name == "every-kind" else real(name))


PASSES = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(0, 10**9),
    share=st.floats(0, 1),
    tau=st.floats(allow_nan=False),
    score=st.sampled_from(["fisher", "optin"]),
    label=st.text(),
    schedule=st.lists(st.integers(-5, 5)),
    words=st.lists(st.sampled_from(["true", "none", "inf", "x", "1", "a b", '"', "\\", "é", "]", ","])),
    limit=st.none() | st.integers(),
)


@settings(deadline=None)
@example([Everything(label="a\x85 b\u2028c: #\n\ud7ff")])
@given(st.lists(PASSES, max_size=3))
def test_text_and_yaml_round_trip_exactly(passes: list[Pass]) -> None:
    rendered = text.render(passes)
    assert text.parse(rendered) == passes
    assert text.render(text.parse(rendered)) == rendered
    written = text.to_yaml(passes)
    assert text.from_yaml(written) == passes
    assert text.to_yaml(text.from_yaml(written)) == written


def test_text_form() -> None:
    parsed = text.parse(' every-kind { share = 1 , flag=true,schedule=[1, -2],label="a b"} , every-kind{}, every-kind')
    assert parsed == [
        Everything(share=1.0, flag=True, schedule=(1, -2), label="a b"),
        Everything(),
        Everything(),
    ]
    assert (
        text.render(parsed) == 'every-kind{flag=true, share=1.0, label="a b", schedule=[1, -2]},every-kind,every-kind'
    )
    assert text.parse("every-kind{schedule=3}") == [Everything(schedule=(3,))]
    assert text.parse("") == []


@pytest.mark.parametrize(
    ("pipeline", "code", "says"),
    [
        ("every-kind{share=1.5}", "E-OPTION", "option share of every-kind, give a number from 0 to 1"),
        ("every-kind{share=high}", "E-OPTION", "'high' is not legal"),
        ("every-kind{count=true}", "E-OPTION", "give an integer from 0 to 1e+09"),
        ("every-kind{count=1.0}", "E-OPTION", "option count"),
        ("every-kind{flag=1}", "E-OPTION", "give true or false"),
        ("every-kind{score=magic}", "E-OPTION", "give one of fisher, optin"),
        ("every-kind{schedule=[1, 9]}", "E-OPTION", "a list, each an integer from -5 to 5"),
        ("every-kind{shore=1}", "E-OPTION", "did you mean share or score"),
        ("prune-head", "E-PASS", "did you mean prune-heads"),
        ("qqq", "E-PASS", "known are canonicalize"),
        ("every-kind{flag=true, flag=true}", "E-PASS", "given twice"),
        ("every-kind{flag}", "E-PASS", "= is expected"),
        ("every-kind{flag=}", "E-PASS", "a value is expected"),
        ("every-kind{flag=true", "E-PASS", "at the end of the pipeline"),
        ("every-kind every-kind", "E-PASS", "a comma between two passes"),
        ("every-kind,", "E-PASS", "the name of a pass"),
        ("every-kind;", "E-PASS", "no meaning here"),
        ("every-kind{schedule=[1,2}", "E-PASS", "a closing bracket"),
    ],
)
def test_mistakes_in_text(pipeline: str, code: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        text.parse(pipeline)
    assert caught.value.code == code
    assert says in str(caught.value)


@pytest.mark.parametrize("written", ["a: [", "just-words", "3", "- [1]", "- {a: 1, b: 2}", "- {every-kind: 3}"])
def test_mistakes_in_yaml(written: str) -> None:
    with pytest.raises(InputError, match="E-PASS"):
        text.from_yaml(written)


def test_python_options_are_checked_too() -> None:
    with pytest.raises(InputError, match="option share of every-kind"):
        Everything(share=float("nan"))


def test_report_counts_and_limit() -> None:
    report = PassReport(Everything())
    with application_limit(1):
        accepted = [report.accepts(item, reason) for item, reason in [("a", None), ("b", "causal"), ("c", None)]]
    assert accepted == [True, False, False]
    assert report.matched == 3
    assert report.reasons == {"causal": 1, "beyond-bisect-limit": 1}
    assert str(report) == "every-kind: 3 matched, 0 rewritten, 1 refused (causal), 1 refused (beyond-bisect-limit)"


def test_third_party_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    good = EntryPoint("every-kind", f"{__name__}:Everything", registry.ENTRY_POINT_GROUP)
    bad = EntryPoint("broken", "no_such_module:X", registry.ENTRY_POINT_GROUP)
    monkeypatch.undo()
    monkeypatch.setattr(registry, "_third_party", lambda: {"every-kind": good, "broken": bad})
    monkeypatch.setattr(EntryPoint, "load", lambda self: Everything if self is good else _fail())
    assert registry.create("every-kind", {"count": 1}) == Everything(count=1)
    assert "every-kind" in registry.names()
    with pytest.raises(InputError, match="broken"):
        registry.get("broken")


def _fail() -> None:
    raise ImportError("no module named no_such_module")


BOMB = "- a: &a [x, x]\n" + "".join(
    f"- {chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (BOMB, "aliases are not allowed"),
        ("- &a every-kind\n- *a", "aliases are not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("- every-kind: {schedule: " + "[" * 50 + "]" * 50 + "}", "nested too deeply"),
        ("- every-kind: {count: " + "9" * 6000 + "}", "digits"),
        ("- every-kind: {count: 0x" + "f" * 6000 + "}", "digits"),
        ("- every-kind: {count: 1, count: 2}", "given twice"),
        ("- every-kind: {label: 2001-99-99}", "plain YAML"),
        ("- !!python/object/apply:os.system ['true']", "plain YAML"),
        ("- every-kind: {count: !!int x}", "plain YAML"),
        ("- every-kind: {count: !!float x}", "plain YAML"),
        ("- every-kind: {count: !!timestamp x}", "plain YAML"),
        ("- every-kind: {? [a] : 1}", "plain YAML"),
        ("x" * 300_000, "300000 characters"),
        ("\0", "plain YAML"),
    ],
)
def test_yaml_that_grows_or_lies(written: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        text.from_yaml(written)
    assert says in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 6000, "-" + "9" * 6000, '"' + "\\ud800" * 3, "1e999"])
def test_text_that_grows(value: str) -> None:
    with pytest.raises(InputError):
        text.parse(f"every-kind{{count={value}}}")
