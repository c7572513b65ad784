"""One case: the model file that a seed and an index stand for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from random import Random

import onnx

from tests.fuzz import blocks, semantics, structure
from tests.fuzz.seeds import DATA, MODEL, seeds

LEVELS = ("bytes", "structure", "semantics", "semantics")


@dataclass(frozen=True)
class Case:
    """A mutated model, the file of its external data, and the names of the mutations."""

    name: str
    level: str
    model: bytes
    data: bytes
    changes: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """The files, in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(self.model)
        if self.data:
            (folder / DATA).write_bytes(self.data)
        return folder / MODEL


def case(number: int, index: int, level: str | None = None) -> Case:
    """Case ``index`` of run ``number``; equal arguments give equal bytes.

    Args:
        level: what is mutated, when it is not for the index to say.
    """
    known = seeds()
    seed = known[index % len(known)]
    level = level or LEVELS[index // len(known) % len(LEVELS)]
    random = Random(f"{number}:{index}")
    if level == "bytes":
        in_data = bool(seed.data) and random.random() < 0.3
        mutated, changes = blocks.mutate(seed.data if in_data else seed.model, random)
        files = (seed.model, mutated) if in_data else (mutated, seed.data)
        return Case(seed.name, level, *files, tuple(changes))
    model = copy.deepcopy(seed.typed) if level == "semantics" else onnx.load_from_string(seed.model)
    changes = (semantics if level == "semantics" else structure).mutate(model, random)
    return Case(seed.name, level, model.SerializeToString(deterministic=True), seed.data, tuple(changes))
