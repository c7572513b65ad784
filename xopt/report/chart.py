"""Accuracy against latency, a point for each step and each peer."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from xopt.errors import visible

KEPT, LEFT_OUT, PEER = "kept", "left out", "original model in other runtimes"
PORTABLE = "optimized model.onnx in onnxruntime"
FAR_APART = 8.0
"""Ratio of the slowest to the fastest from which on the axis is logarithmic."""
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
        if not _is_finite(step["quality"]):
            continue
        latency = step["latency_ms"]
        x = latency["median"] if measured and latency else step["macs"]
        p90 = latency["p90"] if measured and latency else None
        found.append(Point(_plain(name), KEPT if kept else LEFT_OUT, x, step["quality"], p90, _plain(note)))
    final = report["final"]
    for name, times in report["runtimes"].items():
        portable = name == "onnxruntime-optimized"
        y = _portable_quality(final) if portable else report["metric"]["baseline"]
        if not _is_finite(y):
            continue
        kind = PORTABLE if portable else PEER
        found.append(
            Point("onnxruntime" if portable else _plain(name), kind, times["median_ms"], y, times["p90_ms"], "")
        )
    return found


def _plain(text: str) -> str:
    """Text as plotly shows it: it takes tags, links among them, and entities for what they mean."""
    return html.escape(visible(text), quote=False)


def _is_finite(quality: float | None) -> TypeGuard[float]:
    return quality is not None and math.isfinite(quality)


def _portable_quality(final: Mapping[str, Any]) -> float | None:
    """Of model.onnx in onnxruntime, where it was measured apart from the artifact's."""
    found = final.get("onnx_quality")
    quality: float | None = final["quality"] if found is None else found
    return quality


def figure(report: Mapping[str, Any]) -> str:
    """The chart as a piece of HTML with plotly inside, which needs nothing from outside."""
    import plotly.graph_objects as go

    found = points(report)
    chart = go.Figure()
    for kind, look in _LOOK.items():
        chosen = [point for point in found if point.kind == kind]
        if chosen:
            chart.add_trace(_trace(go, kind, look, chosen))
    budget = _budget(report["metric"])
    timed = any(step["latency_ms"] for step in report["steps"])
    x_title = _x_title(report) if timed else "multiply-accumulates of one run"
    chart.update_layout(_layout(x_title, _plain(report["metric"]["name"]), found, budget))
    if budget is not None:
        chart.add_hline(
            budget,
            line={"dash": "dot", "color": "#c9a227", "width": 1.5},
            annotation={"text": "budget", "font": {"color": "#8a6d0b", "size": 12}, "x": 1, "xanchor": "right"},
        )
    page: str = chart.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="chart",
        config={"displaylogo": False, "displayModeBar": False, "responsive": True},
    )
    return page


def _trace(go: Any, kind: str, look: Mapping[str, Any], chosen: Sequence[Point]) -> Any:
    spread = [0 if point.p90 is None else max(point.p90 - point.x, 0) for point in chosen]
    return go.Scatter(
        name=kind,
        x=[point.x for point in chosen],
        y=[point.y for point in chosen],
        text=[point.name for point in chosen],
        customdata=[[point.note, point.p90] for point in chosen],
        mode="lines+markers" if kind == KEPT else "markers",
        line={"color": "#9cc5b2", "width": 1.5},
        marker={**look, "line": {"width": 2, "color": look["color"]}},
        error_x={"type": "data", "symmetric": False, "array": spread, "color": "#c4ccd4", "thickness": 1, "width": 3},
        hovertemplate="<b>%{text}</b><br>%{x:.4g}, quality %{y:.4f}<br>%{customdata[0]}<extra></extra>",
    )


def _budget(metric: Mapping[str, Any]) -> float | None:
    """The quality that must be kept, where it is a difference."""
    if metric["max_drop"] is None or not metric["higher_is_better"] or not _is_finite(metric["baseline"]):
        return None
    return float(metric["baseline"] - metric["max_drop"])


def _labels(found: Sequence[Point], logarithmic: bool) -> list[dict[str, Any]]:
    """A name at each point, from left to right at changing heights, so that neighbours do not cover each other."""
    heights = (-26, 30, -46, 50)
    return [
        {
            "x": math.log10(point.x) if logarithmic else point.x,
            "y": point.y,
            "text": point.name,
            "font": {"size": 12, "color": _LOOK[point.kind]["color"]},
            "ax": 0,
            "ay": heights[place % len(heights)],
            "arrowhead": 0,
            "arrowwidth": 0.8,
            "arrowcolor": "#b8c2cb",
            "standoff": 8,
        }
        for place, point in enumerate(sorted(found, key=lambda point: point.x))
    ]


def _x_range(found: Sequence[Point]) -> tuple[bool, list[float]]:
    """Whether the axis is logarithmic (points far apart), and its ends; bars to the p90 may reach beyond."""
    if not found:
        return False, [0, 1]
    low, high = min(point.x for point in found), max(point.x for point in found)
    if low > 0 and high / low > FAR_APART:
        return True, [math.log10(low / 1.6), math.log10(high * 1.6)]
    return False, [0, high * 1.12 or 1]


def _scale(logarithmic: bool, ends: Sequence[float]) -> dict[str, Any]:
    """Type and marks of the axis: 1, 2 and 5 of each decade on a logarithmic one."""
    if not logarithmic:
        return {"type": "linear"}
    decades = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    marks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]}


def _y_range(found: Sequence[Point], budget: float | None) -> list[float]:
    values = [point.y for point in found] + ([] if budget is None else [budget])
    if not values:
        return [0, 1]
    room = max((max(values) - min(values)) * 0.3, abs(max(values)) * 0.005, 1e-6)
    return [min(values) - room, max(values) + room]


def _x_title(report: Mapping[str, Any]) -> str:
    return f"milliseconds a run, median and p90 ({report['threads']} threads)"


def _layout(x_title: str, y_title: str, found: Sequence[Point], budget: float | None) -> dict[str, Any]:
    axis = {"gridcolor": "#e8ecf0", "zeroline": False, "linecolor": "#c4ccd4", "ticks": "outside", "automargin": True}
    logarithmic, ends = _x_range(found)
    return {
        "template": "plotly_white",
        "height": 440,
        "margin": {"l": 70, "r": 30, "t": 20, "b": 60},
        "font": {"family": "Inter, 'Segoe UI', system-ui, sans-serif", "size": 13, "color": "#22303c"},
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "xaxis": {**axis, "title": x_title, "range": ends, **_scale(logarithmic, ends)},
        "yaxis": {**axis, "title": y_title, "range": _y_range(found, budget)},
        "annotations": _labels(found, logarithmic),
        "hoverlabel": {"bgcolor": "white"},
    }
