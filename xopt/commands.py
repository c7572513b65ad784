"""The subcommands' work: call the API, print the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt import console, files
from xopt.errors import InputError, VerificationError
from xopt.scratch import scratch

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from xopt.data.dataset import Dataset
    from xopt.measure.isolated import Factory
    from xopt.pipeline.base import Pass
    from xopt.runtime.manifest import TensorInfo
    from xopt.runtime.session import Session


def pipeline(passes: str | None, recipe: Path | None) -> list[Pass] | None:
    """The passes of ``--passes`` or ``--recipe``; None without either."""
    from xopt.pipeline import text

    if passes is not None and recipe is not None:
        raise InputError("E-OPTION", "--passes and --recipe exclude each other", cure="give one of them")
    if recipe is not None:
        return text.load(recipe)
    return None if passes is None else text.parse(passes)


@scratch()
def optimize(
    model: Path,
    passes: Sequence[Pass] | None,
    output: Path,
    *,
    as_json: bool,
    command: str,
    dims: tuple[str, ...],
    peers: bool,
    resume: bool,
    dry_run: bool,
    time_passes: bool,
    database: Path | None,
    no_database: bool,
    **settings: Any,
) -> None:
    """``xopt optimize``."""
    from xopt import api, folder
    from xopt.pipeline.instruments import TimePasses
    from xopt.report import summary

    folder.check(output, {"the model": model, "the folder for dumps": settings["dump_ir"]})
    sizes = _dims(dims)
    chosen = _database(database, no_database)
    job = api.plan(model, passes, dims=sizes, peers=None if peers else (), database=chosen, **settings)
    if dry_run:
        summary.print_plan(job.plan(), as_json)
        return
    timer = TimePasses()
    with console.progress() as progress, folder.claimed(output) as claim:
        result = api.run_plan(job, progress=progress, cache=claim.steps, resume=resume, instruments=[timer])
        result.report["command"] = command
        result.save(output, claim=claim)
    if time_passes:
        console.say(str(timer))
    if as_json:
        console.emit(summary.brief(result.report))
    else:
        summary.print_report(result.report)


@scratch()
def compile_model(
    model: Path,
    target: str,
    dims: tuple[str, ...],
    output: Path,
    as_json: bool,
    *,
    precision: str = "fp32",
    database: Path | None = None,
    no_database: bool = False,
    verify: bool = True,
    fallback: bool = False,
) -> None:
    """``xopt compile``."""
    from xopt import api
    from xopt.runtime.manifest import read_segments

    sizes = _dims(dims)
    chosen = _database(database, no_database)
    found: dict[str, Any] = {"compared": False, "reason": "not asked for"}
    library = api.compile(
        model, target, output, dims=sizes, database=chosen, precision=precision, fallback=fallback, verify=verify,
        verified=found.update,
    )  # fmt: skip
    segments = read_segments(library)
    if found["compared"]:
        del found["reason"]
    if as_json:
        told = {"artifact": str(library), "target": target, "precision": precision, "dims": sizes}
        console.emit({**told, "verification": found, "segments": segments})
        return
    if segments:
        console.say(f"in onnxruntime: {', '.join(segments)}")
    if verify:
        console.say(_verdict(found))
    console.out(library)


def _verdict(verification: Mapping[str, Any]) -> str:
    """How a compiled model compares with the one that it was made of, in a line."""
    if not verification["compared"]:
        return f"not verified: {verification['reason']}"
    off = max((one["max_abs"] / one["scale"] for one in verification["outputs"].values() if one["scale"]), default=0.0)
    return f"verified: equal to the model in onnxruntime to {off:.1e} of the largest output, on random inputs"


@scratch()
def tune(model: Path, *, as_json: bool, dims: tuple[str, ...], database: Path | None, **settings: Any) -> None:
    """``xopt tune``."""
    from xopt import api
    from xopt.report import tuning
    from xopt.targets.database import default_path

    path = default_path() if database is None else database
    try:
        with tuning.display() as (progress, finished):
            result = api.tune(model, dims=_dims(dims), database=path, progress=progress, finished=finished, **settings)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"kernels that were done are kept in {path}") from interrupt
    if as_json:
        console.emit(tuning.to_json(result))
    else:
        tuning.print_result(result)


@scratch()
def run(
    artifact: Path,
    *,
    as_json: bool,
    data: str | None,
    batch: int,
    threads: int | None,
    seed: int,
    dims: tuple[str, ...],
    output: Path | None,
) -> None:
    """``xopt run``."""
    if (artifact / "reproducer.json").is_file():
        _rerun(artifact, as_json)
        return
    from xopt.data import outputs as files
    from xopt.runtime.session import Session

    if output is not None:
        files.check(output)
    session = Session.load(artifact, threads=threads)
    feeds = _feeds(session.inputs, data, batch, seed, _dims(dims))
    outputs = session.run(feeds)
    if output is not None:
        files.write(output, outputs)
    shown = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in outputs.items()}
    if as_json:
        console.emit(
            {
                "outputs": shown,
                "samples": next((len(array) for array in feeds.values() if array.ndim), 1),
                "file": output and str(output),
            }
        )
    else:
        rows = [(name, facts["dtype"], facts["shape"]) for name, facts in shown.items()]
        console.table("", ["output", "dtype", "shape"], rows, left=3)


@scratch()
def bench(
    model: Path,
    *,
    as_json: bool,
    peers: bool,
    chosen: tuple[str, ...],
    data: str | None,
    batch: int,
    threads: int | None,
    seed: int,
    dims: tuple[str, ...],
    rounds: int,
    precision: str,
    layers: bool,
) -> None:
    """``xopt bench``."""
    import tempfile

    from xopt.measure import machine
    from xopt.measure.isolated import isolated
    from xopt.measure.latency import Contender, Local, in_turns, pinned
    from xopt.measure.peers import NAMES
    from xopt.runtime.threads import physical_cores

    names = tuple(dict.fromkeys((*(NAMES if peers else ()), *chosen)))
    count = threads or physical_cores()
    with tempfile.TemporaryDirectory(prefix="xopt-") as folder, console.progress() as progress:
        session, feeds, factories = _contest(
            model, Path(folder), names, data, batch, count, seed, _dims(dims), precision
        )
        with isolated(factories, feeds, count) as others, pinned(count):
            contenders: dict[str, Contender] = {"xopt": Local(session.run, feeds), **others.contenders}
            times = in_turns(contenders, rounds=rounds, seconds=120, progress=progress)
            table = _layers(session, feeds, count) if layers else []
    if as_json:
        runtimes = {name: t.record() for name, t in times.items()}
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        answer = {"runtimes": runtimes, "threads": count, "machine": machine.describe()}
        console.emit({**answer, "skipped": others.skipped, "feeds": shapes, **({"layers": table} if layers else {})})
        return
    ours = times["xopt"].median
    rows = [(name, f"{t.median:.3f}", f"{t.p90:.3f}", f"{t.median / ours:.2f}") for name, t in times.items()]
    console.table(f"{count} threads", ["runtime", "median ms", "p90 ms", "x xopt"], rows)
    for name, reason in others.skipped.items():
        console.say(f"{name} is left out: {reason}")
    if layers:
        total = sum(layer["ms"] for layer in table)
        lines = [
            (x["kernel"][:60], x["calls"], f"{x['ms']:.3f}", f"{x['ms'] / total:.1%}", _share(x["limit_ms"], x["ms"]))
            for x in table
        ]
        console.table("", ["kernel", "calls", "ms", "of all", "of limit"], lines)


def _layers(session: Session, feeds: Mapping[str, np.ndarray], threads: int) -> list[dict[str, Any]]:
    """Time of each kernel of a session's run beside the machine's limits, as JSON has it."""
    import dataclasses

    from xopt.measure.layers import calls, layers, products
    from xopt.measure.peak import Probe

    found = calls(session, feeds)
    peaks = {precision: Probe(threads, precision).measure() for precision in products(found)}
    return [dataclasses.asdict(layer) for layer in layers(found, peaks)]


def _share(limit: float, time: float) -> str:
    return f"{limit / time:.0%}" if limit else ""


def inspect(model: Path, dims: tuple[str, ...], as_json: bool) -> None:
    """``xopt inspect``."""
    from xopt import facts, ir
    from xopt.report import summary

    graph = ir.load(model)
    refused = ir.canonicalize(graph).refused
    found = facts.describe(graph, _dims(dims), refused)
    if as_json:
        console.emit(found)
    else:
        summary.print_facts(found)


def passes(name: str | None, as_json: bool) -> None:
    """``xopt passes``."""
    import dataclasses

    from xopt.pipeline import registry

    classes, broken = registry.survey() if name is None else ([registry.get(name)], [])
    if as_json:
        listed = [dataclasses.asdict(one) for one in broken]
        console.emit({"passes": [_describe_pass(cls) for cls in classes], "broken": listed})
    elif name is None:
        rows = [(cls.name, cls.effect.value, cls.summary()) for cls in classes]
        rows += [(repr(one.name)[1:-1], "broken", f"{one.reason}; of package {one.package}") for one in broken]
        console.table("", ["pass", "effect", "what it does"], rows, left=3)
    else:
        console.out((classes[0].__doc__ or "").strip())
        options = [(o.name, o.default, str(o)) for o in classes[0].options().values()]
        console.table("", ["option", "default", "legal"], options, left=3)


def targets(as_json: bool) -> None:
    """``xopt targets``."""
    from xopt import targets as known

    found = [known.get(name) for name in (known.NAMES[0], *known.variants())]
    facts = [{"name": t.name, "runs_here": t.can_run(), "tile": t.tile, "features": list(t.features())} for t in found]
    if as_json:
        console.emit({"targets": facts})
        return
    rows = [
        (f["name"], "yes" if f["runs_here"] else "no", f["tile"], " ".join(t.features())) for f, t in zip(facts, found)
    ]
    console.table("", ["target", "runs here", "tile", "features"], rows, left=4)


@scratch()
def diff(before: Path, after: Path, *, as_json: bool, data: str | None, seed: int, dims: tuple[str, ...]) -> None:
    """``xopt diff``."""
    from xopt import facts, ir
    from xopt.report import summary

    sizes = _dims(dims)
    models = [ir.load(before), ir.load(after)]
    samples = _samples(models[0], data, seed, sizes)
    for graph in models:
        ir.canonicalize(graph)
    found = facts.differences(models[0], models[1], samples, sizes)
    if as_json:
        console.emit(found)
    else:
        summary.print_differences(found)


@scratch()
def bisect(
    model: Path,
    passes: Sequence[Pass] | None,
    *,
    as_json: bool,
    data: str | None,
    check: str | None,
    seed: int,
    dims: tuple[str, ...],
) -> None:
    """``xopt bisect``."""
    import dataclasses

    from xopt import ir
    from xopt.data.dataset import resolve
    from xopt.pipeline.bisect import bisect as search
    from xopt.pipeline.context import PassContext
    from xopt.pipeline.registry import create
    from xopt.search.job import EXACT

    graph = ir.load(model)
    listed = [create(name, {}) for name in EXACT] if passes is None else list(passes)
    sizes = _dims(dims)
    context = PassContext(seed=seed, calibration=_samples(graph, data, seed, sizes), dims=sizes)
    culprit = search(graph, listed, context, None if check is None else resolve(check, "--check"))
    if as_json:
        found = None
        if culprit is not None:
            facts = dataclasses.asdict(dataclasses.replace(culprit, pass_=None))
            found = {**facts, "pass": culprit.pass_ and culprit.pass_.name}
            del found["pass_"]
        console.emit({"culprit": found})
    else:
        console.out("no pass breaks the check" if culprit is None else culprit)
    if culprit is not None:
        raise VerificationError("E-VERIFY", str(culprit))


def report(folder: Path, output: Path | None, as_json: bool) -> None:
    """``xopt report``."""
    from xopt.report import record, summary
    from xopt.report.page import write_page

    source = folder / "report.json" if folder.is_dir() else folder
    content = record.read(source)
    page = output or source.with_name("report.html")
    write_page(content, page)
    if as_json:
        console.emit({**summary.brief(content), "page": str(page)})
    else:
        summary.print_report(content)


def doctor(as_json: bool) -> None:
    """``xopt doctor``."""
    import dataclasses

    from xopt.doctor import examine

    found = examine()
    if as_json:
        console.emit({"checks": [dataclasses.asdict(check) for check in found]})
    else:
        console.checks(found)
    missing = [check for check in found if check.needed and not check.ok]
    if missing:
        raise InputError("E-TOOLCHAIN", f"{missing[0].name} is missing or unfit", cure=missing[0].cure)


def _database(path: Path | None, without: bool) -> Path | bool:
    """``--database`` and ``--no-database`` as the API takes them."""
    if path is not None and without:
        raise InputError("E-OPTION", "--database and --no-database exclude each other", cure="give one of them")
    if path is not None:
        files.open_regular(path, "the database", "make it with xopt tune").close()
    return not without if path is None else path


def _dims(pairs: tuple[str, ...]) -> dict[str, int]:
    """``NAME=SIZE`` options as a dict."""
    sizes: dict[str, int] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        if not name or not (number.isascii() and number.isdecimal()) or len(number) > 10 or int(number) < 1:
            raise InputError("E-OPTION", f"{pair[:100]!r} is not NAME=SIZE", where="--dim", cure="write sequence=128")
        if name in sizes:
            raise InputError("E-OPTION", f"axis {name!r} is given twice", where="--dim", cure="give each axis once")
        sizes[name] = int(number)
    return sizes


def _samples(model: ir.Model, data: str | None, seed: int, dims: Mapping[str, int]) -> Dataset:
    """The user's data as the model takes them, or random ones."""
    from xopt.data.dataset import Dataset
    from xopt.ir import sized
    from xopt.search.job import evaluation_batch

    model = sized(model)
    if data is not None:
        return Dataset.of(data).matched(model)
    return Dataset.random(model, 4 * evaluation_batch(model, 1), seed, dims)


