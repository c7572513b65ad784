"""Finished steps on disk, so that an interrupted optimization can go on (``--resume``).

A step is found again by a key over everything that it depends on: the original model, the data, the target, the
budget, the versions, and all passes up to it. A cache of another job simply does not match.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt.errors import InputError, XoptError
from xopt.measure.machine import versions
from xopt.pipeline import text

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.pipeline.base import Pass
    from xopt.search.job import Job


class StepCache:
    """Models and records of finished steps, in one folder.

    Args:
        folder: where they are; None keeps nothing.
        job: what they belong to.
        resume: use what is there; otherwise it is thrown away first.
    """

    def __init__(self, folder: Path | None, job: Job, *, resume: bool) -> None:
        self.folder = folder
        self._state = "" if folder is None else _fingerprint(job)
        if folder is not None and not resume:
            shutil.rmtree(folder, ignore_errors=True)

    def enter(self, one: Pass) -> None:
        """The next step is ``one``."""
        self._state = hashlib.sha256(f"{self._state} {text.render([one])}".encode()).hexdigest()

    def recall(self) -> tuple[ir.Model, dict[str, Any]] | None:
        """Model and record of the current step, if it was finished before."""
        from xopt.ir import infer_shapes, load

        if self.folder is None or not (self.folder / f"{self._state}.json").is_file():
            return None
        try:
            record = json.loads((self.folder / f"{self._state}.json").read_text(encoding="utf-8"))
            model = load(self.folder / f"{self._state}.onnx")
        except (OSError, ValueError, InputError):  # a broken cache is worth nothing, and costs nothing
            return None
        infer_shapes(model)
        return model, record

    def keep(self, model: ir.Model, record: dict[str, Any]) -> None:
        """Remember the current step; a cache that cannot be written is given up, and the run goes on."""
        if self.folder is None:
            return
        try:
            self._write(self.folder, model, record)
        except (OSError, InputError):
            self.forget()
            self.folder = None

    def _write(self, folder: Path, model: ir.Model, record: dict[str, Any]) -> None:
        """The record is written last, so that half a step is none."""
        from xopt.ir.io import save

        folder.mkdir(parents=True, exist_ok=True)
        save(model, folder / f"{self._state}.onnx")
        partial = folder / f"{self._state}.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
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
        """Remove everything: the job is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def model_digest(model: ir.Model) -> str:
    """SHA-256 over all weights and the graph, whatever file they lie in."""
    import onnx_ir as ir

    state = hashlib.sha256()
    bare = model.clone()
    for name in sorted(bare.graph.initializers):
        value = bare.graph.initializers.pop(name)
        if value.const_value is not None:
            state.update(f"{name} {value.const_value.dtype} {value.const_value.shape}".encode())
            state.update(value.const_value.tobytes())
        value.const_value = None
        if not value.is_graph_input():
            bare.graph.inputs.append(value)
    state.update(ir.to_proto(bare).SerializeToString(deterministic=True))
    return state.hexdigest()


def _fingerprint(job: Job) -> str:
    facts = {
        "model": model_digest(job.model),
        "calibration": job.calibration.digest,
        "evaluation": job.evaluation.digest,
        "metric": job.metric.name,
        "max_drop": job.max_drop,
        "target": [job.target.name, job.target.precision, *job.target.features()],
        "seed": job.seed,
        "threads": job.threads,
        "feeds": {name: list(array.shape) for name, array in job.feeds.items()},
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
