"""The form of report.json (docs/cli-json.md): what `read` accepts, and so what the table and the page can count on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 1e300
"""Of a number in a report."""
LONGEST = 10_000
"""Items of a list or an object."""
DEEPEST = 4
"""Levels of a value that is only shown."""
Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_time(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_plain(value: Any, depth: int = DEEPEST) -> bool:
    """Whatever is only shown, of moderate depth and length."""
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and len(value) <= LONGEST and all(_is_plain(item, depth - 1) for item in inner)
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


def _is_verification(value: Any) -> bool:
    """What `xopt.search.proof` says."""
    compared = {"outputs": _Each({"max_abs": _is_number, "scale": _is_number})}
    return fault(value, compared if isinstance(value, dict) and value.get("compared") else {"reason": _is_text}) is None


class _Maybe:
    """Nothing, or what has the form."""

    def __init__(self, form: Any) -> None:
        self.form = form


class _Optional(_Maybe):
    """The same, which earlier versions did not write."""


class _Each:
    """A dict whose values have the form, under any names."""

    def __init__(self, form: Any) -> None:
        self.form = form


_TIMES = {"median": _is_time, "p90": _is_time}
_SIZES = {"macs": _is_count, "bytes": _is_count, "parameters": _is_count}
_ATTENTION = {"heads": _is_count, "kv_heads": _is_count, "head_dim": _is_count}
_BLOCK = {"attention": _Maybe(_ATTENTION), "ffn": _Maybe({"width": _is_count, "gated": _is_flag})}
_FACTS = {**_SIZES, "blocks": [_BLOCK], "ops": _Each(_is_count)}
_STEP = {
    "pass": _is_text,
    "text": _is_text,
    "options": _Each(_is_plain),
    "kept": _is_flag,
    "reason": _is_text,
    "effect": _is_text,
    "quality": _Maybe(_is_number),
    "latency_ms": _Maybe(_TIMES),
    "macs": _is_count,
    "bytes": _is_count,
    "matched": _is_count,
    "rewritten": _is_count,
    "refused": [{"what": _is_text, "reason": _is_text}],
    "numbers": _Each(_is_plain),
    "trials": [{"options": _Each(_is_plain), "verdict": _is_text}],
}
REPORT = {
    "created": _is_text,
    "command": _is_text,
    "model": _is_text,
    "target": {"name": _is_text, "runs_here": _is_flag},
    "machine": {
        "cpu": _is_text,
        "features": [_is_text],
        "cores": _is_count,
        "usable_cores": _is_count,
        "memory": _is_count,
        "system": _is_text,
        "python": _is_text,
        "load": _is_count,
        "versions": _Each(_is_text),
    },
    "threads": _is_count,
    "seed": _is_number,
    "feeds": _Each([_is_count]),
    "metric": {
        "name": _is_text,
        "higher_is_better": _is_flag,
        "baseline": _Maybe(_is_number),
        "max_drop": _Maybe(_is_number),
        "samples": _is_count,
        "data": _is_text,
        "synthetic": _is_flag,
    },
    "steps": [_STEP],
    "final": {
        **_SIZES,
        "quality": _Maybe(_is_number),
        "latency_ms": _Maybe(_TIMES),
        "judged": _Optional(_is_text),
        "onnx_quality": _Optional(_is_number),
        "drop": _Optional(_is_number),
    },
    "precision": _Optional({"name": _is_text, "quality": _Maybe(_is_number), "drop": _Maybe(_is_number)}),
    "runtimes": _Each({"median_ms": _is_time, "p90_ms": _is_time}),
    "skipped": _Each(_is_text),
    "missing": _Optional(_is_text),
    "segments": _Optional([_is_text]),
    "structure": {"before": _FACTS, "after": _FACTS},
    "verification": _Maybe(_is_verification),
    "output": _Maybe(_is_text),
}


def fault(value: Any, form: Any = REPORT, place: str = "") -> str | None:
    """What does not have its form, as a clause that names the place; None when everything does.

    Args:
        value: of JSON.
        form: a check; a dict of forms by key (others may come beside); a list of the form that each item has.
        place: of the value, for the clause.
    """
    if isinstance(form, _Maybe):
        return None if value is None else fault(value, form.form, place)
    if isinstance(value, (list, dict)) and len(value) > LONGEST:
        return f"{place.rstrip('.')} has {len(value)} parts"
    if isinstance(form, (dict, _Each)):
        if not isinstance(value, Mapping):
            return f"{place or 'it'} is not an object"
        parts = form.items() if isinstance(form, dict) else [(key, form.form) for key in value]
        missing = next((key for key, inner in parts if key not in value and not isinstance(inner, _Optional)), None)
        if missing is not None:
            return f"{place}{missing} is missing"
        return next((wrong for key, inner in parts if (wrong := fault(value.get(key), inner, f"{place}{key}."))), None)
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place.rstrip('.')} is not a list"
        items = enumerate(value)
        return next((wrong for i, item in items if (wrong := fault(item, form[0], f"{place}{i}."))), None)
    return None if form(value) else f"{place.rstrip('.')} has a value that it cannot have"
