"""What a pass is kept from: code of third parties runs in this process, and must not carry its faults elsewhere.

Arrays and data are read-only to it, and written to in secret only to be found out; the context is a copy; what it
prints goes to standard error; environment and working directory are put back; it cannot end the process, and a process
that it forks ends with it; what it returns is a report that can be written down, or an error that names the pass.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.errors import VerificationError
from xopt.ir.unshared import checksum, checksums, read_only
from xopt.pipeline.base import Pass, PassReport, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.data.dataset import Dataset
    from xopt.pipeline.context import PassContext

COPY = "give the value a tensor of its own: value.const_value = onnx_ir.tensor(changed copy)"


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Run code of ``what`` (a pass, a package); VerificationError E-PASS where it tries to end the process."""
    process, folder, environment = os.getpid(), _working_directory(), dict(os.environ)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as signal:
        said = " ".join(f"{type(signal).__name__} {signal}".split())
        raise VerificationError("E-PASS", f"{what} tries to end the process ({said})") from signal
    finally:
        if os.getpid() != process:
            os._exit(1)  # a process that the pass has forked must not go on with our work
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        if folder is not None and _working_directory() != folder:
            os.chdir(folder)


def _working_directory() -> str | None:
    """None where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


@contextmanager
def clear_words() -> Iterator[None]:
    """Say what an error of numpy about a read-only array means."""
    try:
        yield
    except (ValueError, BufferError) as error:
        if not any(word in str(error) for word in ("read-only", "readonly", "WRITEABLE")):
            raise
        what = f"the pass writes in place into an array that the models before it share ({error})"
        raise VerificationError("E-PASS", what, cure=COPY) from error


def private(context: PassContext) -> PassContext:
    """A copy of the context for one pass: the data are read-only, and what it sets is seen by nobody else."""
    samples = context.calibration
    return dataclasses.replace(
        context, dims=dict(context.dims), calibration=None if samples is None else _read_only(samples)
    )


def _read_only(data: Dataset) -> Dataset:
    twin = copy.copy(data)  # its arrays were checked before
    object.__setattr__(twin, "inputs", {name: read_only(array) for name, array in data.inputs.items()})
    object.__setattr__(twin, "labels", None if data.labels is None else read_only(data.labels))
    return twin


class Seals:
    """Checksums of everything that a pass could reach and must not write to."""

    def __init__(self, model: ir.Model, context: PassContext) -> None:
        self._model, self._data = model, context.calibration
        self._found = self._checksums()

    def _checksums(self) -> dict[str, int]:
        found = {f"{place} of the model": number for place, number in checksums(self._model).items()}
        if self._data is not None:
            found |= {f"data {name!r}": checksum(array) for name, array in self._data.inputs.items()}
            if self._data.labels is not None:
                found["the labels"] = checksum(self._data.labels)
        return found

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """VerificationError E-PASS where something is not after the block what it was: it cannot be put back.

        That comes before any other error of the block: nothing that is computed from now on would mean anything.
        """
        try:
            yield
        finally:
            self._check()

    def _check(self) -> None:
        broken = [place for place, number in self._checksums().items() if self._found.get(place) != number]
        if broken:
            what = f"the pass has written in place into what is not its own: {', '.join(broken[:3])}"
            raise VerificationError("E-PASS", what, cure=COPY)


def checked_report(report: object, one: Pass) -> PassReport:
    """What a pass returned, in types that can be written down; VerificationError E-PASS where it is no report."""
    if not isinstance(report, PassReport):
        what = f"the pass returns {_kind(report)} instead of a report"
        raise VerificationError("E-PASS", what, cure="return an xopt.pipeline.base.PassReport")
    report.pass_ = one
    report.matched, report.rewritten = (_count(getattr(report, name), name) for name in ("matched", "rewritten"))
    report.accepted = [str(place) for place in _list(report.accepted, "accepted")]
    report.refused = [_refusal(item) for item in _list(report.refused, "refused")]
    if not isinstance(report.numbers, dict):
        raise _unfit("numbers", report.numbers, "a dict")
    report.numbers = {str(name): _number(value, str(name)) for name, value in report.numbers.items()}
    return report


def _count(value: Any, name: str) -> int:
    if isinstance(value, (int, np.integer)) and value >= 0:
        return int(value)
    raise _unfit(name, value, "a count")


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise _unfit(name, value, "a list")


def _refusal(item: Any) -> Refusal:
    if isinstance(item, Refusal):
        return Refusal(str(item.what), str(item.reason))
    raise _unfit("refused", item, "a Refusal")


def _number(value: Any, name: str) -> float | int | str:
    if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, (bool, int, float, str)):
        return value
    raise _unfit(f"numbers[{name!r}]", value, "a number or a word")


def _unfit(name: str, value: Any, wanted: str) -> VerificationError:
    return VerificationError("E-PASS", f"the report's {name} is {_kind(value)}, expected {wanted}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
