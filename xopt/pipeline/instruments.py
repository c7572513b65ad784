"""What watches the passes: one interface, and the instruments for timing, progress and dumps.

``VerifyEach`` is in :mod:`xopt.pipeline.verify`, ``Reproducer`` in :mod:`xopt.pipeline.reproduce`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import xopt.ir
from xopt import ownership
from xopt.errors import InputError
from xopt.ir.io import output_errors
from xopt.ir.names import file_stem

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.context import PassContext
    from xopt.pipeline.manager import StepResult

_DUMP = re.compile(r"\d{3,}_.*\.(onnx|data)")
"""Names of the files of a dump."""


class Instrument:
    """Hooks around each step; each does nothing unless overridden. An exception of ``before`` or ``after`` fails
    the step.
    """

    def before(self, step: StepResult, model: ir.Model, context: PassContext) -> None:
        """The pass is about to run on ``model``."""

    def after(self, step: StepResult, before: ir.Model, model: ir.Model, context: PassContext) -> None:
        """The pass has turned ``before`` into ``model``."""

    def failed(self, step: StepResult, before: ir.Model, context: PassContext, error: Exception) -> None:
        """The pass, or the hook of an instrument, has failed; the model is again as ``before``."""


class TimePasses(Instrument):
    """Seconds of each pass, without what the instruments take."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def after(self, step: StepResult, before: ir.Model, model: ir.Model, context: PassContext) -> None:
        self.seconds.append((step.pass_.name, step.seconds))

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self.seconds)
        rows = [f"{seconds:9.3f} s {100 * seconds / max(total, 1e-9):5.1f} %  {name}" for name, seconds in self.seconds]
        return "\n".join([*rows, f"{total:9.3f} s 100.0 %  total"])


class Progress(Instrument):
    """Tell ``context.progress`` which pass runs."""

    def before(self, step: StepResult, model: ir.Model, context: PassContext) -> None:
        context.progress(step.pass_.name, step.index - 1, step.index + len(step.remaining))

    def after(self, step: StepResult, before: ir.Model, model: ir.Model, context: PassContext) -> None:
        context.progress(step.pass_.name, step.index, step.index + len(step.remaining))


class DumpIR(Instrument):
    """Write the model before the first pass and after each one: ``000_input.onnx``, ``002_after_fuse-qkv.onnx``.

    The folder is made, or is an empty one, or one of an earlier dump, whose files are replaced. Another folder is
    refused. What else is in it stays, a dump that was changed since too: where it is in the way the step fails.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._prepared = False

    def before(self, step: StepResult, model: ir.Model, context: PassContext) -> None:
        if not self._prepared:
            self._prepare()
            self._save(model, "000_input.onnx")

    def after(self, step: StepResult, before: ir.Model, model: ir.Model, context: PassContext) -> None:
        self._save(model, f"{step.index:03d}_after_{file_stem(step.pass_.name)}.onnx")

    def _save(self, model: ir.Model, name: str) -> None:
        with output_errors(self.folder):
            ownership.refuse_stranger(self.folder / name, "move it away")
            with ownership.adding(self.folder / name):
                xopt.ir.save(model, self.folder / name)

    def _prepare(self) -> None:
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not ownership.is_listed(self.folder, _DUMP):
                what = "the folder for dumps holds other files"
                raise InputError("E-OUTPUT", what, where=str(self.folder), cure="name an empty or a new folder")
            ownership.remove(self.folder)
        self._prepared = True
