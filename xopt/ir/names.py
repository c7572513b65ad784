"""Names that come from a file are data: where a name must be an identifier, it is made here, from a safe alphabet."""

from __future__ import annotations

import re

_KEPT = 40


def identifier(stem: str, number: int, name: str | None = "") -> str:
    """``stem_number_name``, in ASCII letters, digits and underscores, whatever ``name`` is.

    Two of one stem differ when their numbers do; what is kept of ``name`` is there for the reader.

    Args:
        stem: an identifier of our own.
        number: counts the names of this stem.
        name: what a file calls the thing; anything.
    """
    resemblance = re.sub(r"[^A-Za-z0-9]+", "_", (name or "")[: 4 * _KEPT]).strip("_")[:_KEPT]
    return f"{stem}_{number}_{resemblance}" if resemblance else f"{stem}_{number}"


def file_stem(name: str) -> str:
    """``name`` as a part of a file's name: ASCII letters, digits, dashes and underscores, at most 40 of them."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name[: 4 * _KEPT])[:_KEPT]
