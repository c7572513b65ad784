"""The installed ``xopt`` command in a process of its own: exit status, both streams, Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(sys.executable).with_name("xopt")
LIMIT = 300.0
"""Seconds after which a command hangs."""
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@dataclass(frozen=True)
class Done:
    """What a command has printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line on standard error."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        return lines[0]

    def refused(self, code: str, status: int = 2) -> str:
        """The message of a command that has failed in the documented way with error ``code``."""
        assert self.status == status, self.err
        assert self.out == ""
        assert self.message.startswith(f"xopt: error[{code}]: "), self.err
        return self.message


def xopt(*arguments: object, env: Mapping[str, str] | None = None, preexec: Callable[[], None] | None = None) -> Done:
    """Run ``xopt`` with ``arguments``; ``env`` adds to the environment, ``preexec`` runs before the program starts."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, **(env or {})},
        preexec_fn=preexec,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def heed_interrupts() -> None:
    """In a child before it starts: undo the "ignore SIGINT" that a test run in the background has inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(stage: str, *arguments: object, env: Mapping[str, str] | None = None) -> Done:
    """Run ``xopt`` on a terminal, and press Ctrl-C as soon as its progress bar names ``stage``.

    As on a terminal, the signal goes to the command and to every compiler that it has started.
    """
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **(env or {})},
    )
    os.close(writer)
    hung = threading.Timer(LIMIT, process.kill)
    hung.start()
    try:
        printed = _until_end(reader, stage, lambda: os.killpg(process.pid, signal.SIGINT))
        out, _ = process.communicate()
    finally:
        hung.cancel()
        os.close(reader)
    last = _TERMINAL.sub("", printed).rstrip().splitlines()[-1:]
    return Done(process.returncode, out, "".join(last))


def _until_end(reader: int, stage: str, press: Callable[[], None]) -> str:
    """All that comes from the terminal; calls ``press`` once, when ``stage`` has come."""
    printed, pressed = b"", False
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # Linux says EIO when the other end is closed
            piece = b""
        if not piece:
            assert pressed, f"{stage!r} never came: {printed[-2000:].decode(errors='replace')}"
            return printed.decode(errors="replace")
        printed += piece
        if not pressed and stage.encode() in printed:
            press()
            pressed = True
