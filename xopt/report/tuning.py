"""What ``xopt tune`` shows: progress, a table, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from xopt import console
from xopt.tuning.run import Kernel, Progress, Tuning

Callbacks = tuple[Callable[[Progress], None], Callable[[Kernel], None]]


@contextmanager
def display() -> Iterator[Callbacks]:
    """The kernel in work with its best so far, and the estimated rest; finished kernels scroll above it.

    Nothing is drawn where standard error is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    screen = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("best {task.fields[gain]:.2f}x  rest {task.fields[rest]}"),
    )
    with Bar(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("start", total=None, gain=1.0, rest="")

        def progress(now: Progress) -> None:
            rest = f"{int(now.rest) // 60}:{int(now.rest) % 60:02d}"
            bar.update(
                task,
                description=console.cell(now.kernel),
                completed=now.done,
                total=now.total,
                gain=now.gain,
                rest=rest,
            )

        def finished(kernel: Kernel) -> None:
            if screen.is_terminal:
                line = f"{console.cell(kernel.site):<44} {console.cell(kernel.status):<9} {_gain(kernel)}"
                bar.console.print(line, highlight=False, markup=False)

        yield progress, finished


def print_result(result: Tuning) -> None:
    """A table of the kernels, and what tuning has gained."""
    rows = [
        (
            str(kernel.site),
            kernel.count,
            f"{kernel.status}, known" if kernel.known else kernel.status,
            *(
                ("", "", "", kernel.reason)
                if kernel.record is None
                else (
                    f"{kernel.record.heuristic_seconds * 1e3:.3f}",
                    f"{kernel.record.seconds * 1e3:.3f}",
                    _gain(kernel),
                    _fields(kernel.record.config),
                )
            ),
        )
        for kernel in result.kernels
    ]
    columns = ["kernel", "calls", "", "heuristic ms", "best ms", "gain", "configuration"]
    console.table(f"{result.threads} threads", columns, rows)
    left = sum(kernel.status == "left" for kernel in result.kernels)
    if left:
        console.say(f"{left} kernels are left: the same command goes on with them")
    console.out(f"{result.gain:.3f}x in all, {result.seconds:.0f} s, {result.database}")


def to_json(result: Tuning) -> dict[str, Any]:
    """The JSON of ``xopt tune`` (docs/cli-json.md)."""
    return {
        "kernels": [_kernel(kernel) for kernel in result.kernels],
        "gain": result.gain,
        "seconds": result.seconds,
        "threads": result.threads,
        "database": str(result.database),
    }


def _kernel(kernel: Kernel) -> dict[str, Any]:
    record = kernel.record
    return {
        "kernel": kernel.site.family,
        "shapes": kernel.site.shapes,
        "calls": kernel.count,
        "status": kernel.status,
        "known": kernel.known,
        "reason": kernel.reason or None,
        "workload": None if record is None else record.workload,
        "config": None if record is None else record.config,
        "heuristic": None if record is None else record.heuristic,
        "ms": None if record is None else record.seconds * 1e3,
        "heuristic_ms": None if record is None else record.heuristic_seconds * 1e3,
        "trials": None if record is None else record.trials,
        "failures": [{"config": config, "reason": reason} for config, reason in kernel.failures],
    }


def _gain(kernel: Kernel) -> str:
    return "" if kernel.record is None else f"{kernel.record.gain:.2f}x"


def _fields(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())
