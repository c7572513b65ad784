"""Finished steps on disk, so that an interrupted optimization can go on (``--resume``).

A step is found again by a key over everything that it depends on (`xopt.search.identity`) and all passes up to it. A
cache of another job simply does not match. A run goes on with the model as it is read back from the cache, so that one
that was interrupted and one that was not compute with the very same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt.errors import InputError, XoptError
from xopt.pipeline import text
from xopt.search import identity

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.base import Pass
    from xopt.search.job import Job

_OURS = re.compile(r"\.?[0-9a-f]{64}(-[0-9a-f]{16})?(\.\d+)?\.(onnx|json|partial|data)(\.\d+\.part)?")
"""Names of the files of a cache."""


class StepCache:
    """Models and records of finished steps, in one folder.

    Args:
        folder: where they are; None keeps nothing.
        job: what they belong to.
        resume: use what is there; otherwise it is thrown away first.
    """

    def __init__(self, folder: Path | None, job: Job, *, resume: bool) -> None:
        self.folder = folder
        self._state = "" if folder is None else identity.of_job(job)
        if not resume:
            self.forget()

    def enter(self, one: Pass) -> None:
        """The next step is ``one``."""
        if self.folder is not None:
            code = identity.of_code(type(one))
            self._state = hashlib.sha256(f"{self._state} {text.render([one])} {code}".encode()).hexdigest()

    def recall(self) -> tuple[ir.Model, dict[str, Any]] | None:
        """Model and record of the current step, if it was finished before."""
        from xopt.ir import infer_shapes, load

        if self.folder is None or not (self.folder / f"{self._state}.json").is_file():
            return None
        try:
            record = json.loads((self.folder / f"{self._state}.json").read_text(encoding="utf-8"))
            if hashlib.sha256((self.folder / f"{self._state}.onnx").read_bytes()).hexdigest() != record["model"]:
                return None
            model = load(self.folder / f"{self._state}.onnx")
        except (OSError, ValueError, KeyError, TypeError, InputError):  # a broken cache costs nothing but time
            return None
        infer_shapes(model)
        return model, record["step"]

    def keep(self, model: ir.Model, record: dict[str, Any]) -> ir.Model:
        """Remember the current step; a cache that cannot be written is given up, and the run goes on.

        Returns:
            The model as `recall` will give it, for the steps that follow.
        """
        if self.folder is None:
            return model
        try:
            self._write(self.folder, model, record)
        except (OSError, InputError):
            self.forget()
            self.folder = None
            return model
        known = self.recall()
        return model if known is None else known[0]

    def _write(self, folder: Path, model: ir.Model, record: dict[str, Any]) -> None:
        """The record is written last, so that half a step is none."""
        from xopt.ir.io import save

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._state}.onnx"
        save(model, path)
        content = {"model": hashlib.sha256(path.read_bytes()).hexdigest(), "step": record}
        partial = folder / f"{self._state}.partial"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(folder / f"{self._state}.json")

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Forget everything when the block fails with an error that would come again; a full disk would not."""
        try:
            yield
        except XoptError as error:
            if error.code != "E-OUTPUT":
                self.forget()
            raise

    def forget(self) -> None:
        """Remove all steps: the job is done, or they belong to another. Other files in the folder stay."""
        if self.folder is None or not self.folder.is_dir():
            return
        with suppress(OSError):
            for path in self.folder.iterdir():
                if _OURS.fullmatch(path.name):
                    path.unlink()
            self.folder.rmdir()
