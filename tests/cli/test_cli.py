"""The command line: JSON contracts, one line for every error, exit status, nothing heavy imported in vain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir import builders
from tests.ir.renaming import Renaming
from xopt import cli, commands
from xopt.data.dataset import Dataset
from xopt.ir import export
from xopt.ir.io import load, save
from xopt.ir.shapes import bind_dims

MODEL_ARRAY = "pixel_values"


class Answer:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def xopt(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["xopt", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        sys.stdout.flush()
        return Answer(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "vit.onnx"
    save(builders.vit(layers=1), path)
    return path


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.so"
    commands.compile_model(model, "cpu", (), path, as_json=False)
    return path


@pytest.fixture
def data(model: Path, tmp_path: Path) -> Path:
    samples = Dataset.random(builders.vit(layers=1), 6, 0)
    np.savez(tmp_path / "data.npz", labels=np.arange(6) % 10, **samples.inputs)  # type: ignore[arg-type]
    return tmp_path / "data.npz"


# -- names -------------------------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;t\x07\r\x9b\u202e"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a terminal's commands in every name, its own and its folder's too."""
    folder = tmp_path_factory.mktemp("hostile") / f"{ESCAPES}folder"
    folder.mkdir()
    path = folder / f"{ESCAPES}vit.onnx"
    save(Renaming(lambda kind, name: f"{name}{ESCAPES}").model(builders.vit(layers=1)), path)
    return path


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["inspect", "{model}"], 0),
        (["inspect", "{model}", "--dim", "batch{escapes}=3"], 0),
        (["inspect", "{model}", "--dim", "b{escapes}=3"], 2),
        (["inspect", "{model}{escapes}"], 2),
        (["diff", "{model}", "{model}"], 0),
        (["optimize", "{model}", "--dry-run"], 0),
        (["optimize", "{model}", "--passes", "nothing{escapes}"], 2),
        (["optimize", "{model}", "--data", "{here}/x.npz", "-o", "o{escapes}"], 2),
        (["bisect", "{model}", "--passes", "deduplicate"], 0),
        (["compile", "{model}", "-o", "m{escapes}.so"], 0),
        (["bench", "{model}", "--peer", "torch", "--rounds", "5"], 0),
        (["run", "m{escapes}.so"], 2),
        (["{escapes}"], 2),
        (["report", "{escapes}"], 2),
    ],
)
def test_names_are_shown_and_not_obeyed(
    xopt: Run, hostile: Path, tmp_path: Path, arguments: list[str], status: int
) -> None:
    np.savez(tmp_path / "x.npz", **{f"y{ESCAPES}": np.ones(3)})  # type: ignore[arg-type]
    filled = [one.format(model=hostile, escapes=ESCAPES, here=tmp_path) for one in arguments]
    answer = xopt(*filled)
    assert answer.status == status, answer.err
    assert not set("\x1b\x07\r\x9b\u202e") & set(answer.out + answer.err)
    assert "E-INTERNAL" not in answer.err
    if status:
        assert r"\x1b]0;t\x07" in answer.err


def test_outputs_are_saved_by_their_names(xopt: Run, hostile: Path, tmp_path: Path) -> None:
    commands.compile_model(hostile, "cpu", (), tmp_path / "model.so", as_json=True)
    answer = xopt("run", tmp_path / "model.so", "-o", tmp_path / "outputs.npz")
    assert answer.status == 0, answer.err
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert outputs[f"logits{ESCAPES}"].shape == (1, 10)


