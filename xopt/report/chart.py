"""Accuracy against latency, a point for each step and each peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT, LEFT_OUT, PEER = "kept", "left out", "original model in other runtimes"
PORTABLE = "optimized model.onnx in onnxruntime"
_LOOK = {
    KEPT: {"color": "#0b6e4f", "symbol": "circle", "size": 12},
    LEFT_OUT: {"color": "#b23a48", "symbol": "x-thin-open", "size": 10},
    PEER: {"color": "#5b6b7b", "symbol": "square-open", "size": 11},
    PORTABLE: {"color": "#2f6690", "symbol": "diamond-open", "size": 12},
}


@dataclass(frozen=True)
class Point:
    """One mark: ``x`` is milliseconds, or multiply-accumulates where latency was not measured."""

    name: str
    kind: str
    x: float
    y: float
    p90: float | None
    note: str


def points(report: Mapping[str, Any]) -> list[Point]:
    """All points; exact passes in a row are one, as they are measured together."""
    found: list[Point] = []
    measured = any(step["latency_ms"] for step in report["steps"])
    exact: list[str] = []
    for step, following in zip(report["steps"], [*report["steps"][1:], None]):
        if not step["rewritten"] and step["effect"] == "lossy":
            continue
        if step["effect"] == "exact":
            exact.append(step["pass"])
            if following is not None and following["effect"] == "exact":
                continue
        name = "exact passes" if step["effect"] == "exact" else step["pass"]
        kept = step["kept"] or step["effect"] == "exact"
        note = ", ".join(exact) if step["effect"] == "exact" else step["reason"]
        exact = []
        if step["quality"] is None:
            continue
        latency = step["latency_ms"]
        x = latency["median"] if measured and latency else step["macs"]
        p90 = latency["p90"] if measured and latency else None
        found.append(Point(name, KEPT if kept else LEFT_OUT, x, step["quality"], p90, note))
    final = report["final"]
    for name, times in report["runtimes"].items():
        portable = name == "onnxruntime-optimized"
        y = final["quality"] if portable else report["metric"]["baseline"]
        kind = PORTABLE if portable else PEER
        found.append(Point("onnxruntime" if portable else name, kind, times["median_ms"], y, times["p90_ms"], ""))
    return found


def figure(report: Mapping[str, Any]) -> str:
    """The chart as a piece of HTML with plotly inside, which needs nothing from outside."""
    import plotly.graph_objects as go

    chart = go.Figure()
    found = points(report)
    places = _label_places(found)
    for kind, look in _LOOK.items():
        chosen = [point for point in found if point.kind == kind]
        if chosen:
            chart.add_trace(_trace(go, kind, look, chosen, [places[id(point)] for point in chosen]))
    metric = report["metric"]
    if metric["max_drop"] is not None and metric["higher_is_better"]:
        note = f"budget: {metric['max_drop']:g} below the original"
        chart.add_hline(
            metric["baseline"] - metric["max_drop"],
            line={"dash": "dot", "color": "#c9a227", "width": 1.5},
            annotation={"text": note, "font": {"color": "#8a6d0b", "size": 12}, "x": 0, "xanchor": "left"},
        )
    timed = any(step["latency_ms"] for step in report["steps"])
    chart.update_layout(_layout(_x_title(report) if timed else "multiply-accumulates of one run", metric["name"]))
    html: str = chart.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="chart",
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
    )
    return html


def _trace(go: Any, kind: str, look: Mapping[str, Any], chosen: Sequence[Point], places: Sequence[str]) -> Any:
    spread = [0 if point.p90 is None else max(point.p90 - point.x, 0) for point in chosen]
    return go.Scatter(
        name=kind,
        x=[point.x for point in chosen],
        y=[point.y for point in chosen],
        text=[point.name for point in chosen],
        customdata=[[point.note, point.p90] for point in chosen],
        mode="lines+markers+text" if kind == KEPT else "markers+text",
        line={"color": "#9cc5b2", "width": 1.5},
        marker={**look, "line": {"width": 2, "color": look["color"]}},
        textposition=list(places),
        textfont={"size": 12, "color": look["color"]},
        error_x={"type": "data", "symmetric": False, "array": spread, "color": "#c4ccd4", "thickness": 1, "width": 3},
        hovertemplate="<b>%{text}</b><br>%{x:.4g}, quality %{y:.4f}<br>%{customdata[0]}<extra></extra>",
        cliponaxis=False,
    )


def _label_places(found: Sequence[Point]) -> dict[int, str]:
    """Above and below in turn, from left to right, so that labels of neighbours do not cover each other."""
    ordered = sorted(found, key=lambda point: point.x)
    return {id(point): ("top center", "bottom center")[i % 2] for i, point in enumerate(ordered)}


def _x_title(report: Mapping[str, Any]) -> str:
    return f"milliseconds a run, median and p90 ({report['threads']} threads)"


def _layout(x_title: str, y_title: str) -> dict[str, Any]:
    axis = {"gridcolor": "#e8ecf0", "zeroline": False, "linecolor": "#c4ccd4", "ticks": "outside", "automargin": True}
    return {
        "template": "plotly_white",
        "height": 440,
        "margin": {"l": 70, "r": 30, "t": 20, "b": 60},
        "font": {"family": "Inter, 'Segoe UI', system-ui, sans-serif", "size": 13, "color": "#22303c"},
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "xaxis": {**axis, "title": x_title, "rangemode": "tozero"},
        "yaxis": {**axis, "title": y_title},
        "hoverlabel": {"bgcolor": "white"},
    }
