"""The results of `cpu.py` as a picture: for each case how long every runtime takes, in multiples of xopt's time.

python benchmarks/plot.py docs/benchmarks/cpu-fp32.json docs/benchmarks/cpu-fp32.svg
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

ROW, LEFT, WIDTH, TOP, BOTTOM = 24, 240, 560, 56, 40
COLORS = ["#0b6e4f", "#b23a48", "#2f6690", "#d08c28", "#7a5195", "#5b6b7b", "#3a9188"]
TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)


def picture(record: dict[str, Any]) -> str:
    """An SVG: a row for each case; a circle for each runtime, a bar for the machine's limit."""
    cases = record["cases"]
    names = list(dict.fromkeys(name for entry in cases.values() for name in entry["times_ms"]))
    colors = dict(zip(names, COLORS))
    ratios = [
        ms / entry["times_ms"]["xopt"]
        for entry in cases.values()
        for ms in [*entry["times_ms"].values(), entry["limit_ms"]]
    ]
    low, high = min(ratios) * 0.9, max(ratios) * 1.1

    def x(ratio: float) -> float:
        return LEFT + WIDTH * math.log(ratio / low) / math.log(high / low)

    height = TOP + ROW * len(cases) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        *_legend(colors),
        *_axis([tick for tick in TICKS if low <= tick <= high], x, height),
    ]
    for row, (case, entry) in enumerate(cases.items()):
        parts += _row(case, entry, TOP + ROW * row + ROW / 2, x, colors)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(colors: dict[str, str]) -> list[str]:
    parts, left = [], 12.0
    for name, color in colors.items():
        parts.append(f'<circle cx="{left}" cy="18" r="5" fill="{color}"/>')
        parts.append(f'<text x="{left + 9}" y="22">{escape(name)}</text>')
        left += 24 + 7 * len(name)
    parts.append(f'<path d="M{left} 12v12" stroke="black" stroke-width="2"/>')
    parts.append(f'<text x="{left + 8}" y="22">limit of arithmetic and memory</text>')
    return parts


def _axis(ticks: list[float], x: Any, height: float) -> list[str]:
    parts = []
    for tick in ticks:
        color = "#0b6e4f" if tick == 1 else "#ddd"
        parts.append(f'<path d="M{x(tick):.1f} {TOP}V{height - BOTTOM}" stroke="{color}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    note = "time in multiples of xopt's; * something else ran on the machine"
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{height - 6}" text-anchor="middle">{note}</text>')
    return parts


def _row(case: str, entry: dict[str, Any], y: float, x: Any, colors: dict[str, str]) -> list[str]:
    ours = entry["times_ms"]["xopt"]
    mark = " *" if entry["disturbed"] else ""
    label = f"{case.replace(' batch ', ', batch ').replace(' threads ', ', threads ')}: {ours:.3g} ms{mark}"
    at = x(entry["limit_ms"] / ours)
    parts = [
        f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(label)}</text>',
        f'<path d="M{at:.1f} {y - 7}v14" stroke="black" stroke-width="2"/>',
    ]
    for name, ms in entry["times_ms"].items():
        title = escape(f"{name}: {ms:.4g} ms, {ms / ours:.2f} times xopt's")
        circle = f'<circle cx="{x(ms / ours):.1f}" cy="{y}" r="5" fill="{colors[name]}">'
        parts.append(f"{circle}<title>{title}</title></circle>")
    return parts


if __name__ == "__main__":
    source, output = (Path(argument) for argument in sys.argv[1:])
    output.write_text(picture(json.loads(source.read_text())))
