"""What an unlucky user may type: each time one clear line, exit status 2, and nothing written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.acceptance.command import COMMAND
from tests.ir import builders
from xopt import api, cli
from xopt.errors import InputError
from xopt.ir.io import save


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with all that may be taken for one."""
    folder = tmp_path_factory.mktemp("place")
    save(builders.vit(layers=1), folder / "m.onnx")
    np.savez(folder / "d.npz", pixel_values=np.zeros((4, 3, 16, 16), np.float32))
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "text").write_text("hello\n")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    (folder / "piped").mkdir()
    os.mkfifo(folder / "piped" / "report.json")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket"))  # its whole path may be longer than one may be
    (folder / "bytes").write_bytes(b"\xff\xfe\x00")
    (folder / "bomb.yaml").write_text("- a: &a [x, x]\n- b: [*a, *a]\n")
    (folder / "deep.yaml").write_text("[" * 9000)
    (folder / "word.yaml").write_text("just words")
    (folder / "list.json").write_text("[]")
    (folder / "reproducer").mkdir()
    (folder / "reproducer" / "reproducer.json").write_text('{"format": 1}')
    (folder / "mine.py").write_text("def gone(*a): raise SystemExit(0)\ndef three(*a): return 3\nnumber = 3\n")
    return folder


NO_FILES = ["none", "", "folder", "loop", "zero", "null", "pipe", "empty", "text", "bytes", "text/x", "x" * 300, "-"]
RECIPES = [*(path for path in NO_FILES if path != "empty"), "bomb.yaml", "deep.yaml", "word.yaml"]
ODD_BYTES = os.fsdecode(b"caf\xe9.onnx")
MODEL_COMMANDS = ("inspect", "compile", "optimize", "tune", "bench")
LONG = "9" * 6000

