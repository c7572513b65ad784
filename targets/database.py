"""Measured best configurations of kernels: what a tuner found, and which of it fits a kernel that is to be compiled.

One JSON object a line, appended as tuning goes on; a line that is torn, foreign or of another version of a kernel is
passed over, so that no file can keep a model from being compiled. A configuration is looked up in three steps:

    1. the same workload, measured on this machine model with as many threads    the configuration, as measured
    2. the nearest workload of the same flavour, or another machine's            where it won clearly, and is legal
    3. the family's heuristic
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_origin, get_type_hints

from xopt import files
from xopt.errors import InputError
from xopt.ir.io import output_errors
from xopt.runtime.threads import physical_cores

if TYPE_CHECKING:
    from xopt.kernels.isa import Isa

SHIPPED = Path(__file__).with_name("tuned.jsonl")
LARGEST_FILE = 64 << 20
"""Bytes of a database, a hundred thousand kernels; a larger file counts as empty."""
FARTHEST = 2.0
"""Largest `distance` that a configuration is carried over: one size may differ by a factor of four, or two by two."""
CLEAR_GAIN = 1.05
"""How much faster than the heuristic a configuration was, that is carried over to another shape or machine."""


class Configs(Protocol):
    """Chooses the configuration of each kernel."""

    def config(self, family: Any, workload: Any, isa: Isa) -> Any:
        """The configuration of a family (a module of `xopt.kernels`) for a workload on an instruction set."""


class Heuristics:
    """What the families choose by themselves."""

    def config(self, family: Any, workload: Any, isa: Isa) -> Any:
        return family.heuristic(workload, isa)


@dataclass(frozen=True)
class Record:
    """The outcome of tuning one kernel.

    Attributes:
        kernel: name of the family.
        version: its ``VERSION`` when this was measured.
        isa: name of the instruction set.
        threads: how many worked on it.
        machine: model of the CPU.
        workload: fields of the workload that differ from their defaults.
        shapes: of the tensors that it was measured on, which tell the sizes that the workload leaves open.
        config: the fastest configuration; the heuristic's where that was not beaten.
        seconds: of one call with it.
        heuristic: the heuristic's configuration.
        heuristic_seconds: of one call with that, measured in turns with the other.
        trials: configurations that were tried.
    """

    kernel: str
    version: int
    isa: str
    threads: int
    machine: str
    workload: dict[str, Any]
    shapes: list[list[int]]
    config: dict[str, Any]
    seconds: float
    heuristic: dict[str, Any]
    heuristic_seconds: float
    trials: int

    @classmethod
    def parse(cls, line: str) -> Record | None:
        """The record of a line; None for anything else."""
        try:
            record = cls(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            return None
        sound = all(isinstance(getattr(record, name), kind) for name, kind in _KINDS.items())
        return record if sound and record.seconds > 0 and math.isfinite(record.gain) else None

    @property
    def gain(self) -> float:
        """How many times faster than the heuristic."""
        return self.heuristic_seconds / self.seconds

    @property
    def subject(self) -> tuple[object, ...]:
        """What was tuned: equal for records that answer the same question."""
        content = json.dumps([self.workload, self.shapes], sort_keys=True)
        return (self.kernel, self.version, self.isa, self.threads, self.machine, content)


_KINDS = {name: get_origin(kind) or kind for name, kind in get_type_hints(Record).items()}


class Database:
    """Records of several files, the first ones preferred; within a file the later ones.

    Args:
        paths: the files; the first is the one that is written. A file that is missing or unreadable counts as empty.
        threads: how many the compiled model will be run on.
        machine: model of the CPU that it will be run on, this one by default.
    """

    def __init__(self, paths: Sequence[Path], threads: int | None = None, machine: str | None = None) -> None:
        self.paths = tuple(paths)
        self.threads = threads or physical_cores()
        self.machine = cpu_model() if machine is None else machine

    @cached_property
    def records(self) -> list[Record]:
        """All sound records, the preferred ones first."""
        return [record for path in self.paths for record in reversed(list(read(path)))]

    def config(self, family: Any, workload: Any, isa: Isa) -> Any:
        """The best known configuration for a workload."""
        wanted = fields_of(workload)
        fitting = [record for record in self.records if _same_kernel(record, family, isa)]
        exact = [r for r in fitting if r.workload == wanted and self._measured_here(r, isa)]
        for record in exact:
            if (config := legal(family, workload, isa, record.config)) is not None:
                return config
        return self._transferred(fitting, family, workload, isa) or family.heuristic(workload, isa)

    def _measured_here(self, record: Record, isa: Isa) -> bool:
        return (record.machine, record.threads, record.isa) == (self.machine, self.threads, isa.name)

    def _transferred(self, records: Iterable[Record], family: Any, workload: Any, isa: Isa) -> Any:
        """The configuration of the nearest record; None when there is none, or the heuristic was as good there."""

        def rank(pair: tuple[float, Record]) -> tuple[float, bool, int]:
            far, record = pair
            return far, record.machine != self.machine, abs(record.threads - self.threads)

        near = [(distance(complete(family, record), workload), record) for record in records]
        for _, record in sorted((pair for pair in near if pair[0] <= FARTHEST), key=rank):
            if record.config == record.heuristic or record.gain < CLEAR_GAIN:
                return None
            if (config := legal(family, workload, isa, record.config)) is not None:
                return config
        return None

    def add(self, record: Record) -> None:
        """Append a record to the first file; InputError E-OUTPUT when that cannot be written."""
        append(self.paths[0], record)
        self.__dict__.pop("records", None)


def default_path() -> Path:
    """The user's own file, in the cache folder of the desktop standard."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "xopt" / "tuned.jsonl"


