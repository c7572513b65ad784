"""Swap units until their removal hurts least together: what one unit does, another may undo."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def joint_loss(rows: Array, removed: Indices) -> float:
    """Second-order loss of removing units together: ``|sum of their gate gradients|^2`` (rows [n, units])."""
    return float(np.square(rows[:, removed].sum(axis=1)).sum())


def rearrange(rows: Array, removed: Indices) -> Indices:
    """Units to remove instead, as many, of no greater joint loss (the block Fisher matrix of Kwon et al., 2022).

    Each other unit, from the least important on, is taken in, and the member goes out without which the joint loss is
    least (it may be the one that just came).

    Args:
        rows: gate gradients [n, units].
        removed: units to start from.
    """
    fisher = rows.T @ rows
    inside = np.zeros(len(fisher), bool)
    inside[removed] = True
    pull = fisher[:, inside].sum(axis=1)
    diagonal = np.diag(fisher)
    outside = np.flatnonzero(~inside)
    for unit in outside[np.argsort(diagonal[outside], kind="stable")]:
        inside[unit] = True
        pull += fisher[:, unit]
        relief = np.where(inside, 2 * pull - diagonal, -np.inf)
        leaver = int(np.argmax(relief))
        # At a tie the newcomer leaves again: rounding must not swap units for nothing.
        leaver = int(unit) if relief[leaver] <= relief[unit] * (1 + 1e-12) else leaver
        inside[leaver] = False
        pull -= fisher[:, leaver]
    return np.flatnonzero(inside)
