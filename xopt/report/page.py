"""One self-contained HTML page: the chart, every step, the structure, the machine, the command."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xopt import console, ownership
from xopt.errors import InputError, visible
from xopt.ir.io import output_errors, replacing
from xopt.report.chart import figure
from xopt.report.record import LARGEST_FILE
from xopt.report.summary import judgement, quality, unmeasured, verdict


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page; InputError E-OUTPUT where that cannot be done, or where another file is."""
    with output_errors(path):
        if path.is_dir() or (path.is_file() and not _is_page(path)):
            what = "what is there is not a page that xopt has written, or it was changed since"
            raise InputError("E-OUTPUT", what, where=str(path), cure="name another file with -o")
        text = signed(render(report).encode(errors="backslashreplace").decode()).encode()
        with ownership.noted(path), replacing(path) as file:
            file.write(text)


def signed(page: str) -> str:
    """The page with its digest in the head, by which it is known for unchanged."""
    return page.replace(UNSIGNED, _signature(hashlib.sha256(page.encode()).hexdigest()), 1)


def _signature(digest: str) -> str:
    return f'<meta name="generator" content="xopt {digest}">'


UNSIGNED = _signature("0" * 64)
_SIGNATURE = re.compile(re.escape(UNSIGNED).replace("0" * 64, "([0-9a-f]{64})"))


def _is_page(path: Path) -> bool:
    """Whether a file is a page as `write_page` has left it."""
    if path.stat().st_size > LARGEST_FILE:
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _SIGNATURE.search(text)
    return found is not None and signed(text.replace(found[0], UNSIGNED, 1)) == text


def render(report: Mapping[str, Any]) -> str:
    """The page as text, not signed."""
    import jinja2

    loader = jinja2.PackageLoader("xopt.report", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters["size"] = console.size
    environment.filters["ms"] = console.milliseconds
    environment.filters["options"] = _options
    environment.filters["verdict"] = verdict
    environment.filters["quality"] = quality
    page: str = environment.get_template("page.html.j2").render(
        report=report,
        signature=UNSIGNED,
        chart=figure(report),
        cards=_cards(report),
        judgement=judgement(report),
        unmeasured=unmeasured(report),
        blocks=_blocks(report["structure"]),
        ops=_ops(report["structure"]),
    )
    return page


def _shown(value: Any) -> Any:
    """Text of names and paths shows what is in it, and does not turn what stands beside it around."""
    return visible(value) if type(value) is str else value


def _cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The result in four numbers: title, value, what it is compared with."""
    final, metric, before = report["final"], report["metric"], report["structure"]["before"]
    cards = [_latency_card(report)]
    lost = f"{quality(metric['baseline'])} before"
    cards.append({"title": metric["name"], "value": quality(final["quality"]), "note": lost})
    for title, key, unit in (("MACs", "macs", ""), ("weights", "bytes", "B")):
        share = final[key] / before[key] if before[key] else 1.0
        note = f"{share:.0%} of {console.size(before[key], unit)}"
        cards.append({"title": title, "value": console.size(final[key], unit), "note": note})
    return cards


def _latency_card(report: Mapping[str, Any]) -> dict[str, str]:
    latency = report["final"]["latency_ms"]
    if latency is None:
        return {"title": "latency", "value": "not measured", "note": unmeasured(report) or ""}
    note = f"p90 {latency['p90']:.3f} ms"
    if "onnxruntime" in report["runtimes"]:
        times = report["runtimes"]["onnxruntime"]["median_ms"] / latency["median"]
        note = f"{times:.2f}x as fast as the original in onnxruntime"
    return {"title": "latency", "value": f"{latency['median']:.3f} ms", "note": note}


def _blocks(structure: Mapping[str, Any]) -> list[tuple[int, str, str, str, str]]:
    """Block, attention before and after, FFN before and after."""
    before, after = structure["before"]["blocks"], structure["after"]["blocks"]
    rows = []
    for index in range(max(len(before), len(after))):
        old, new = (blocks[index] if index < len(blocks) else {} for blocks in (before, after))
        rows.append((index, _attention(old), _attention(new), _ffn(old), _ffn(new)))
    return rows


def _attention(block: Mapping[str, Any]) -> str:
    site = block.get("attention")
    if not site:
        return "none"
    grouped = f" ({site['kv_heads']} kv)" if site["kv_heads"] != site["heads"] else ""
    return f"{site['heads']} heads{grouped} of {site['head_dim']}"


def _ffn(block: Mapping[str, Any]) -> str:
    ffn = block.get("ffn")
    return f"{ffn['width']} wide{', gated' if ffn['gated'] else ''}" if ffn else "none"


def _ops(structure: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Operators whose number has changed: name, before, after."""
    before, after = structure["before"]["ops"], structure["after"]["ops"]
    names = sorted(before.keys() | after.keys())
    return [(op, before.get(op, 0), after.get(op, 0)) for op in names if before.get(op, 0) != after.get(op, 0)]


def _options(options: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key}={value}" for key, value in options.items() if value not in (None, "", [], ()))
    return shown
