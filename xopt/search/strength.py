"""Weaker versions of a pass, by the options that it declares as its strength (:class:`xopt.pipeline.base.Strength`)."""

from __future__ import annotations

import dataclasses
import math

from xopt.pipeline.base import Option, OptionValue, Pass


def weaker(one: Pass, share: float) -> Pass | None:
    """``one`` with its strength reduced to ``share`` (0 to 1) of what it is.

    Returns:
        The weaker pass, or None where the pass declares no strength or nothing would be left of it.
    """
    strengths = {name: option for name, option in one.options().items() if option.harmless is not None}
    changed = {name: _reduced(getattr(one, name), option, share) for name, option in strengths.items()}
    alive = any(not _is_harmless(value, strengths[name]) for name, value in changed.items())
    return dataclasses.replace(one, **changed) if alive else None


def _reduced(value: OptionValue, option: Option, share: float) -> OptionValue:
    if isinstance(value, tuple):
        return tuple(_reduced(item, option, share) for item in value)
    if value is None or not isinstance(value, (int, float)):
        return value
    assert option.harmless is not None
    moved = option.harmless + share * (value - option.harmless)
    if option.kind is int:
        return math.floor(moved) if value > option.harmless else math.ceil(moved)
    return round(moved, 4)


def _is_harmless(value: OptionValue, option: Option) -> bool:
    if isinstance(value, tuple):
        return all(_is_harmless(item, option) for item in value)
    return value is None or value == option.harmless
