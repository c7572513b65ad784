"""What is printed obeys nobody: names, paths and other libraries' words are shown, whatever characters they hold."""

from __future__ import annotations

import ast
import errno
import io
import json
import logging
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xopt
from xopt import console
from xopt.errors import InputError, XoptError, visible

HOSTILE = "a\x1b[31m\x1b]0;t\x07\r\x08\0\x9b31m\u202eb\u2066\u200f\u2028\udcff[red]é"
"""Colours, a window's title, line ends, text from right to left, a byte of no encoding, markup, and one innocent."""
SHOWN = r"a\x1b[31m\x1b]0;t\x07\r\x08\x00\x9b31m\u202eb\u2066\u200f\u2028\udcff[red]é"


def is_harmless(text: str) -> bool:
    return all(one == "\n" or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in text)


@given(st.text(st.characters()))
def test_what_is_visible_is_harmless_and_what_was_stays(text: str) -> None:
    shown = visible(text)
    assert is_harmless(shown) and "\n" not in shown
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


def test_it_is_escaped_as_in_python() -> None:
    assert visible(HOSTILE) == SHOWN


def test_an_error_is_one_harmless_line() -> None:
    error = InputError("E-DATA", f"there is no\n{HOSTILE}", where=HOSTILE, cure="x" * 100_000)
    assert str(error).startswith(f"error[E-DATA]: there is no {SHOWN[:10]}")
    assert is_harmless(str(error)) and "\n" not in str(error)
    assert len(str(error)) < 10_000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.what == f"there is no\n{HOSTILE}"


def test_text_and_tables_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    console.out(f"first\n{HOSTILE}")
    console.say(f"first\n{HOSTILE}")
    console.table(HOSTILE, ["name", HOSTILE], [(HOSTILE, "x" * 100_000), (None, 3)])
    out, err = capsys.readouterr()
    assert out.startswith(f"first\n{SHOWN}\n") and err == f"first\n{SHOWN}\n"
    assert is_harmless(out)
    assert out.count(SHOWN) >= 2  # the others are folded
    assert len(out) < 20_000


def test_words_between_colons_are_no_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(":smile:", [":warning:"], [(":smile:",)])
    assert capsys.readouterr().out.split() == [":smile:", ":warning:", ":smile:"]


def test_an_error_that_nobody_can_be_told_keeps_its_status() -> None:
    command = f"{shlex.quote(sys.executable)} -c 'from xopt.cli import main; main()' inspect none 2>/dev/full"
    assert subprocess.run(["sh", "-c", command], timeout=120, check=False).returncode == 2


def test_a_fault_of_ours_is_one_line_though_no_trace_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    assert console.run_guarded(lambda: 1 // 0) == 1  # type: ignore[arg-type, return-value]
    assert re.fullmatch(r"xopt: error\[E-INTERNAL\]: ZeroDivisionError: .*XOPT_DEBUG=1.*\n", capsys.readouterr().err)


def test_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"a": [float("nan"), {"b": float("-inf")}], "c": 1.5})
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "a": [None, {"b": None}], "c": 1.5}


def test_progress_is_harmless(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: what rich sends to place the cursor is there, what the name holds is not."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    with console.progress() as show:
        show(HOSTILE, 0, 2)
    err = capsys.readouterr().err
    assert r"\x1b]0;t\x07" in err
    assert "[red]" in err
    assert not set("\x07\x08\0\x9b\u202e\u2066\u2028\udcff") & set(err)


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize(
    "error",
    [
        InputError("E-DATA", HOSTILE),
        ValueError(HOSTILE),
        KeyError(HOSTILE),
        OSError(28, HOSTILE, HOSTILE),
        OSError(5, HOSTILE, HOSTILE),
        KeyboardInterrupt(HOSTILE),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_end_of_a_command_is_harmless(
    error: BaseException,
    debug: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XOPT_DEBUG", debug)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["xopt", HOSTILE])
    status = console.run_guarded(lambda: _raise(error))
    err = capsys.readouterr().err
    assert status in (1, 2, 130)
    assert is_harmless(err) and r"\x1b]0;t" in err
    assert debug == "1" or err.count("\n") == 1
    assert all(is_harmless(file.read_text(encoding="utf-8")) for file in tmp_path.iterdir())


def test_warnings_and_logs_are_harmless(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("elsewhere"), "propagate", False)

    def command() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _show
            warnings.warn(HOSTILE, stacklevel=1)
        logging.getLogger("elsewhere").warning(HOSTILE)

    assert console.run_guarded(command) == 0
    err = capsys.readouterr().err
    assert is_harmless(err)
    assert err.count(SHOWN) == 2


def _show(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
    """As Python does, where pytest would collect the warning."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_no_encoding_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", narrow)
    assert console.run_guarded(lambda: console.out("é")) == 0
    assert narrow.buffer.getvalue() == b"\\xe9\n"  # type: ignore[attr-defined]


def test_nothing_is_printed_past_the_console() -> None:
    """`print` is called elsewhere only on what is escaped there, by `visible` or as JSON."""
    assert xopt.__file__ is not None
    root = Path(xopt.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path == root / "console.py":
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
                given = call.args[0] if call.args else None
                assert isinstance(given, ast.Call), f"{path}:{call.lineno}"
                assert ast.unparse(given.func) in ("visible", "json.dumps"), f"{path}:{call.lineno}"
            if isinstance(call, ast.Attribute) and ast.unparse(call) in ("sys.stdout.write", "sys.stderr.write"):
                raise AssertionError(f"{path}:{call.lineno}")


def test_errors_show_names_in_python_too() -> None:
    with pytest.raises(XoptError) as caught:
        xopt.load("/nowhere/\x1b[31m.onnx")
    assert r"\x1b[31m" in str(caught.value) and is_harmless(str(caught.value))
