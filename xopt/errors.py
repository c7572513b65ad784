"""Errors with a cause and a cure, and the exit status each stands for.

A user sees one line, ``xopt: error[E-CODE]: what, where, what to do``; a stack trace is for our faults only.
"""

from __future__ import annotations

from typing import ClassVar


class XoptError(Exception):
    """Base of every error that xopt raises on purpose.

    Args:
        code: stable identifier such as ``"E-FORMAT"``.
        what: what is wrong, as a clause without a full stop.
        where: the node, file or option at fault.
        cure: what the user can do about it.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, code: str, what: str, *, where: str = "", cure: str = "") -> None:
        self.code = code
        self.what = what
        self.where = where
        self.cure = cure
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"error[{self.code}]: " + ", ".join(part for part in (self.what, self.where, self.cure) if part)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code, self.what, self.where, self.cure))


class InputError(XoptError):
    """The model, the data, an option or the environment is at fault (exit status 2)."""

    exit_status: ClassVar[int] = 2


class VerificationError(XoptError):
    """A pass or a compiled artifact does not compute what it should (exit status 3)."""

    exit_status: ClassVar[int] = 3


class InternalError(XoptError):
    """Our own fault (exit status 1)."""


def _rebuild(kind: type[XoptError], code: str, what: str, where: str, cure: str) -> XoptError:
    return kind(code, what, where=where, cure=cure)
