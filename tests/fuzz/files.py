"""Altered files that are no models: recipes, data, reports, reproducers, databases of tuned kernels; and odd options.

Each goes through what the command that reads it calls. What is altered is the bytes, or the meaning: values and keys of
YAML and JSON, headers and entries of archives.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml

from tests.fuzz import blocks
from tests.fuzz.children import Phase

MODEL, RECIPE, DATA, REPORT, DATABASE = "model.onnx", "pipeline.yaml", "samples.npz", "report.json", "tuned.jsonl"
REPRODUCER = "reproducer.json"
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1 << 31, 1 << 63, 10**400, -(1 << 70), 0.5, float("nan"), float("inf"), 1e308,
    "", "x", "\x00", "\ud800", "\x1b[2J", "../../etc/passwd", "canonicalize", "n" * 70_000,
    [], {}, [[]], [1], {"a": 1}, [None] * 1000,
)  # fmt: skip
TEXTS = (
    "", "[", "[" * 50_000, "{" * 50_000, "- " * 20_000,
    "- &a [*a]\n", "- &a [x]\n- [*a, *a]\n",
    "!!python/name:os.system ", "- !!binary x\n", "- !!set {a}\n", "- !!timestamp 2001-99-99\n",
    "9" * 6000, "0x" + "f" * 6000, "1e999", "---\n---\n",
    "- <<: {a: 1}\n", "\ufeff", "null", "a: b: c", "%YAML 9.9\n---\n", "- ? [a]\n  : 1\n", '"\\ud800"', "- 1_0:99:99\n",
)  # fmt: skip
OPTIONS = {
    "--dim": (
        "batch=1",
        "batch",
        "=",
        "batch=0",
        "batch=" + "9" * 6000,
        "batch=-1",
        "other=1",
        "a=b=c",
        "batch=1.5",
        "",
    ),
    "--seed": ("0", "1", "-1", "x", "9" * 6000, "4294967296", "1.5", ""),
    "--threads": ("1", "2", "0", "-1", "1000000000", "x", "9" * 6000),
    "--batch": ("1", "2", "0", "-1", "100000000", "4294967295", "x"),
    "--passes": (
        "canonicalize",
        "",
        ",",
        "prune-heads{keep=0.5}",
        "prune-heads{keep=9}",
        "{",
        "[" * 3000,
        "x" * 100_000,
    ),
    "--max-drop": ("0.01", "nan", "inf", "-1", "x", "1e999"),
    "--metric": ("cosine", "beauty", "", ":", "os:system", "a:b"),
    "--target": ("cpu", "arm", "cpu:avx2", "toaster", "", "cpu:", "cuda:sm_99999999999"),
    "--precision": ("fp32", "bf16", "int3", ""),
    "--data": (DATA, RECIPE, "none", "/dev/zero", ".", ":", "os:getcwd", "sys:exit", ""),
    "--recipe": (RECIPE, DATA, "none", "/dev/zero", ".", ""),
    "--database": (DATABASE, "none", "/dev/zero", ".", ""),
    "--dump-ir": ("dumps", RECIPE, "/proc/x", ""),
    "-o": ("out", RECIPE, ".", "/proc/x", "x" * 300, "", "/dev/null"),
}
FLAGS = (
    "--json",
    "--no-peers",
    "--resume",
    "--no-database",
    "--no-verify-each",
    "--time-passes",
    "--help",
    "--nothing",
)


@dataclass(frozen=True)
class File:
    """A mutated file.

    Attributes:
        name: the kind of file.
        level: "bytes", "meaning" or "options".
        content: of the file; the words of a command for options, one a line.
    """

    name: str
    level: str
    changes: tuple[str, ...]
    content: bytes


def altered(number: int, index: int, level: str | None = None) -> File:
    """Case ``index`` of run ``number``; equal arguments give equal bytes."""
    random = Random(f"files:{number}:{index}")
    names = (RECIPE, DATA, REPORT, REPRODUCER, DATABASE, "options")
    name = names[index % len(names)]
    if name == "options":
        return File(name, "options", (), "\n".join(_command(random)).encode())
    level = level or ("bytes", "meaning")[index // len(names) % 2]
    content = originals()[name]
    if level == "bytes" or (name == DATA and random.random() < 0.2):
        mutated, changes = blocks.mutate(content, random)
        return File(name, level, tuple(changes), mutated)
    if name in (RECIPE, REPRODUCER, REPORT) and random.random() < 0.2:
        return File(name, level, ("text",), random.choice(TEXTS).encode("utf-8", "surrogatepass"))
    change = {RECIPE: _yaml, DATA: _archive, DATABASE: _lines}.get(name, _json)
    return File(name, level, (change.__name__.strip("_"),), change(content, random))


def check(one: File, folder: Path, phase: Phase) -> dict[str, Any]:
    """Let the command that reads it do so: it comes to an end, or refuses in one line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in originals().items():
        (folder / name).write_bytes(content)
    if one.name != "options":
        (folder / one.name).write_bytes(one.content)
    phase(one.name)
    with redirect_stdout(io.StringIO()):
        return READERS[one.name](folder, one)


