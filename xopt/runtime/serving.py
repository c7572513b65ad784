"""Whose run a thread is in: compiled code that calls back says nothing of that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xopt.runtime.session import Session

_thread = threading.local()


@contextmanager
def serving(session: Session) -> Iterator[None]:
    """Meanwhile what this thread's compiled code calls is served by ``session``."""
    before = getattr(_thread, "session", None)
    _thread.session = session
    try:
        yield
    finally:
        _thread.session = before


def session() -> Any:
    """The session whose run this thread is in."""
    return _thread.session
