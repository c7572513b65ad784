"""Errors with a cause and a cure, and the exit status each stands for.

A user sees one line, ``xopt: error[E-CODE]: what, where, what to do``; a stack trace is for our faults only.
"""

from __future__ import annotations

from typing import ClassVar

_LONGEST_PART = 2000
"""Characters of an error's cause, place or cure that are shown; a name may have any number."""


def visible(text: str) -> str:
    r"""``text`` with everything that a terminal obeys, or does not show, escaped as Python writes it: ``\x1b``.

    Line ends are escaped too, and what is no character of any encoding (surrogates, as in paths that are not UTF-8).
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _brief(text: str) -> str:
    most = _LONGEST_PART // 2
    return text if len(text) <= 2 * most else f"{text[:most]} ... {text[-most:]}"


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
        """One line that shows what it says, though names, paths and other libraries' words are in it."""
        parts = [_brief(visible(" ".join(part.split()))) for part in (self.what, self.where, self.cure) if part]
        return f"error[{self.code}]: " + ", ".join(parts)

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
