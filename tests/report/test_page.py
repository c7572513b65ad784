"""The page in a real browser: no script error, every point, nothing from the network."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report import sample
from xopt import console, folder
from xopt.errors import InputError
from xopt.report import chart, page, record, summary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = [
    str(CHROMIUM),
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=10000",
    "--enable-logging=stderr",
    "--v=0",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page as the browser has built it, and what the browser logged."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("page")
    page.write_page(sample.report(), folder / "report.html")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [*BROWSER, profile, "--dump-dom", f"file://{folder / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, done.stderr


def test_no_script_fails(opened: tuple[str, str]) -> None:
    console = [line for line in opened[1].splitlines() if "CONSOLE" in line]
    assert not [line for line in console if re.search("error|exception|refused|failed", line, re.IGNORECASE)]


def test_every_point_is_drawn_with_its_name(opened: tuple[str, str]) -> None:
    dom = opened[0]
    points = chart.points(sample.report())
    assert len(re.findall(r'<path class="point[ "]', dom)) == len(points)
    labels = re.findall(r'class="annotation-text"[^>]*>([^<]*)<', dom)
    assert sorted(labels) == sorted([*(point.name for point in points), "budget"])


def test_every_step_and_runtime_is_in_the_tables(opened: tuple[str, str]) -> None:
    dom = opened[0]
    report = sample.report()
    steps = dom[dom.index('id="steps"') : dom.index("</table>", dom.index('id="steps"'))]
    for step in report["steps"]:
        assert f"<b>{step['pass']}</b>" in steps and step["reason"].replace(">", "&gt;") in steps
    for name in ("openvino", "torch", "onnxruntime"):
        assert f"<b>{name}</b>" in dom
    assert report["command"].replace("'", "&#39;") in dom or report["command"] in dom
    assert "4 heads of 16 → <b>3 heads of 16</b>" in dom
    assert report["machine"]["cpu"] in dom


def test_a_page_that_throws_would_be_noticed(tmp_path: Path) -> None:
    """The check above can fail: a broken script is logged as an uncaught error."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    (tmp_path / "bad.html").write_text("<script>nowhere.to.be.found()</script>")
    command = [*BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'bad.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" in done.stderr and "ReferenceError" in done.stderr


class References(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]


def test_nothing_is_fetched() -> None:
    text = page.render(sample.report())
    references = References()
    references.feed(text)
    assert references.found == ["data:,"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_text_from_a_model_cannot_become_markup() -> None:
    report = sample.report()
    evil = "<script>alert(1)</script>"
    report["model"] = evil
    report["steps"][-1]["refused"] = [{"what": evil, "reason": evil}]
    report["steps"][-1]["reason"] = evil
    assert evil not in page.render(report)


def test_text_in_the_chart_cannot_become_a_link() -> None:
    report = sample.report()
    evil = '<a href="https://elsewhere">&lt;'
    report["metric"]["name"] = report["steps"][-1]["pass"] = report["steps"][-1]["reason"] = evil
    report["runtimes"][evil] = report["runtimes"]["onnxruntime"]
    drawn = chart.figure(report)
    drawn = drawn[drawn.rindex("Plotly.newPlot") :]
    assert "elsewhere" in drawn and "&amp;lt;" in drawn.replace(r"\u0026", "&")
    assert "<a" not in drawn and r"\u003ca" not in drawn


def test_what_a_page_says_is_what_it_shows(tmp_path: Path) -> None:
    """Not in another direction, and without characters that no file holds, as they are in paths that are not UTF-8."""
    report = sample.report()
    evil = "a\u202eb\x1b\0\udcff"
    report["model"] = report["command"] = evil
    report["steps"][-1] |= {"reason": evil, "pass": evil, "refused": [{"what": evil, "reason": evil}]}
    page.write_page(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = text[: text.index("<script")] + text[text.rindex("</script>") :]
    assert not set("\u202e\x1b\0") & set(text)
    assert text.count(r"a\u202eb\x1b\x00\udcff") >= 5


def test_exact_passes_in_a_row_are_one_point() -> None:
    points = chart.points(sample.report())
    kept = [point.name for point in points if point.kind == chart.KEPT]
    assert kept == ["exact passes", "prune-heads"]
    assert [point.name for point in points if point.kind == chart.LEFT_OUT] == ["merge-tokens"]


def test_without_latency_the_axis_is_work(tmp_path: Path) -> None:
    report = sample.report()
    report["runtimes"] = {}
    report["target"] = {"name": "arm", "runs_here": False, "features": []}
    report["final"]["latency_ms"] = None
    for step in report["steps"]:
        step["latency_ms"] = None
    assert [point.x for point in chart.points(report)] == [112e6, 84e6, 70e6]
    text = page.render(report)
    assert "Latency not measured: arm does not run on this machine" in text
    assert "multiply-accumulates of one run" in text


def test_a_report_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(record.to_json(sample.report()))
    assert record.read(tmp_path / "report.json") == json.loads(json.dumps(sample.report()))


@pytest.mark.parametrize("change", [{"schema": 99}, {"kind": "other"}])
def test_another_schema_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    report = copy.deepcopy(sample.report()) | change
    (tmp_path / "report.json").write_text(record.to_json(report))
    with pytest.raises(InputError, match="not a report of schema 1"):
        record.read(tmp_path / "report.json")


def test_numbers_that_are_not_finite_become_null() -> None:
    report = sample.report()
    report["steps"][0]["quality"] = float("nan")
    report["steps"][0]["drop"] = float("inf")
    again = json.loads(record.to_json(report))
    assert again["steps"][0]["quality"] is None and again["steps"][0]["drop"] is None


def test_a_report_of_numbers_that_are_not_finite_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = copy.deepcopy(sample.report())
    report["metric"]["baseline"] = report["final"]["quality"] = float("nan")
    for step in report["steps"]:
        step["quality"] = float("inf")
    report["verification"] = {"compared": True, "outputs": {"y": {"max_abs": 1e20, "scale": 1e30}}}
    (tmp_path / "report.json").write_text(record.to_json(report))
    for shown in (report, record.read(tmp_path / "report.json")):
        assert "not finite before" in page.render(shown)
        summary.print_report(shown)
        assert "of the original not finite" in capsys.readouterr().out
        console.emit(summary.brief(shown))
        assert json.loads(capsys.readouterr().out)["metric"]["baseline"] is None


# -- altered reports ---------------------------------------------------------------------------------------------------
def altered() -> list[tuple[str, Any]]:
    """The report with each part of it left out, or something else in its place."""
    found: list[tuple[str, Any]] = []

    def visit(part: Any, place: tuple[Any, ...]) -> None:
        keys: list[Any] = list(part) if isinstance(part, dict) else list(range(len(part)))
        for key in keys:
            for value in (..., None, "text", 0, 10**400, 1e299, [[]]):
                changed = copy.deepcopy(sample.report())
                inner = changed
                for step in place:
                    inner = inner[step]
                if value is ...:
                    del inner[key]
                else:
                    inner[key] = value
                found.append(("/".join(map(str, (*place, key))) + f" = {str(value)[:20]}", changed))
            if isinstance(part[key], (dict, list)):
                visit(part[key], (*place, key))

    visit(sample.report(), ())
    return found


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_an_altered_report_is_refused_or_shown(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that comes out of a file makes the table or the page fail."""
    monkeypatch.setattr(page, "figure", lambda report: str(chart._layout("", "", chart.points(report), None)))
    refused, reports = 0, altered()[::every]
    for name, report in reports:
        path = tmp_path / "report.json"
        path.write_text(json.dumps(report))
        try:
            content = record.read(path)
        except InputError:
            refused += 1
            continue
        try:
            page.render(content)
            summary.print_report(content)
            json.dumps(summary.brief(content))
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert 500 // every < refused < len(reports)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 5000, "\x00", "9" * 5000, "1e400", "null", "[]", "\ud800"]
)
def test_text_that_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, errors="surrogatepass")
    with pytest.raises(InputError) as caught:
        record.read(tmp_path / "report.json")
    assert caught.value.code == "E-FORMAT"


def test_a_device_is_no_report() -> None:
    with pytest.raises(InputError, match="the report is a device"):
        record.read(Path("/dev/zero"))


# -- where the page is written -----------------------------------------------------------------------------------------
def test_a_page_is_written_again_but_not_when_it_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for model in ("one", "two"):
        page.write_page({**sample.report(), "model": model}, path)
        assert f"xopt: {model}" in path.read_text()
    path.write_text(path.read_text().replace("two", "three"))
    with pytest.raises(InputError, match="changed since"):
        page.write_page(sample.report(), path)
    assert "three" in path.read_text()
    path.write_text("<html>my own page</html>")
    with pytest.raises(InputError, match="not a page that xopt has written"):
        page.write_page(sample.report(), path)
    assert path.read_text() == "<html>my own page</html>"


def test_a_page_that_is_written_again_is_still_a_result(tmp_path: Path) -> None:
    with folder.replacing(tmp_path / "out") as fresh:
        page.write_page(sample.report(), fresh / "report.html")
    page.write_page({**sample.report(), "model": "again"}, tmp_path / "out" / "report.html")
    folder.check(tmp_path / "out")
    page.write_page(sample.report(), tmp_path / "out" / "mine.html")
    with pytest.raises(InputError, match=r"mine\.html"):
        folder.check(tmp_path / "out")
