"""A failed pass leaves a folder from which the failure can be run again.

model.onnx        the model just before the failing pass
pipeline.yaml     the failing pass and those that were to follow
samples.npz       the calibration data, unless they were random and can be made again
reproducer.json   seed, tile, dims and the error
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xopt.ir
from xopt import files
from xopt.data import npz
from xopt.errors import InputError, XoptError
from xopt.ir.names import file_stem
from xopt.pipeline import text
from xopt.pipeline.context import PassContext
from xopt.pipeline.instruments import Instrument
from xopt.pipeline.manager import PassManager, StepResult
from xopt.scratch import outer

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT = 1
LARGEST_RECORD = 1 << 20
"""Bytes of reproducer.json."""


class Reproducer(Instrument):
    """On a failure write a reproducer and name its path in ``step.notes["reproducer"]``.

    Args:
        folder: where to put it; by default the user's folder for temporary files.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def failed(self, step: StepResult, before: ir.Model, context: PassContext, error: Exception) -> None:
        try:
            path = write(step, before, context, error, self.folder)
        except (OSError, XoptError) as problem:  # a full disk must not hide the failure itself
            step.notes["reproducer"] = f"no reproducer could be written ({problem})"
        else:
            step.notes["reproducer"] = f"run it again from the reproducer {path}"


def write(step: StepResult, model: ir.Model, context: PassContext, error: Exception, parent: Path | None) -> Path:
    """Write the reproducer of a failed step into a new folder below ``parent``."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(
        tempfile.mkdtemp(prefix=f"xopt-{step.index:03d}-{file_stem(step.pass_.name)}-", dir=parent or outer())
    )
    try:
        _fill(folder, step, model, context, error)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _fill(folder: Path, step: StepResult, model: ir.Model, context: PassContext, error: Exception) -> None:
    xopt.ir.save(model, folder / "model.onnx")
    (folder / "pipeline.yaml").write_text(text.to_yaml([step.pass_, *step.remaining]), encoding="utf-8")
    samples = context.samples
    if not samples.synthetic:
        labels = {} if samples.labels is None else {"labels": samples.labels}
        with (folder / "samples.npz").open("wb") as file:
            npz.write(file, {**samples.inputs, **labels})
    record = {
        "format": FORMAT,
        "seed": context.seed,
        "tile": context.tile,
        "dims": context.dims,
        "error": _record_of(error),
        "versions": {name: version(name) for name in ("onnx", "onnx-ir", "onnxruntime")},
    }
    (folder / "reproducer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _record_of(error: Exception) -> dict[str, str]:
    if isinstance(error, XoptError):
        return {"kind": type(error).__name__, "code": error.code, "what": error.what}
    return {"kind": type(error).__name__, "code": "E-INTERNAL", "what": str(error)}


def _context(record: Mapping[str, Any]) -> PassContext:
    """The context that a record describes; ValueError where a number is none."""
    numbers = {"seed": record["seed"], "tile": record["tile"], **record["dims"]}
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 32:
            raise ValueError(f"{name} is no number")
    if record["tile"] < 1 or any(size < 1 for size in record["dims"].values()):
        raise ValueError("a size of 0")
    return PassContext(seed=record["seed"], tile=record["tile"], dims=dict(record["dims"]))


def rerun(folder: str | Path, *, instruments: Sequence[Instrument] | None = None) -> list[StepResult]:
    """Run the pipeline of a reproducer again: raises the same error, or returns the steps when it is gone.

    Args:
        folder: what ``Reproducer`` wrote.
        instruments: by default each step is verified, and no second reproducer is written.
    """
    from xopt.data.dataset import Dataset
    from xopt.pipeline.verify import VerifyEach

    folder = Path(folder)
    try:
        record = json.loads(files.read_text(folder / "reproducer.json", "the reproducer", LARGEST_RECORD))
        if record["format"] != FORMAT:
            raise ValueError("another format")
        context = _context(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"this is not a reproducer ({type(error).__name__}: {str(error)[:100]})"
        raise InputError("E-FILE", what, where=str(folder), cure="name the folder of one") from error
    passes = text.load(folder / "pipeline.yaml")
    if (folder / "samples.npz").is_file():
        context.calibration = Dataset.load(folder / "samples.npz")
    model = xopt.ir.load(folder / "model.onnx")
    return PassManager(passes, instruments=instruments if instruments is not None else (VerifyEach(),)).run(
        model, context
    )