def open_database(choice: bool | str | Path, threads: int | None = None) -> Configs:
    """What configures the kernels.

    Args:
        choice: True for the user's file and the shipped one, a path to replace the former, False for neither.
        threads: how many the compiled model will be run on.
    """
    if choice is False:
        return Heuristics()
    return Database([default_path() if choice is True else Path(choice), SHIPPED], threads)


_FIRST = b'{"kernel": '
"""What every record begins with."""


# -- files -------------------------------------------------------------------------------------------------------------
def read(path: Path) -> Iterator[Record]:
    """The sound records of a file in order."""
    try:
        content = files.read_bytes(path, "the database", LARGEST_FILE)
    except InputError:
        return
    for line in content.decode("utf-8", errors="replace").splitlines():
        if (record := Record.parse(line)) is not None:
            yield record


def make(path: Path) -> None:
    """Make an empty file where there is none; InputError E-OUTPUT when that cannot be, or the file is another's."""
    if path.exists():
        files.open_regular(path, "the database", "name a file for the results").close()
    with output_errors(path):
        if path.exists() and not (path.is_file() and _holds_records(path)):
            what = "this is not a file of xopt tune, which adds to its own files only"
            raise InputError("E-OUTPUT", what, where=str(path), cure="name another file with --database")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()


def _holds_records(path: Path) -> bool:
    """Whether a file is empty or begins with a record, though a crash may have torn it."""
    with path.open("rb") as file:
        start = file.read(len(_FIRST))
    return _FIRST.startswith(start)


def append(path: Path, record: Record) -> None:
    """Add one line in one write; after a line that a crash has torn, on a line of its own."""
    make(path)
    with output_errors(path), path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        line = json.dumps(dataclasses.asdict(record)).encode()
        os.write(file.fileno(), b"\n" * torn + line + b"\n")
        os.fsync(file.fileno())


# -- workloads and configurations --------------------------------------------------------------------------------------
def family_name(family: Any) -> str:
    """Name of a kernel family in records: the last part of its module's."""
    return str(family.__name__).rpartition(".")[2]


def family_of(name: str) -> Any:
    """The kernel family of that name."""
    return import_module(f"xopt.kernels.{name}")


def fields_of(workload: Any) -> dict[str, Any]:
    """The fields of a frozen dataclass as JSON has them, without those at their defaults.

    So a field that is added later with a default leaves the records valid.
    """
    plain = {
        field.name: getattr(workload, field.name)
        for field in dataclasses.fields(workload)
        if getattr(workload, field.name) != field.default
    }
    result: dict[str, Any] = json.loads(json.dumps(plain, default=dataclasses.asdict))
    return result


def legal(family: Any, workload: Any, isa: Isa, fields: dict[str, Any]) -> Any:
    """The configuration with these fields when the family allows it for the workload, else None."""
    allowed = (family.heuristic(workload, isa), *family.space(workload, isa))
    return next((config for config in allowed if dataclasses.asdict(config) == fields), None)


def complete(family: Any, record: Record) -> dict[str, Any]:
    """The workload of a record with all its fields, as plain values; defaults as the family has them today."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(family.Workload)
        if field.default is not dataclasses.MISSING
    }
    return {**json.loads(json.dumps(defaults, default=dataclasses.asdict)), **record.workload}


def distance(known: dict[str, Any], workload: Any) -> float:
    """How far apart two workloads are, in octaves summed over their sizes; infinite when they differ in kind.

    Sizes are the integer fields, and the products of tuples of integers: k, n, and m from the leading dimensions. A
    size that is dynamic in one of them and fixed in the other counts as one octave. Flags and names are kind. Other
    numbers (a scale, an epsilon) and nested fields (where an operand lies) do not count.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(workload)))
    if known.keys() != wanted.keys():
        return math.inf
    return sum(apart(known[name], wanted[name]) for name in wanted)


def apart(a: Any, b: Any) -> float:
    """`distance` of two fields."""
    a, b = (_product(x) if isinstance(x, list) and all(map(_is_size, x)) else x for x in (a, b))
    if not (_is_size(a) and _is_size(b)):
        return 0.0 if a == b or isinstance(a, (float, dict)) else math.inf
    return float(a is not b) if a is None or b is None else abs(math.log2(a + 1) - math.log2(b + 1))


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _product(sizes: list[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _same_kernel(record: Record, family: Any, isa: Isa) -> bool:
    """The same code generator: names such as ``avx512-vnni`` are extensions of one vector unit."""
    return (record.kernel, record.version) == (family_name(family), family.VERSION) and (
        str(record.isa).partition("-")[0] == isa.name.partition("-")[0]
    )


def cpu_model() -> str:
    """Model of this machine's CPU, as records have it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    parts = [facts.get(key, "") for key in ("model name", "cpu family", "model")]
    return "/".join(part for part in parts if part)
