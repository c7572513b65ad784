"""Altered artifacts: the files that ``xopt compile`` writes, with right digests where that lets more through.

A manifest whose digest fits an altered *library* is code that the user chose to run; a library is therefore cut short,
or replaced by something that is none, but its code is not edited. Numbers in the weights may change, too: the outputs
then are others, and need only come without a crash.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx

from tests.fuzz import blocks, reference
from tests.fuzz.cases import Case
from tests.fuzz.children import Phase
from tests.fuzz.seeds import ROOT, seeds

MODELS = ("digits", "bert", "decoder")
FOLDER = ROOT / "out" / "fuzz" / "artifacts"
LIBRARY, WEIGHTS, MANIFEST = "model.so", "model.weights", "manifest.json"
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 63, 64, 999, 1 << 31, 1 << 63, -(1 << 70), 0.5, float("nan"), float("inf"),
    "", "x", "float64", "int8", "float32", "object", "S5", "\x00", "\ud800", "../../etc/passwd", "n" * 70_000,
    [], {}, [[]], [1], {"a": 1}, ["batch", "batch"], [-1, 3], [1 << 40], [0],
)  # fmt: skip


@dataclass(frozen=True)
class Altered:
    """An artifact's files after some changes.

    Attributes:
        level: the file that was changed.
        same: whether it computes the same when it runs at all.
    """

    name: str
    level: str
    changes: tuple[str, ...]
    files: dict[str, bytes]
    same: bool


@functools.cache
def originals(name: str) -> dict[str, bytes]:
    """The files of a compiled seed, which is compiled by another process where it has not been before."""
    folder = FOLDER / name
    if not (folder / MANIFEST).is_file():
        seed = next(seed for seed in seeds() if seed.name == name)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            model = Case(name, "", seed.model, seed.data).write(Path(temporary))
            words = ["compile", str(model), "-o", f"{temporary}/out", "--no-database"]
            code = f"import sys; sys.path.append({str(ROOT)!r}); from xopt.cli import main; main()"
            subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
            shutil.copytree(f"{temporary}/out", folder)
    return {file: (folder / file).read_bytes() for file in (LIBRARY, WEIGHTS, MANIFEST)}


def altered(number: int, index: int, level: str | None = None) -> Altered:
    """Artifact ``index`` of run ``number``; equal arguments give equal files."""
    name = MODELS[index % len(MODELS)]
    random = Random(f"artifact:{number}:{index}")
    files = dict(originals(name))
    change = random.choices(CHANGES, weights=[weight for _, weight in WEIGHTED])[0]
    same = change(files, random)
    file = next((file for file in files if files[file] != originals(name)[file]), "none")
    return Altered(name, file, (change.__name__,), files, same)


def raw(files: dict[str, bytes], random: Random) -> bool:
    """Bytes of one file, as a bad disk has them."""
    file = random.choice(sorted(files))
    files[file], _ = blocks.mutate(files[file], random)
    return True


def missing(files: dict[str, bytes], random: Random) -> bool:
    del files[random.choice(sorted(files))]
    return True


def cut_library(files: dict[str, bytes], random: Random) -> bool:
    """A library that ends early, or is another kind of file, and has the digest that the manifest wants."""
    whole = files[LIBRARY]
    files[LIBRARY] = random.choice((
        whole[: random.randrange(len(whole))], whole[: random.randrange(1, 80)], b"", b"\x7fELF", b"#!/bin/sh\n",
        whole[: -random.randrange(1, 5000)], whole[:64] + bytes(len(whole) - 64),
    ))  # fmt: skip
    _sign(files)
    return True


def other_weights(files: dict[str, bytes], random: Random) -> bool:
    """Numbers, or the length, of the weights, with the right digest."""
    files[WEIGHTS], _ = blocks.mutate(files[WEIGHTS], random)
    _sign(files)
    return False


def value(files: dict[str, bytes], random: Random) -> bool:
    """Some values of the manifest become something else."""

    def change(content: Any) -> None:
        for _ in range(random.choice((1, 1, 2, 4))):
            holder, key = random.choice(_places(content))
            holder[key] = copy.deepcopy(random.choice(JUNK))

    return _edit(files, change)


def remove(files: dict[str, bytes], random: Random) -> bool:
    def change(content: Any) -> None:
        holder, key = random.choice(_places(content))
        del holder[key]

    return _edit(files, change)


def repeat(files: dict[str, bytes], random: Random) -> bool:
    """An item of a list twice, or two in each other's place."""

    def change(content: Any) -> None:
        lists = [holder[key] for holder, key in _places(content) if isinstance(holder[key], list) and holder[key]]
        chosen = random.choice(lists)
        if random.random() < 0.5:
            chosen.append(copy.deepcopy(random.choice(chosen)))
        else:
            a, b = random.randrange(len(chosen)), random.randrange(len(chosen))
            chosen[a], chosen[b] = chosen[b], chosen[a]

    return _edit(files, change)


def weight_table(files: dict[str, bytes], random: Random) -> bool:
    """Lies about where a weight lies, what it is, and how large."""

    def change(content: Any) -> None:
        one = random.choice(content["weights"])
        kind = random.randrange(6)
        if kind == 0:
            one["offset"] += random.choice((1, 4, 32, 64, -64, -1))
        elif kind == 1:
            one["offset"] = random.choice(content["weights"])["offset"]
        elif kind == 2:
            one["shape"] = random.choice(([1], [], one["shape"][::-1], [one["bytes"]], [*one["shape"], 1]))
        elif kind == 3:
            one["shape"], one["bytes"] = [1], np.dtype(one["dtype"]).itemsize
        elif kind == 4:
            one["dtype"] = random.choice(("int32", "float64", "uint8", "int8", "float16"))
        else:
            one["bytes"] = random.choice((0, 1, 4, -4, one["bytes"] * 2, 1 << 40))

    return _edit(files, change)


