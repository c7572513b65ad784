"""What canonicalize did: counts per rewrite, the attention sites found, and what it left alone and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refused:
    """A place that looked like ``what`` and was left as it is, because of ``reason``."""

    what: str
    node: str
    reason: str


class NotAttentionError(Exception):
    """The softmax is none of an attention, or of one that cannot be written as an ``Attention``; the message is the
    reason.
    """


@dataclass
class CanonicalizeReport:
    """Filled by the steps as they go.

    Attributes:
        counts: rewrite name (``"layer-normalization"``, ``"gelu-erf"``…) to the number of places rewritten.
        attention: names of the ``Attention`` nodes of the canonical graph, in graph order.
        refused: places left alone, with the reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    attention: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def rewrote(self, what: str, count: int = 1) -> None:
        """Count ``count`` places where ``what`` was rewritten."""
        if count:
            self.counts[what] += count

    def refuse(self, what: str, node: str | None, reason: str) -> None:
        """Note that ``node`` looked like ``what`` but was left alone."""
        self.refused.append(Refused(what, node or "?", reason))
