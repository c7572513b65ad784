"""What the command line prints: JSON on standard output, text, tables, progress and errors.

Everything that is printed goes through here. Names, paths and words of other libraries are anybody's: what a terminal
would obey in them is shown as an escape.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt.errors import InputError, InternalError, XoptError, visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from xopt.doctor import Check

SCHEMA = 1
"""Version of the JSON on standard output and in report.json (docs/cli-json.md)."""
INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_CELL = 400
"""Characters of a name or a text in a table."""


def emit(content: Mapping[str, Any]) -> None:
    """Print machine-readable output; numbers that are not finite become null."""
    with _printing():
        print(json.dumps({"schema": SCHEMA, **finite(content)}, indent=2, allow_nan=False, default=str))


def finite(value: Any) -> Any:
    """The same as JSON can say it: what is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def out(text: object = "") -> None:
    """Lines of an answer, on standard output."""
    with _printing():
        print(_lines(text))


@contextmanager
def _printing() -> Iterator[None]:
    """What is printed inside reaches standard output, or InputError E-OUTPUT says that it cannot."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = "the disk is full" if error.errno in _FULL else f"cannot write ({error.strerror})"
        raise InputError("E-OUTPUT", what, where="standard output", cure="send it somewhere else") from error


def say(message: str) -> None:
    """A message for the user, on standard error."""
    try:
        print(_lines(message), file=sys.stderr)
    except OSError:  # nobody can be told; the exit status says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _lines(text: object) -> str:
    return "\n".join(visible(line) for line in str(text).split("\n"))


def cell(content: object) -> str:
    """What a table shows of anything: one line, and of a long text its start."""
    text = "" if content is None else visible(str(content))
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}..."


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> None:
    """Print a table on standard output; columns after the first ``left`` ones are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=_lines(title) or None, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        grid.add_column(cell(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(cell(content) for content in row))
    width = None if sys.stdout.isatty() else 140
    with _printing():
        Console(width=width, highlight=False, markup=False, emoji=False).print(grid)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error for stages (name, done, total); nothing is drawn where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    stage = TextColumn("{task.description:<18}", markup=False)
    columns = (SpinnerColumn(), stage, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(cell(stage), total=total)
            bar.update(tasks[stage], completed=done, total=total, visible=done < total)

        yield show


def size(count: float, unit: str = "") -> str:
    """A count with three digits and a prefix: ``1.23 M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5 or prefix == "T":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}".strip()


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def checks(found: Sequence[Check]) -> None:
    """The findings of ``xopt doctor``, one a line."""
    rows = [
        ("ok" if c.ok else "missing" if c.needed else "absent", c.name, c.detail, "" if c.ok else c.cure) for c in found
    ]
    table("", ["", "what", "found", "to do"], rows, left=4)


def run_guarded(command: Callable[[], None]) -> int:
    """Run a command; returns the exit status, after one line on standard error for whatever went wrong."""
    import click

    try:
        _open_streams()
        with _escaping():
            command()
    except click.exceptions.Exit as signal:
        return signal.exit_code
    except click.UsageError as error:
        return _report(_usage(error))
    except click.ClickException as error:
        return _report(InputError("E-OPTION", error.format_message()))
    except (KeyboardInterrupt, click.Abort) as interrupt:
        said = str(interrupt.__cause__ or interrupt)  # click raises Abort from the interrupt
        say(f"xopt: interrupted, {said or 'the output is as it was before'}")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except XoptError as error:
        if os.environ.get("XOPT_DEBUG") == "1":
            say(traceback.format_exc())
        return _report(error)
    except MemoryError:
        cure = "take a smaller batch or smaller sizes of axes, or a machine with more"
        return _report(InputError("E-MEMORY", "there is not enough memory", cure=cure))
    except OSError as error:
        if error.errno not in _FULL:
            return _report(_unusable(error))
        place = str(error.filename or tempfile.gettempdir())
        return _report(InputError("E-OUTPUT", "the disk is full", where=place, cure="free some space"))
    except Exception as error:
        if os.environ.get("XOPT_DEBUG") == "1":
            say(traceback.format_exc())
        return _report(_internal(error))
    return 0


def _open_streams() -> None:
    """Where the caller has closed a standard stream, what is printed goes nowhere; no file may take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115, for as long as we run


def _unusable(error: OSError) -> XoptError:
    """A file of the user's that cannot be used, or our own fault."""
    named = [os.path.abspath(one.rpartition("=")[2]) for one in sys.argv[1:]]
    path = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else ""
    if any(path == one or path.startswith(f"{one}/") for one in named if path):
        return InputError("E-FILE", f"it cannot be used: {error.strerror}", where=path, cure="check the path")
    return _internal(error)


@contextmanager
def _escaping() -> Iterator[None]:
    """Meanwhile warnings and logs of other libraries are escaped too, and no encoding of a stream is too small."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *given, **named: _lines(plain(*given, **named))
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Escaping())
    try:
        yield
    finally:
        warnings.formatwarning = plain


class _Escaping(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _lines(super().format(record))


def _report(error: XoptError) -> int:
    say(f"xopt: {error}")
    return error.exit_status


def _usage(error: Any) -> InputError:
    command = error.ctx.command_path if error.ctx is not None else "xopt"
    what = error.format_message().rstrip(".?").replace(". ", ", ")
    return InputError("E-OPTION", what[:1].lower() + what[1:], cure=f"see {command} --help")


def _internal(error: Exception) -> InternalError:
    """Our own fault: the trace goes to a file."""
    text = " ".join(str(error).split())[:300]
    trace = _lines(f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="xopt-trace-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
        cure = f"please report it with {Path(file.name)}"
    except OSError:
        cure = "please report it with what XOPT_DEBUG=1 prints (no file could be written)"
    return InternalError("E-INTERNAL", f"{type(error).__name__}: {text}", cure=cure)
