"""Which axes of the scores are heads and which is the sequence, in whatever order and grouping a model has them.

    scores  [B,S,H,T], [B,G,R,S,T], [B,H*S,T], [S,B,H,T], ...     are all    [B][H][S][T]
The queries tell: heads lie beside the width of a head where these are one axis [B,S,H*d]; the rest of what keys do not
have is the sequence. Heads that share a key head (R of each of G) are the less significant part of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xopt.ir.canonical.layout import Axes, Axis, Digit, before, merged
from xopt.ir.canonical.moving import refined
from xopt.ir.canonical.operands import DEPTH, QUERY, per_head, scaling
from xopt.ir.edit import operand
from xopt.ir.poly import product
from xopt.ir.symbolic import Symbols

HEADS, BATCH = "heads", "batch"
"""Labels of the new axes."""


@dataclass(frozen=True)
class Roles:
    """Digits of the scores and what they are called instead; ``frame`` is [batch][heads][query], so called."""

    names: dict[Digit, Digit]
    frame: Axes

    def named(self, axes: Axes) -> Axes:
        """``axes`` of any tensor with the new names."""
        parts = refined(axes, (tuple(self.names),))
        return tuple(merged(tuple(self.names.get(digit, digit) for digit in row)) for row in parts)


def roles(symbols: Symbols, q: ir.Value, q_axes: Axes, k_axes: Axes, axes: Axes) -> Roles | None:
    """New names of the axes of the scores (without keys); None where the usual ones hold, or nothing tells.

    Args:
        axes: of the scores, without that of the keys.
    """
    heads, together = _heads(symbols, q, q_axes)
    labels, of_keys = [digit.label for digit in heads], {digit.label for row in k_axes for digit in row}
    if not heads or (len({*labels}) == 1 and QUERY not in labels and QUERY not in of_keys):
        return None
    digits = [digit for row in refined(axes, together) for digit in row]
    of_query = {digit.label for row in q_axes for digit in row}
    rest = [digit for digit in digits if digit not in heads]
    sequence = [digit for digit in rest if digit.label in of_query - of_keys]
    lead = [digit for digit in rest if digit not in sequence]
    if len(digits) != len(rest) + len(heads):
        return None
    own = [digit for digit in heads if digit.label in of_keys]
    ordered = [*own, *(digit for digit in heads if digit not in own)]
    names = _counted(ordered, HEADS) | _counted(sequence, QUERY)
    names |= {digit: digit if digit.label != QUERY else _relabelled(digit) for digit in lead}
    frame = [merged(tuple(names[digit] for digit in row)) for row in (lead, ordered, sequence)]
    return Roles(names, tuple(frame))


def _heads(symbols: Symbols, q: ir.Value, axes: Axes) -> tuple[Axis, Axes]:
    """The digits beside the width of a head in the earliest tensor where there are any, and all digits of that one; ()
    and () when there is none.
    """
    found: tuple[Axis, Axes] = (), ()
    while True:
        labels = {digit.label for digit in axes[-1]}
        if DEPTH in labels and len(axes) == 3 and (others := labels - {DEPTH, ""}):
            plain = tuple(tuple(_plain(digit) for digit in row) for row in axes)
            found = tuple(digit for digit in plain[-1] if digit.label in others), plain
        node, moved = q.producer(), before(symbols, q, axes)
        if node is None:
            return found
        if moved is not None:
            q, axes = moved
        elif (scaled := scaling(node)) is not None:
            q = scaled[0]
        elif per_head(symbols, node, axes, axes[2] if len(axes) == 4 else (), DEPTH, None):
            q = operand(node, 0)
        else:
            return found


def _counted(digits: list[Digit], label: str) -> dict[Digit, Digit]:
    """The digits as those of one number, the first one the most significant."""
    return {
        digit: Digit(label, digit.count, product(d.count for d in digits[place + 1 :]), digit.count)
        for place, digit in enumerate(digits)
    }


def _relabelled(digit: Digit) -> Digit:
    return Digit(BATCH, digit.count, digit.stride, digit.radix)


def _plain(digit: Digit) -> Digit:
    return Digit(digit.label, digit.count, digit.stride, digit.count)
