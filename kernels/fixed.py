"""For families with nothing to tune: one configuration, which is their whole space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xopt.kernels.isa import Isa


@dataclass(frozen=True)
class Config:
    """Nothing to choose: such kernels make one pass, and memory bounds them."""


def space(workload: Any, isa: Isa) -> Iterator[Config]:
    yield Config()


def heuristic(workload: Any, isa: Isa) -> Config:
    return Config()