def ends(files: dict[str, bytes], random: Random) -> bool:
    """Lies about what goes in and comes out."""

    def change(content: Any) -> None:
        one = random.choice(content[random.choice(("inputs", "inputs", "outputs"))])
        kind = random.randrange(5)
        if kind == 0:
            one["dtype"] = random.choice(("int32", "float64", "uint8", "bool", "int64", "float32"))
        elif kind == 1:
            one["shape"] = [random.choice((dim, 1, 3, "free", "batch")) for dim in one["shape"]]
        elif kind == 2:
            one["shape"] = random.choice(([], [*one["shape"], 1], one["shape"][:-1], one["shape"][::-1]))
        elif kind == 3:
            one["values"] = random.choice((None, [-5000, 5000], [0, 1 << 62], [5], [3, -3], "ab"))
        else:
            content["limits"] = random.choice(({}, {"seq": 1 << 40}, {"seq": -1}, {"free": 3}, {"seq": "many"}))

    return _edit(files, change)


def text(files: dict[str, bytes], random: Random) -> bool:
    """JSON that is none, or is more than it seems."""
    whole = files[MANIFEST]
    device = b'"device": ' + str(json.loads(whole)["device"]).encode()
    deep = b"[" * 100_000 + b"]" * 100_000
    files[MANIFEST] = random.choice((
        b"", b"null", b"[]", b"{}", b"3", deep, b'{"format":' * 50_000, b"\xff\xfe" + whole, whole + whole,
        whole.decode().encode("utf-16"), b"\xef\xbb\xbf" + whole, b"\x00" * 4096, whole[: len(whole) // 2],
        whole.replace(device, b'"device": 1e400'), whole.replace(device, b'"device": ' + b"9" * 6000),
        whole.replace(b'"format": ', b'"format": ' + deep + b', "format": '), whole.replace(b'"', b"'"),
    ))  # fmt: skip
    return True


WEIGHTED: tuple[tuple[Callable[[dict[str, bytes], Random], bool], int], ...] = (
    (raw, 3), (missing, 1), (cut_library, 3), (other_weights, 2), (value, 6), (remove, 2), (repeat, 3),
    (weight_table, 6), (ends, 6), (text, 3),
)  # fmt: skip
CHANGES = tuple(change for change, _ in WEIGHTED)


def _edit(files: dict[str, bytes], change: Callable[[Any], None]) -> bool:
    """Change the manifest; whether it still means the same: other bytes for a weight are other weights, and what it
    calls an input, or an output, is that one.
    """
    content = json.loads(files[MANIFEST])
    meant = _meaning(content)
    change(content)
    files[MANIFEST] = json.dumps(content, indent=1).encode()
    return _meaning(content) == meant


def _meaning(content: dict[str, Any]) -> str:
    """The weights, and the order of inputs and outputs, as text."""
    ends = [content.get(part) for part in ("inputs", "outputs")]
    names = [[one.get("name") for one in end if isinstance(one, dict)] for end in ends if isinstance(end, list)]
    return json.dumps([content.get("weights"), names])


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in [(content, key), *_places(content[key])]]


def _sign(files: dict[str, bytes]) -> None:
    content = json.loads(files[MANIFEST])
    for file in (LIBRARY, WEIGHTS):
        content["digests"][file] = hashlib.sha256(files[file]).hexdigest()
    files[MANIFEST] = json.dumps(content, indent=1).encode()


def check(one: Altered, folder: Path, phase: Phase) -> dict[str, Any]:
    """Load it and run it, on what the model takes and on what its manifest says; equal outputs, or an InputError."""
    from xopt.errors import InputError
    from xopt.runtime.session import Session

    folder.mkdir(parents=True, exist_ok=True)
    for file, data in one.files.items():
        (folder / file).write_bytes(data)
    phase("load")
    session = Session.load(folder, threads=1)
    seed = next(seed for seed in seeds() if seed.name == one.name)
    proto = onnx.load_from_string(seed.model)
    refusals = []
    for variant in range(2):
        for given in (reference.feeds(proto, variant), _claimed(session.inputs, variant)):
            phase("run")
            try:
                got = session.run(given)
            except InputError as error:
                refusals.append(str(error))
                continue
            wrong = _differs(seed.model, given, got) if one.same else ""
            if wrong:
                return {"verdict": "mismatch", "detail": wrong}
    return {"verdict": "refused" if len(refusals) == 4 else "equal", "detail": "; ".join(refusals[:1])}


def _differs(model: bytes, given: Any, got: Any) -> str:
    """How outputs differ from the original's; nothing where the original does not take the inputs."""
    try:
        want = reference.run(reference.session(model), given)
    except reference.Refused:
        return ""
    if [array.shape for array in want.values()] != [array.shape for array in got.values()]:
        return "outputs have other shapes"
    worst, wrong = reference.difference(want, dict(zip(want, got.values())))
    return wrong or (f"difference {worst:.3g}" if worst > reference.BASE else "")


def _claimed(inputs: Any, variant: int) -> dict[str, np.ndarray]:
    """Arrays as the manifest describes the inputs."""
    sizes, random = reference.SIZES[variant], np.random.default_rng(variant)
    made = {}
    for info in inputs:
        shape = [dim if isinstance(dim, int) else sizes.get(str(dim), 2) for dim in info.shape]
        low, high = info.values or (0, 50)
        with contextlib.suppress(TypeError, ValueError, MemoryError):  # what no array can be
            if np.prod(shape, dtype=float) < 1 << 20:
                made[info.name] = random.integers(low, min(high, 1 << 40) + 1, shape).astype(info.dtype)
    return made