def test_files_may_be_called_anything(xopt: Run, model: Path, tmp_path: Path) -> None:
    """Quotes, an option, a command, a line end, a byte that is no UTF-8: for the linker, the loader and the report."""
    name = "-a b'\"$(touch x);`\n%s{}\udce9"
    folder = tmp_path / name
    folder.mkdir()
    file = folder / f"{name}.onnx"
    file.write_bytes(model.read_bytes())
    answer = xopt("compile", file, "-o", folder / f"{name}.so")
    assert answer.status == 0, answer.err
    answer = xopt("run", folder / f"{name}.so", "--json")
    assert answer.status == 0 and answer.json["outputs"]["logits"]["shape"] == [1, 10]
    answer = xopt("optimize", file, "--no-peers", "--passes", "deduplicate", "-o", folder / name)
    assert answer.status == 0, answer.err
    assert (folder / name / "report.html").is_file()
    assert not (Path.cwd() / "x").exists()


@pytest.mark.slow
def test_an_optimized_model_has_the_names_it_had(xopt: Run, hostile: Path, tmp_path: Path) -> None:
    samples = Dataset.random(builders.vit(layers=1), 6, 0)
    named = {f"{name}{ESCAPES}": array for name, array in samples.inputs.items()}
    data = tmp_path / f"{ESCAPES}.npz"
    np.savez(data, labels=np.arange(6) % 10, **named)  # type: ignore[arg-type]
    passes = "canonicalize,fold-constants,eliminate-dead,deduplicate,fuse-qkv,prune-heads{keep=0.5},quantize"
    out = Path(f"out{ESCAPES}")
    answer = xopt("optimize", hostile, "--passes", passes, "--data", data, "-o", out)
    assert answer.status == 0, answer.err
    shown = xopt("report", out)
    assert shown.status == 0, shown.err
    assert not set("\x1b\x07\r\x9b\u202e") & set(answer.out + answer.err + shown.out + shown.err)
    graph = load(out / "model.onnx").graph
    assert [value.name for value in graph.inputs] == [f"pixel_values{ESCAPES}"]
    assert [value.name for value in graph.outputs] == [f"logits{ESCAPES}"]