def _feeds(
    inputs: Sequence[TensorInfo], data: str | None, batch: int, seed: int, dims: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """All of the user's samples for an artifact, or a random batch."""
    from xopt.data.dataset import Dataset
    from xopt.data.synthetic import random_feeds

    if data is None:
        return random_feeds(inputs, batch, seed, dims)
    arrays = Dataset.of(data).inputs
    return {info.name: arrays[info.name] for info in inputs if info.name in arrays}


def _contest(
    model: Path,
    folder: Path,
    names: tuple[str, ...],
    data: str | None,
    batch: int,
    threads: int,
    seed: int,
    dims: Mapping[str, int],
    precision: str,
) -> tuple[Session, dict[str, np.ndarray], dict[str, Factory]]:
    """The compiled model, the arrays to feed, and how to load the peers."""
    from xopt import api
    from xopt.ir.io import load
    from xopt.measure import peers
    from xopt.runtime.session import Session
    from xopt.search.job import evaluation_batch, timed_feeds

    if model.suffix == ".so" or model.is_dir():
        if names:
            raise InputError("E-OPTION", "peers take an ONNX file", where=str(model), cure="name the .onnx file")
        session = Session.load(model, threads=threads)
        return session, _feeds(session.inputs, data, batch, seed, dims), {}
    graph = load(model)
    feeds = timed_feeds(_samples(graph, data, seed, dims), evaluation_batch(graph, batch))
    others = peers.factories(model, feeds, threads=threads, names=names, precision=precision)
    library = api.compile(graph, "cpu", folder / "model.so", threads=threads, precision=precision)
    return Session.load(library, threads=threads), feeds, others


def _rerun(folder: Path, as_json: bool) -> None:
    """Run a reproducer: the same error again, or the word that it is gone."""
    from xopt.pipeline.reproduce import rerun

    steps = rerun(folder)
    if as_json:
        console.emit({"reproduced": False, "steps": [step.pass_.name for step in steps]})
    else:
        console.out("the failure is gone: " + ", ".join(step.pass_.name for step in steps) + " ran and verified")


def _describe_pass(cls: type[Pass]) -> dict[str, Any]:
    options = {o.name: {"legal": str(o), "default": o.default} for o in cls.options().values()}
    return {"name": cls.name, "effect": cls.effect.value, "summary": cls.summary(), "options": options}