@functools.cache
def originals() -> dict[str, bytes]:
    """A sound file of each kind."""
    from tests.ir import builders
    from tests.report.sample import report
    from xopt.data.dataset import Dataset
    from xopt.ir.io import to_bytes
    from xopt.pipeline import text
    from xopt.targets.database import SHIPPED

    model = builders.vit(layers=1)
    samples = io.BytesIO()
    np.savez(samples, **Dataset.random(model, 2, 0).inputs)  # type: ignore[arg-type]
    passes = text.parse("canonicalize,prune-heads{keep=0.5,score=magnitude},merge-tokens{ratio=0.2}")
    record = {"format": 1, "seed": 0, "tile": 8, "dims": {"batch": 1}, "error": {}, "versions": {}}
    return {
        MODEL: to_bytes(model),
        RECIPE: text.to_yaml(passes).encode(),
        DATA: samples.getvalue(),
        REPORT: json.dumps(report()).encode(),
        REPRODUCER: json.dumps(record).encode(),
        DATABASE: b"".join(SHIPPED.read_bytes().splitlines(keepends=True)[:8]),
    }


# -- changes -----------------------------------------------------------------------------------------------------------


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in [(content, key), *_places(content[key])]]


def _changed(content: Any, random: Random) -> Any:
    """One to three values are others, are gone, or are there twice."""
    content = copy.deepcopy(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = _places(content)
        if not places:
            return content
        holder, key = random.choice(places)
        kind = random.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[random.choice(("x", "", "\x00", "pass", "n" * 5000))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(random.choice(JUNK))
    return content


def _yaml(content: bytes, random: Random) -> bytes:
    changed = _changed(yaml.safe_load(content), random)
    return str(yaml.safe_dump(changed, allow_unicode=False)).encode("utf-8", "surrogatepass")


def _json(content: bytes, random: Random) -> bytes:
    changed = _changed(json.loads(content), random)
    return json.dumps(changed, ensure_ascii=random.random() < 0.8).encode("utf-8", "surrogatepass")


def _lines(content: bytes, random: Random) -> bytes:
    lines = content.splitlines()
    place = random.randrange(len(lines))
    lines[place] = _json(lines[place], random)
    return b"\n".join(lines) + random.choice((b"\n", b"", b"\n[[[[", b"\n" + b"[" * 50_000, b"\n\xff\xfe"))


def _archive(content: bytes, random: Random) -> bytes:
    """Other headers, entries and methods of an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    name, data = members[0]
    body = data[128:]
    descr = random.choice(
        ("'<f4'", "'<f8'", "'|O'", "'<U9'", "'|V4'", "[('a', '<f4')]", "'>f4'", "'<M8[s]'", "'|S0'", "3")
    )
    shape = random.choice(
        ("(2, 3, 16, 16)", "(1536,)", "(-1,)", "(1099511627776,)", "(0, 5)", "()", "3", "(1,) * 9", "(2.0,)")
    )
    head = random.choice((
        f"{{'descr': {descr}, 'fortran_order': {random.choice(('True', 'False', '1'))}, 'shape': {shape}}}\n",
        "(" * 9000, "{}", "", "__import__('os')", "{" + "'a': 1," * 1000 + "}", "9" * 9000, "\x00" * 64,
    )).encode()  # fmt: skip
    version = random.choice((1, 1, 1, 2, 3, 9))
    size = (len(head) if random.random() < 0.9 else 0xFFFF).to_bytes(2 if version == 1 else 4, "little")
    members[0] = (name, b"\x93NUMPY" + bytes([version, 0]) + size + head + body)
    extra = random.choice(
        (None, (name, data), ("labels.npy", data), ("readme", b"x"), ("dir/", b""), ("\x1b.npy", data))
    )
    buffer = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in [*members, *([extra] if extra else [])]:
            archive.writestr(zipfile.ZipInfo(name), data, method)  # a name alone gets the time of day
    return buffer.getvalue()


def _command(random: Random) -> list[str]:
    """The words of a command that reads options and files, and does nothing else."""
    command = random.choice((["optimize", MODEL, "--dry-run"], ["inspect", MODEL], ["run", "."], ["report", REPORT]))
    words = list(command)
    for option in random.sample(list(OPTIONS), random.choice((1, 1, 2, 3))):
        words += [option, random.choice(OPTIONS[option])]
    words += random.sample(FLAGS, random.choice((0, 0, 1)))
    return words


# -- readers -----------------------------------------------------------------------------------------------------------


def _read_recipe(folder: Path, one: File) -> dict[str, Any]:
    from xopt.pipeline import text

    passes = text.load(folder / RECIPE)
    assert text.from_yaml(text.to_yaml(passes)) == passes and text.parse(text.render(passes)) == passes
    return {"verdict": "equal", "detail": ""}


def _read_data(folder: Path, one: File) -> dict[str, Any]:
    from xopt.data.dataset import Dataset
    from xopt.ir.io import load

    data = Dataset.load(folder / DATA).matched(load(folder / MODEL))
    assert len(data.digest) == 64 and list(data.batches(1))
    return {"verdict": "equal", "detail": ""}


def _read_report(folder: Path, one: File) -> dict[str, Any]:
    from xopt import commands

    commands.report(folder / REPORT, folder / "page.html", False)
    commands.report(folder / REPORT, folder / "page.html", True)
    return {"verdict": "equal", "detail": ""}


def _read_reproducer(folder: Path, one: File) -> dict[str, Any]:
    from xopt.pipeline.reproduce import rerun

    (folder / RECIPE).write_text("- deduplicate\n")
    rerun(folder, instruments=())
    return {"verdict": "equal", "detail": ""}


def _read_database(folder: Path, one: File) -> dict[str, Any]:
    from xopt.kernels import gemm
    from xopt.kernels.isa import Isa
    from xopt.targets import configured
    from xopt.targets.database import Database

    isa = configured("cpu:avx2").isa()
    assert isinstance(isa, Isa)
    database = Database([folder / DATABASE])
    for record in database.records:
        if record.kernel == "gemm":
            database._transferred([record], gemm, gemm.Workload(rows=(None,), k=64, n=64), isa)
    return {"verdict": "equal", "detail": f"{len(database.records)} records"}


def _read_options(folder: Path, one: File) -> dict[str, Any]:
    """The whole command, in this process: the exit status and the one line tell how it went."""
    import os
    import sys

    from xopt import cli, console

    os.chdir(folder)
    sys.argv = ["xopt", *one.content.decode().split("\n")]
    said = io.StringIO()
    with redirect_stderr(said):
        status = console.run_guarded(lambda: cli.cli(standalone_mode=False))
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    if status == 0:
        return {"verdict": "equal", "detail": ""}
    clear = status in (2, 3) and len(lines) == 1 and lines[0].startswith("xopt: error[E-")
    return {"verdict": "refused" if clear else "internal", "detail": f"status {status}: {' / '.join(lines)[:300]}"}


READERS: dict[str, Callable[[Path, File], dict[str, Any]]] = {
    RECIPE: _read_recipe,
    DATA: _read_data,
    REPORT: _read_report,
    REPRODUCER: _read_reproducer,
    DATABASE: _read_database,
    "options": _read_options,
}