@pytest.mark.slow
def test_a_quantized_export_with_few_positions_goes_all_the_way(xopt: Run, tmp_path: Path) -> None:
    """Of onnxruntime's quantizer, which rounds the table of positions too."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([builders.feeds(builders.bert(layers=1, positions=32))] * 2)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    plain, path = tmp_path / "plain.onnx", tmp_path / "q.onnx"
    save(export(builders.bert(layers=1, positions=32)), plain)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(plain, path, Samples(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    assert "DequantizeLinear" in {node.op_type for node in load(path).graph}
    for arguments in (["inspect", path], ["compile", path, "-o", tmp_path / "m.so"]):
        answer = xopt(*arguments)
        assert answer.status == 0, answer.err
    answer = xopt("run", tmp_path / "m.so", "--dim", "seq=32", "--json")
    assert answer.json["outputs"]["embedding"]["shape"] == [1, 32]
    assert "give at most 32" in xopt("run", tmp_path / "m.so", "--dim", "seq=33").err
    answer = xopt("optimize", path, "--no-peers", "-o", tmp_path / "out")
    assert answer.status == 0, answer.err


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_inspect(xopt: Run, model: Path) -> None:
    answer = xopt("inspect", model, "--json").json
    assert answer.keys() >= {"schema", "parameters", "bytes", "macs", "blocks"}
    assert answer["schema"] == 1
    attention = {"heads": 4, "kv_heads": 4, "head_dim": 8, "causal": False}
    assert answer["blocks"] == [{"attention": attention, "ffn": {"width": 128, "gated": False}}]
    assert answer["bytes"] >= 4 * answer["parameters"] > 0


def test_inspect_says_where_the_batch_is_fixed(xopt: Run, model: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    save(bind_dims(load(model), {"batch": 3}), fixed)
    assert [xopt("inspect", path, "--json").json["batch"] for path in (model, fixed)] == [None, 3]
    assert "fixed at 3; --passes free-batch" in xopt("inspect", fixed).out


def test_inspect_counts_at_the_sizes_it_is_given(xopt: Run, model: Path) -> None:
    one, two = (xopt("inspect", model, "--dim", f"batch={size}", "--json").json for size in (1, 2))
    assert two["macs"] == 2 * one["macs"]
    assert two["dims"] == {"batch": 2}


def test_optimize(xopt: Run, model: Path, tmp_path: Path) -> None:
    answer = xopt("optimize", model, "--no-peers", "--json", "-o", tmp_path / "out")
    assert answer.status == 0, answer.err
    assert answer.json["output"] == str(tmp_path / "out")
    for step in answer.json["steps"]:
        assert step.keys() == {"pass", "options", "kept", "reason", "quality", "latency_ms", "macs", "bytes"}
        assert step["latency_ms"].keys() == {"median", "p90"}
    assert answer.json["steps"][0]["pass"] == "canonicalize"
    again = xopt("report", tmp_path / "out", "--json")
    assert again.json["steps"] == answer.json["steps"]
    table = xopt("report", tmp_path / "out")
    assert table.status == 0, table.err
    assert "canonicalize" in table.out and "report.html" in table.out


def test_optimize_dry_run_writes_nothing(xopt: Run, model: Path, tmp_path: Path) -> None:
    passes = "prune-heads{keep=0.5}"
    answer = xopt("optimize", model, "--dry-run", "--json", "--passes", passes, "-o", tmp_path / "out")
    steps = answer.json["plan"]["passes"]
    assert steps[-1]["pass"] == "prune-heads" and steps[-1]["options"]["keep"] == 0.5
    assert list(tmp_path.iterdir()) == []
    assert "prune-heads{keep=0.5}" in xopt("optimize", model, "--dry-run", "--passes", passes).out


def test_bench(xopt: Run, model: Path) -> None:
    answer = xopt("bench", model, "--peer", "onnxruntime", "--batch", 2, "--threads", 2, "--rounds", 5, "--json").json
    assert answer["runtimes"].keys() == {"xopt", "onnxruntime"}
    for times in answer["runtimes"].values():
        assert times.keys() == {"median_ms", "p90_ms", "samples_ms", "waits"}
        assert times["median_ms"] == pytest.approx(np.median(times["samples_ms"]))
        assert len(times["samples_ms"]) >= 5
    assert answer["threads"] == 2 and answer["machine"]["cpu"]
    assert answer["feeds"] == {MODEL_ARRAY: [2, 3, 16, 16]}


def test_bench_of_an_artifact(xopt: Run, artifact: Path) -> None:
    answer = xopt("bench", artifact, "--rounds", 5, "--layers", "--json").json
    assert answer["runtimes"].keys() == {"xopt"}
    kernels = answer["layers"]
    assert any(layer["kernel"].startswith("gemm_") and layer["limit_ms"] > 0 for layer in kernels)
    assert all(layer["ms"] > 0 and layer["calls"] > 0 for layer in kernels)


def test_compile_and_run(xopt: Run, model: Path, artifact: Path, data: Path, tmp_path: Path) -> None:
    answer = xopt("run", artifact, "--data", data, "-o", tmp_path / "outputs.npz", "--json")
    assert answer.json["outputs"] == {"logits": {"dtype": "float32", "shape": [6, 10]}}
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert outputs["logits"].shape == (6, 10)
    random = xopt("run", artifact.parent, "--batch", 3, "--json")
    assert random.json["outputs"]["logits"]["shape"] == [3, 10]


def test_passes(xopt: Run) -> None:
    found = {one["name"]: one for one in xopt("passes", "--json").json["passes"]}
    assert found["canonicalize"]["effect"] == "exact" and found["prune-heads"]["effect"] == "lossy"
    assert found["prune-heads"]["options"]["keep"]["default"] == 0.75
    assert "keep" in xopt("passes", "prune-heads").out


def test_targets(xopt: Run) -> None:
    found = {one["name"]: one for one in xopt("targets", "--json").json["targets"]}
    assert {"cpu", "cpu:avx2", "cpu:avx2-vnni", "cpu:avx512", "arm", "cuda"} <= found.keys()
    assert found["cpu"]["runs_here"] is True and found["arm"]["runs_here"] is False
    assert found["cpu:avx2"]["runs_here"] is True


def test_diff(xopt: Run, model: Path, tmp_path: Path) -> None:
    save(builders.vit(layers=1, hidden=64), tmp_path / "b.onnx")
    answer = xopt("diff", model, tmp_path / "b.onnx", "--json").json
    assert answer["parameters"][1] < answer["parameters"][0]
    assert answer["outputs"]["logits"]["max_abs"] > 0
    same = xopt("diff", model, model, "--json").json
    assert same["outputs"]["logits"] == {**same["outputs"]["logits"], "max_abs": 0.0, "cosine": pytest.approx(1.0)}
    assert "logits" in xopt("diff", model, tmp_path / "b.onnx").out


def test_bisect(xopt: Run, model: Path, tmp_path: Path) -> None:
    assert xopt("bisect", model, "--json").json["culprit"] is None
    check = tmp_path / "check.py"
    check.write_text("def keeps_heads(m): return next((n.name for n in m.graph if n.op_type == 'Split'), None)\n")
    answer = xopt("bisect", model, "--passes", "canonicalize,fuse-qkv", "--check", f"{check}:keeps_heads", "--json")
    assert answer.status == 3
    assert answer.json["culprit"]["pass"] == "fuse-qkv"
    assert answer.json["culprit"]["index"] == 2


def test_doctor(xopt: Run) -> None:
    checks = {check["name"]: check for check in xopt("doctor", "--json").json["checks"]}
    assert checks["tvm"]["ok"] and checks["g++"]["ok"]
    assert {"aarch64-linux-gnu-g++", "qemu-aarch64-static", "cuda"} <= checks.keys()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["optimze"], "E-OPTION"),
        (["optimize"], "E-OPTION"),
        (["optimize", "{model}", "--threads", "0"], "E-OPTION"),
        (["optimize", "{model}", "--frobnicate"], "E-OPTION"),
        (["optimize", "{model}", "--dim", "batch"], "E-OPTION"),
        (["inspect", "{model}", "--dim", "depth=3"], "E-OPTION"),
        (["optimize", "{model}", "--passes", "a", "--recipe", "b"], "E-OPTION"),
        (["optimize", "{model}", "--recipe", "{tmp}/none.yaml"], "E-FILE"),
        (["optimize", "{model}", "--passes", "no-such-pass"], "E-PASS"),
        (["optimize", "{model}", "--passes", "prune-heads{{kep=1}}"], "E-OPTION"),
        (["optimize", "{model}", "--passes", "prune-heads{{keep=9}}"], "E-OPTION"),
        (["optimize", "{model}", "--passes", "prune-heads{{"], "E-PASS"),
        (["optimize", "{model}", "--target", "toaster"], "E-TARGET"),
        (["optimize", "{model}", "--metric", "beauty"], "E-OPTION"),
        (["optimize", "{model}", "--data", "{tmp}/none.npz"], "E-FILE"),
        (["optimize", "{model}", "-o", "{model}"], "E-OUTPUT"),
        (["optimize", "{model}", "-o", "/proc/nowhere/out"], "E-OUTPUT"),
        (["optimize", "{tmp}/none.onnx"], "E-FILE"),
        (["inspect", "{tmp}/garbage.onnx"], "E-FORMAT"),
        (["compile", "{model}", "--target", "toaster"], "E-TARGET"),
        (["run", "{tmp}"], "E-ARTIFACT"),
        (["report", "{tmp}"], "E-FILE"),
        (["report", "{tmp}/garbage.onnx"], "E-FORMAT"),
        (["bench", "{model}", "--peer", "tensorrt"], "E-OPTION"),
        (["passes", "prune"], "E-PASS"),
    ],
)
def test_a_mistake_is_one_line(xopt: Run, model: Path, tmp_path: Path, arguments: list[str], code: str) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\x08\x99garbage")
    before = sorted(tmp_path.rglob("*"))
    answer = xopt(*(argument.format(model=model, tmp=tmp_path) for argument in arguments))
    assert answer.status == 2
    lines = [line for line in answer.err.splitlines() if line.strip()]
    assert len(lines) == 1, answer.err
    assert lines[0].startswith(f"xopt: error[{code}]: ")
    assert answer.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_data_of_the_wrong_shape_is_named(xopt: Run, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pixel_values=np.zeros((4, 1, 8, 8), np.float32))
    answer = xopt("optimize", model, "--data", tmp_path / "d.npz")
    assert answer.status == 2
    assert "'pixel_values': expected [samples, 3, 16, 16], got [4, 1, 8, 8]" in answer.err


def test_our_own_fault_is_status_1_with_a_trace_in_a_file(
    xopt: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*anything: object) -> None:
        raise ZeroDivisionError("in\nthe works")

    monkeypatch.setattr(commands, "inspect", broken)
    answer = xopt("inspect", model)
    assert answer.status == 1
    assert answer.err.count("\n") == 1 and "error[E-INTERNAL]: ZeroDivisionError: in the works" in answer.err
    trace = Path(answer.err.strip().rpartition(" ")[2])
    assert "raise ZeroDivisionError" in trace.read_text()
    trace.unlink()


def test_ctrl_c_is_status_130_and_one_line(
    xopt: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xopt import api

    def interrupted(*anything: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_plan", interrupted)
    answer = xopt("optimize", model, "-o", tmp_path / "out")
    assert answer.status == 130
    assert answer.err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_verification_failure_is_status_3(xopt: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xopt.errors import VerificationError

    def wrong(*anything: object) -> None:
        raise VerificationError("E-VERIFY", "fuse-qkv breaks output 'logits'")

    monkeypatch.setattr(commands, "inspect", wrong)
    assert xopt("inspect", model).status == 3


# -- help and imports --------------------------------------------------------------------------------------------------


def test_every_command_has_examples_that_parse(xopt: Run) -> None:
    for name, command in cli.cli.commands.items():
        answer = xopt(name, "--help")
        assert answer.status == 0
        examples = [line for line in answer.out.splitlines() if line.strip().startswith(f"xopt {name}")]
        assert examples, name
        import shlex

        for example in examples:
            arguments = shlex.split(example)[2:]
            command.make_context(name, arguments, resilient_parsing=False)


HEAVY = {"torch", "tvm", "tvm_ffi", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "numpy", "rich", "plotly", "scipy"}


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import xopt, xopt.cli", HEAVY),
        ("import xopt.passes, xopt.targets, xopt.kernels, xopt.ir, xopt.pipeline", {"torch", "tvm", "onnxruntime"}),
        ("from xopt import commands; commands.inspect({model!r}, (), True)", {"torch", "tvm", "onnxruntime"}),
        ("from xopt import commands; commands.passes(None, True)", {"torch", "tvm", "onnxruntime"}),
    ],
)
def test_nothing_heavy_is_imported_in_vain(code: str, banned: set[str], model: Path) -> None:
    script = code.format(model=str(model)) + "\nimport sys; print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert not loaded & banned


def test_a_model_without_attention_is_optimized_with_exact_passes(xopt: Run, tmp_path: Path) -> None:
    mlp = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 2] x) => (float[batch, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}> { h = MatMul(x, w)  y = Relu(h) }
        """
    )
    save(mlp, tmp_path / "mlp.onnx")
    assert xopt("inspect", tmp_path / "mlp.onnx", "--json").json["blocks"] == []
    assert "no transformer block" in xopt("inspect", tmp_path / "mlp.onnx").out