INVOCATIONS: list[list[str]] = [
    *([command, path] for command in ("inspect", "compile", "run", "report") for path in [*NO_FILES, "socket"]),
    ["report", "piped"],
    *([command, path] for command in ("optimize", "bench", "tune") for path in ("none", "zero", "pipe", ODD_BYTES)),
    *(["diff", "m.onnx", path] for path in ("none", "zero", "folder", ODD_BYTES)),
    *(["bisect", path] for path in ("none", "pipe", "text")),
    *(["optimize", "m.onnx", "--data", path] for path in [*NO_FILES, "m.onnx", ":", "a:", ":b", "none:f", "none.py:f"]),
    *(["optimize", "m.onnx", "--data", f"mine.py:{name}"] for name in ("gone", "three", "number", "missing")),
    *(["optimize", "m.onnx", "--recipe", path] for path in RECIPES),
    *(["optimize", "m.onnx", "--seed", value] for value in ("-1", "1.5", "nan", "", LONG, str(1 << 32))),
    *(["optimize", "m.onnx", "--max-drop", value] for value in ("nan", "inf", "-1", "-inf", "much", "1e999")),
    *(["optimize", "m.onnx", "--batch", value] for value in ("0", "-1", "100000000", LONG, "1e3", "")),
    *(["optimize", "m.onnx", "--threads", value] for value in ("0", "-1", "1000000000", "two", "")),
    *(["tune", "m.onnx", "--timeout", value] for value in ("nan", "inf", "-1", "soon")),
    *(["tune", "m.onnx", "--trials", value] for value in ("0", "-5", "x")),
    *(["bench", "m.onnx", "--rounds", value] for value in ("0", "4", "x", "1.5")),
    *(["inspect", "m.onnx", "--dim", v] for v in ("", "=", "a=", "=1", "batch", "batch=0", "batch=-1", "batch=1.5")),
    *(["inspect", "m.onnx", "--dim", v] for v in ("batch=x", f"batch={LONG}", "batch=٣", "batch= 1", "other=3")),
    ["inspect", "m.onnx", "--dim", "batch=1", "--dim", "batch=2"],
    *(["optimize", "m.onnx", "--passes", v] for v in (",", "{", "canonicalize{", "canonicalize{x=1}", "[" * 5000)),
    *(["optimize", "m.onnx", "--passes", v] for v in (f"prune-heads{{keep={LONG}}}", "prune-heads{keep=[[[]]]}", "\0")),
    *(["optimize", "m.onnx", "--metric", v] for v in ("", "beauty", "none:f", "none.py:f", ":")),
    *(["compile", "m.onnx", "--target", v] for v in ("", "toaster", "cpu:x:y", ":", "cuda:sm_0x", "CPU")),
    ["compile", "m.onnx", "--precision", "int3"],
    ["compile", "m.onnx", "--database", "none"],
    ["compile", "m.onnx", "--database", "zero"],
    ["compile", "m.onnx", "--database", "pipe"],
    ["compile", "m.onnx", "--database", "text", "--no-database"],
    ["compile", "m.onnx", "-o", "text/model.so"],
    ["optimize", "m.onnx", "-o", "text"],
    ["optimize", "m.onnx", "-o", "x" * 300],
    ["bench", "m.onnx", "--peer", ""],
    ["bench", "folder", "--peers"],
    ["bisect", "m.onnx", "--check", "none:f"],
    ["bisect", "m.onnx", "--check", "mine.py:number"],
    ["report", "list.json"],
    ["run", "reproducer"],
    ["tune", "m.onnx", "--database", "zero"],
    ["tune", "m.onnx", "--database", "pipe"],
    ["passes", ""],
    ["passes", "a", "b"],
    ["targets", "x"],
    ["doctor", "x"],
    ["nothing"],
    ["--nothing"],
    ["inspect"],
    ["inspect", "m.onnx", "m.onnx"],
    ["inspect", "--json"],
    ["inspect", "m.onnx", "--json=1"],
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", INVOCATIONS, ids=lambda words: " ".join(words).encode("ascii", "replace").decode()[:60]
)
def test_one_line_and_status_2(
    arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["xopt", *arguments])
    before = sorted(place.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("xopt: error[E-"), err[-2000:]
    assert "E-INTERNAL" not in lines[0] and "Traceback" not in err
    assert ended.value.code == 2 and out == ""
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "status"),
    [("passes >&-", 0), ("passes <&- >&- 2>&-", 0), ("inspect none <&- >&- 2>&-", 2), ("inspect none 2>&-", 2)],
)
def test_streams_that_are_closed(line: str, status: int) -> None:
    done = subprocess.run(["sh", "-c", f"{COMMAND} {line}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, "")


MODEL = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }'
)


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": None},
        {"model": 3},
        {"model": b"x"},
        {"passes": 3},
        {"passes": [3]},
        {"target": 5},
        {"target": None},
        {"threads": -1},
        {"threads": 0},
        {"threads": "2"},
        {"threads": 10**9},
        {"threads": 1.5},
        {"seed": -1},
        {"seed": None},
        {"seed": 10**9000},
        {"batch": 0},
        {"batch": "1"},
        {"max_drop": float("nan")},
        {"max_drop": float("inf")},
        {"max_drop": -1},
        {"max_drop": "x"},
        {"dims": 3},
        {"dims": {"n": "x"}},
        {"dims": {"n": 0}},
        {"precision": 3},
        {"data": 3},
        {"data": {"x": [[1], [1, 2]]}},
        {"metric": 3},
    ],
    ids=lambda given: next(iter(given)),
)
def test_wrong_types_in_python(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError):
        api.plan(**{"model": MODEL, **arguments})  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    plan = api.plan(MODEL, seed=np.int64(3), batch=np.int32(2), dims={"batch": np.int64(4)}, peers=())  # type: ignore
    assert (plan.seed, len(next(iter(plan.feeds.values())))) == (3, 2)
    json.dumps(plan.plan())


@pytest.mark.parametrize("path", [3, None, "", "none", b"x", object()])
def test_what_is_no_path_of_a_model(path: object) -> None:
    with pytest.raises(InputError):
        api.load(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"model": None}, {"target": 5}, {"threads": -1}, {"dims": {"n": -1}}, {"dims": [1]}])
def test_compile_with_wrong_types(given: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        api.compile(**{"model": MODEL, "output": tmp_path / "model.so", **given})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
