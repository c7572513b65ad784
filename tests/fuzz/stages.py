"""What is done with a case: load, compile or optimize it, run what comes out, compare it with the original."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.fuzz import reference
from tests.fuzz.cases import Case
from tests.fuzz.children import Limits, Phase

WRITTEN = " of model.onnx"
Runner = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Stage:
    """A way to use xopt on a model file.

    Attributes:
        run: (model file, a folder for files, phase) -> how to run what came of it.
        limits: of one case.
        hostile: whether its runner checks inputs itself: then values from outside of tables are fed, too.
    """

    run: Callable[[Path, Path, Phase], Runner]
    limits: Limits
    hostile: bool = False


def load(model: Path, folder: Path, phase: Phase) -> Runner:
    """What ``xopt inspect`` does, and what is written at the end of ``xopt optimize``."""
    from xopt import facts, ir

    phase("load")
    graph = ir.load(model)
    phase("canonicalize")
    ir.canonicalize(graph)
    phase("inspect")
    facts.describe(graph, {})
    phase("export")
    written = folder / "written.onnx"
    ir.save(ir.export(graph, inline=True), written)
    return lambda feeds: reference.run(reference.session(written), feeds)


def compile_(model: Path, folder: Path, phase: Phase) -> Runner:
    from xopt import api
    from xopt.runtime.session import Session

    phase("compile")
    library = api.compile(model, "cpu", folder / "model.so", threads=1, database=False)
    phase("open")
    return Session.load(library, threads=1).run


def optimize(model: Path, folder: Path, phase: Phase) -> Runner:
    """The command, with what it does by default but for the peers; both files that it writes are run."""
    from xopt.errors import InputError, VerificationError
    from xopt.runtime.session import Session

    phase("optimize")
    status, printed = command("optimize", model, "-o", folder / "out", "--no-peers", "--threads", "1", "--no-database")
    if status:
        line = next((line for line in printed.splitlines() if line.startswith("xopt: error")), printed)
        if status == 1 or not line.startswith("xopt: error["):
            raise AssertionError(line)
        code, _, what = line.removeprefix("xopt: error[").partition("]: ")
        raise (InputError if status == 2 else VerificationError)(code, what)
    phase("open")
    compiled = Session.load(folder / "out", threads=1)

    def run(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        written = reference.run(reference.session(folder / "out" / "model.onnx"), feeds)
        ours = compiled.run(feeds)
        return {**ours, **{f"{name}{WRITTEN}": array for name, array in written.items()}}

    return run


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and standard error of the ``xopt`` command, in this process."""
    import sys
    import tempfile

    from xopt import console
    from xopt.cli import cli
    from xopt.measure import latency

    latency.REPEATS = 1
    words = [str(argument) for argument in arguments]
    sys.argv = ["xopt", *words]
    saved = os.dup(2)
    with tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), 2)
        try:
            status = console.run_guarded(lambda: cli.main(words, standalone_mode=False))
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
        errors.seek(0)
        return status, errors.read().decode(errors="replace")


STAGES = {
    "load": Stage(load, Limits(20)),
    "compile": Stage(compile_, Limits(40), hostile=True),
    "optimize": Stage(optimize, Limits(100)),
}
"""Compiling and optimizing take some seconds of their own; the limit is 20 s beyond what the slowest seed takes."""


def check(stage: Stage, case: Case, folder: Path, phase: Phase) -> dict[str, Any]:
    """Use xopt on a case, then compare with the original wherever that runs."""
    model = case.write(folder)
    ours = stage.run(model, folder, phase)
    phase("reference")
    try:
        proto = onnx.load_model(model, load_external_data=False)
        theirs = reference.session(model)
        runs = [_pair(proto, theirs, variant, False) for variant in range(len(reference.SIZES))]
        hostile = any(value.type.tensor_type.elem_type in (6, 7) for value in proto.graph.input) and stage.hostile
        runs += [_pair(proto, theirs, variant, True) for variant in range(2)] if hostile else []
    except reference.Refused as error:
        return {"verdict": "no reference", "detail": str(error)}
    compared, worst = 0, 0.0
    for given, want in runs:
        result = _compare(model, ours, given, want, phase)
        if isinstance(result, dict):
            return result
        compared, worst = compared + (result is not None), max(worst, result or 0.0)
    if not compared:
        return {"verdict": "no reference", "detail": "no inputs that both run"}
    return {"verdict": "equal", "detail": "", "difference": worst, "runs": compared}


def _pair(proto: onnx.ModelProto, theirs: Any, variant: int, hostile: bool) -> tuple[Any, Any]:
    given = reference.feeds(proto, variant, hostile)
    try:
        return given, reference.run(theirs, given)
    except reference.Refused:
        return given, None


def _compare(model: Path, ours: Runner, given: Any, want: Any, phase: Phase) -> float | dict[str, Any] | None:
    """The difference of one run; a verdict when it is too large; None when one side refuses the data."""
    from xopt.errors import InputError

    phase("run")
    try:
        got = dict(ours(given))
    except InputError:
        return None
    except reference.Refused as error:
        if want is None:
            return None
        return {"verdict": "mismatch", "detail": f"what is written does not run: {error}"}
    phase("reference")
    if want is None or not any(a.dtype.kind != "f" or np.isfinite(a).any() for a in want.values()):
        return None  # onnxruntime refuses, or has no numbers: what xopt makes of it is free, but it must not crash
    for part, arrays in _parts(got).items():
        worst = _judge(model, given, want, arrays)
        if isinstance(worst, dict):
            return {**worst, "detail": part + worst["detail"]}
    return worst


def _parts(outputs: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The outputs of the compiled model, and those of model.onnx where both were run."""
    written = {name.removesuffix(WRITTEN): array for name, array in outputs.items() if name.endswith(WRITTEN)}
    compiled = {name: array for name, array in outputs.items() if not name.endswith(WRITTEN)}
    return {"": compiled, **({"model.onnx: ": written} if written else {})}


def _judge(model: Path, given: Any, want: Any, got: Any) -> float | dict[str, Any] | None:
    """The difference; a verdict when it is too large; None when there is nothing to hold it against."""
    worst, wrong = reference.difference(want, got)
    if not wrong and worst <= reference.BASE:
        return worst
    allowed = reference.tolerance(model, given, want)
    if allowed is None:
        return None
    if not wrong and worst <= allowed:
        return worst
    detail = wrong or f"difference {worst:.3g} of the largest element, rounding explains {allowed:.3g}"
    return {"verdict": "mismatch", "detail": detail, "difference": worst}
