"""The whole flow: load or trace a model, optimize it for a target, compile it, save what came of it."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt.data.dataset import Dataset, symbol_sizes
from xopt.errors import InputError
from xopt.ir.io import load, output_errors, save
from xopt.ir.tracing import trace
from xopt.pipeline.context import silent

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from xopt.data.metrics import Metric
    from xopt.folder import Claim
    from xopt.pipeline.base import Pass
    from xopt.pipeline.instruments import Instrument
    from xopt.runtime.session import Session
    from xopt.search.cache import StepCache
    from xopt.search.flow import Outcome
    from xopt.search.job import Job
    from xopt.targets.base import Target
    from xopt.tuning.run import Kernel, Progress, Tuning

    DataSource = str | Path | Dataset | Mapping[str, np.ndarray]

__all__ = ["Result", "compile", "load", "optimize", "plan", "run_plan", "trace", "tune"]


def optimize(
    model: ir.Model | str | Path,
    passes: str | Sequence[Pass] | None = None,
    *,
    progress: Callable[[str, int, int], None] = silent,
    **settings: Any,
) -> Result:
    """Rewrite a model with passes, and keep what pays: quality and latency are measured after every one.

    Args:
        model: a graph, or the path of an ONNX file. It is not changed.
        passes: passes in their order, or a textual pipeline. They come after the exact ones, which always run.
            By default none; with ``data`` and ``max_drop`` head pruning and token merging are tried.
        progress: called with (stage, done, total).
        **settings: as for :func:`plan`.

    Returns:
        The optimized model with everything that was measured.

    Raises:
        InputError: the model, the data, a pass, an option or the target is at fault.
        VerificationError: a pass, or the compiled artifact, does not compute what it should.
    """
    return run_plan(plan(model, passes, **settings), progress=progress)


def plan(
    model: ir.Model | str | Path,
    passes: str | Sequence[Pass] | None = None,
    *,
    target: str | Target = "cpu",
    data: DataSource | None = None,
    eval_data: DataSource | None = None,
    metric: str | Metric | Callable[..., float] | None = None,
    max_drop: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    peers: Sequence[str] | None = None,
    verify_each: bool = True,
    dump_ir: str | Path | None = None,
    database: bool | str | Path = True,
    precision: str = "fp32",
    fallback: bool = False,
) -> Job:
    """Check everything that an optimization needs, and fill in the defaults, without running it.

    Args:
        model: a graph, or the path of an ONNX file.
        passes: as for :func:`optimize`.
        target: ``"cpu"``, ``"arm"``, ``"cuda"``, with a variant (``"cpu:avx2"``), or a target.
        data: samples that passes may look at: a Dataset, a dict of arrays, an ``.npz`` file, ``module:function``.
            Without data, seeded random inputs; quality is then the fidelity of the outputs to the original's.
        eval_data: samples that quality is measured on; ``data`` by default.
        metric: name, ``module:function``, or function(outputs, labels); by default what the labels suggest.
        max_drop: how much of the metric may be lost in all; a pass that costs more is weakened or rolled back.
        threads: CPU threads for what is timed; the physical cores by default.
        seed: of everything that is random.
        batch: samples of the run that is timed.
        dims: sizes of symbolic axes in random data.
        peers: runtimes to time beside; onnxruntime, openvino and torch by default.
        verify_each: check each pass: valid ONNX, shapes, outputs as the pass promised.
        dump_ir: folder for the model after each pass.
        database: as for :func:`compile`.
        precision: as for :func:`compile`.
        fallback: as for :func:`compile`.
    """
    from xopt import targets
    from xopt.ir import sized
    from xopt.runtime.threads import count
    from xopt.search import job

    _check_numbers(dims, batch=batch, seed=seed)
    batch, seed = int(batch), int(seed)  # of numpy's kinds JSON has none
    if max_drop is not None and not (_is_number(max_drop) and 0 <= max_drop < math.inf):
        raise InputError("E-OPTION", f"max_drop={max_drop!r} is no loss", cure="give a number from 0 on, such as 0.01")
    threads = count(threads)
    path = Path(model) if isinstance(model, (str, Path)) else None
    graph = sized(_graph(model))
    listed, chosen_here = job.resolve_passes(passes, searching=data is not None and max_drop is not None)
    size = job.evaluation_batch(graph, batch)
    if data is None:
        calibration = Dataset.random(graph, max(job.RANDOM_SAMPLES // size, 1) * size, seed, dims)
    else:
        calibration = Dataset.of(data).matched(graph)
    evaluation = calibration if eval_data is None else Dataset.of(eval_data).matched(graph)
    feeds = job.timed_feeds(evaluation, size)
    machine = targets.configured(target, database, threads, precision, fallback)  # last: TVM takes seconds to load
    return job.Job(
        model=graph,
        path=path,
        passes=listed,
        optional=chosen_here,
        target=machine,
        calibration=calibration,
        evaluation=evaluation,
        metric=job.resolve_metric(metric, evaluation),
        max_drop=max_drop,
        threads=threads,
        seed=seed,
        feeds=feeds,
        dims=symbol_sizes(graph, feeds),
        peers=tuple(job.PEERS if peers is None else peers),
        verify=verify_each,
        dump=None if dump_ir is None else Path(dump_ir),
    )


def run_plan(
    job: Job,
    *,
    progress: Callable[[str, int, int], None] = silent,
    cache: Path | None = None,
    resume: bool = False,
    instruments: Sequence[Instrument] = (),
) -> Result:
    """Run what :func:`plan` made.

    Args:
        job: the plan.
        progress: called with (stage, done, total).
        cache: folder that finished steps are kept in until the result is saved; None keeps none.
        resume: take finished steps from the cache.
        instruments: what watches the passes, besides the verification and the dumps of the plan.
    """
    from xopt.pipeline.instruments import DumpIR
    from xopt.pipeline.reproduce import Reproducer
    from xopt.pipeline.verify import VerifyEach
    from xopt.report.record import record
    from xopt.search.cache import StepCache
    from xopt.search.flow import run

    watching: list[Instrument] = [*instruments, Reproducer()]
    if job.dump is not None:
        watching.insert(0, DumpIR(job.dump))
    if job.verify:
        watching.insert(0, VerifyEach())
    folder = tempfile.TemporaryDirectory(prefix="xopt-", ignore_cleanup_errors=True)
    steps = StepCache(cache, job, resume=resume)
    with steps.guarded():
        outcome = run(job, Path(folder.name), steps, instruments=watching, progress=progress)
    return Result(outcome.best.model, outcome, job, record(job, outcome), steps, folder)


def compile(
    model: ir.Model | str | Path,
    target: str | Target = "cpu",
    output: str | Path = "model.so",
    *,
    dims: Mapping[str, int] | None = None,
    threads: int | None = None,
    database: bool | str | Path = True,
    precision: str = "fp32",
    fallback: bool = False,
    verify: bool = True,
    verified: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Path:
    """Compile a model as it is, after the exact passes.

    Args:
        model: a graph, or the path of an ONNX file. It is not changed.
        target: as for :func:`plan`.
        output: the library to write (its weights and manifest go beside it), or a folder for ``model.so``. Files
            there that are not an artifact are never replaced.
        dims: symbolic axes to fix; the others stay dynamic.
        threads: how many it will be run on, which its kernels are configured for; the physical cores by default.
        database: configurations of kernels: True for what was tuned on this machine (:func:`tune`) and what is
            shipped, the path of a file to take instead of the former, False for the kernels' own heuristics.
        precision: of linear layers and attention: "fp32", or "bf16" (their operands; sums are float32).
        fallback: let onnxruntime run the nodes that cannot be compiled, inside the compiled model's run; the manifest
            names them as ``segments``.
        verify: compare the library with the model in onnxruntime, on small random inputs, before it is put in place.
        verified: called with what that found: `compared`, and `outputs`, or the `reason` why it was not done.

    Returns:
        Path of the library, for :meth:`xopt.Session.load`.

    Raises:
        InputError: the model, an option or the target is at fault.
        VerificationError: E-VERIFY, the compiled model does not compute what the model does; no file is written.
    """
    from xopt import targets
    from xopt.ir import bind_dims
    from xopt.runtime.threads import count
    from xopt.runtime.trio import check

    _check_numbers(dims)
    threads = count(threads)
    machine = targets.configured(target, database, threads, precision, fallback)
    path = Path(output)
    library = path if path.suffix == ".so" else path / "model.so"
    with output_errors(library):
        check(library)
    original = bind_dims(_graph(model), dims) if dims else _graph(model)

    def check_library(made: Path) -> None:
        from xopt.search.proof import check_artifact

        verified(check_artifact(made, original, graph, machine))

    graph = _exactly(original)
    if not verify:
        return targets.compile(graph, machine, library)
    return targets.compile(graph, machine, library, check=check_library)


def tune(
    model: ir.Model | str | Path,
    target: str | Target = "cpu",
    *,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    threads: int | None = None,
    precision: str = "fp32",
    trials: int = 32,
    timeout: float = 600.0,
    candidate_timeout: float = 20.0,
    database: str | Path | None = None,
    again: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
    finished: Callable[[Kernel], None] = lambda kernel: None,
) -> Tuning:
    """Search the configurations of a model's kernels by measurement, for whatever is compiled afterwards.

    Args:
        model: a graph, or the path of an ONNX file.
        target: as for :func:`plan`; it must run on this machine.
        batch: samples of the run that is tuned for, where the model takes any number.
        dims: sizes of other symbolic axes.
        threads: CPU threads that the model will be run on; the physical cores by default.
        precision: as for :func:`compile`.
        trials: configurations tried for each kernel.
        timeout: seconds for all, from the start of the call; what is not done then is left, and the same call goes
            on with it.
        candidate_timeout: seconds for one configuration to be built, or to be timed.
        database: the file that results are added to; by default the user's own, which :func:`compile` reads.
        again: tune kernels that the file knows, too.
        progress: called after each configuration.
        finished: called after each kernel.

    Raises:
        InputError: the model, an option or the target is at fault, or the file cannot be written.
    """
    start = time.monotonic()
    from xopt import targets
    from xopt.runtime.threads import count, physical_cores
    from xopt.search.job import evaluation_batch, timed_feeds
    from xopt.targets.database import Database, default_path
    from xopt.tuning.run import Tuner

    _check_numbers(dims, batch=batch, trials=trials)
    batch, trials = int(batch), int(trials)
    for name, seconds in (("timeout", timeout), ("candidate_timeout", candidate_timeout)):
        if not (_is_number(seconds) and 0 <= seconds < math.inf):
            raise InputError("E-OPTION", f"{name}={seconds!r} is no time", cure="give seconds from 0 on")
    threads = count(threads)
    graph = _exactly(model)
    size = evaluation_batch(graph, batch)
    feeds = timed_feeds(Dataset.random(graph, size, 0, dims), size)
    tuner = Tuner(
        target=targets.configured(target, False, threads, precision),
        database=Database([default_path() if database is None else Path(database)], threads),
        trials=trials,
        timeout=timeout - (time.monotonic() - start),
        candidate_timeout=candidate_timeout,
        workers=physical_cores(),
        again=again,
        progress=progress,
        finished=finished,
    )
    return tuner.run(graph, {name: array.shape for name, array in feeds.items()})


def _graph(model: ir.Model | str | Path) -> ir.Model:
    """The model itself, or the one in a file; InputError E-OPTION for anything else."""
    import onnx_ir as ir

    if isinstance(model, ir.Model):
        return model
    if isinstance(model, (str, Path)):
        return load(model)
    cure = "give a path, or what xopt.load and xopt.trace return"
    raise InputError("E-OPTION", f"{type(model).__name__} is no model", cure=cure)


def _check_numbers(dims: Mapping[str, int] | None, **counts: int) -> None:
    """Refuse what is no count, no seed or no size of an axis; InputError E-OPTION."""
    if not (dims is None or isinstance(dims, Mapping)):
        raise InputError("E-OPTION", f"dims is {type(dims).__name__}", cure="give a dict, such as {'sequence': 128}")
    for name, value in [*counts.items(), *(dims or {}).items()]:
        least = 0 if name == "seed" else 1
        if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value < 1 << 32:
            cure = f"give a whole number from {least} to {(1 << 32) - 1}"
            raise InputError("E-OPTION", f"this is no number for {name!r}", cure=cure)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _exactly(model: ir.Model | str | Path) -> ir.Model:
    """A copy of a model, or the one in a file, after the exact passes."""
    from xopt.pipeline.context import PassContext
    from xopt.pipeline.manager import PassManager
    from xopt.pipeline.registry import create
    from xopt.search.job import EXACT

    graph = _graph(model)
    graph = graph.clone() if graph is model else graph
    PassManager([create(name, {}) for name in EXACT], instruments=()).run(graph, PassContext())
    return graph


@dataclass
class Result:
    """An optimized model.

    Attributes:
        model: the graph, canonical; ``xopt.ir.export`` makes it plain ONNX.
        outcome: steps and measurements.
        job: what was asked for.
        report: everything in one dict, as in report.json.
    """

    model: ir.Model
    outcome: Outcome
    job: Job
    report: dict[str, Any]
    _steps: StepCache
    _folder: tempfile.TemporaryDirectory[str]

    def session(self) -> Session:
        """The compiled model, ready to run.

        Raises:
            InputError: E-CPU, the target is another machine; E-UNSUPPORTED-OP, the model could not be compiled.
        """
        from xopt.runtime.session import Session

        if self.outcome.best.artifact is None:
            assert self.outcome.missing is not None
            raise self.outcome.missing
        return Session.load(self.outcome.best.artifact, threads=self.job.threads)

    def save(self, output: str | Path, *, claim: Claim | None = None) -> Path:
        """Write model.onnx, model.so, model.weights, manifest.json, pipeline.yaml, report.html and report.json.

        The folder appears whole, or what was there stays. Only earlier results are replaced, as they were written. Of a
        model that could not be compiled there is no model.so, and none of the two files beside it.

        Args:
            output: the folder.
            claim: of a caller who has claimed it already (`xopt.folder.claimed`).

        Raises:
            InputError: E-OUTPUT, the folder cannot be written, or holds other files.
            VerificationError: model.onnx, run in onnxruntime, disagrees with the compiled artifact.
        """
        from xopt.folder import replacing
        from xopt.ir.exporting import export
        from xopt.pipeline.text import to_yaml
        from xopt.report.page import write_page
        from xopt.report.record import to_json
        from xopt.search.proof import prove

        output = Path(output)
        with self._steps.guarded(), replacing(output, claim) as folder:
            save(export(self.model, inline=True), folder / "model.onnx")
            if (artifact := self.outcome.best.artifact) is not None:
                for file in artifact.parent.iterdir():
                    shutil.copy2(file, folder / file.name)
            self.report["verification"] = prove(folder / "model.onnx", self.outcome.best, self.job)
            self.report["output"] = str(output)
            kept = [step.report.pass_ for step in self.outcome.steps if step.kept]
            (folder / "pipeline.yaml").write_text(to_yaml(kept), encoding="utf-8")
            (folder / "report.json").write_text(to_json(self.report), encoding="utf-8")
            write_page(self.report, folder / "report.html")
        self._steps.forget()
        return output
