"""Whatever is wrong with the input or the machine: one line, the documented status, and no partial output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.acceptance.command import COMMAND, LIMIT, interrupted, xopt
from tests.ir import builders
from tests.report import sample
from xopt.folder import replacing
from xopt.ir.io import save, to_bytes

PRUNE = "prune-heads{score=magnitude,keep=0.5}"
INPUT = "pixel_values"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "vit.onnx"
    save(builders.vit(layers=1), path)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for the output; afterwards there is nothing in it, nor among the temporary files."""
    folder = tmp_path / "place"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    yield folder
    assert sorted(folder.iterdir()) == []
    assert sorted((tmp_path / "temporary").iterdir()) == []


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TMPDIR": str(tmp_path / "temporary")}


def proto() -> onnx.ModelProto:
    return onnx.load_from_string(to_bytes(builders.vit(layers=1)))


def largest(model: onnx.ModelProto) -> onnx.TensorProto:
    return max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))


def truncated(folder: Path) -> None:
    data = proto().SerializeToString()
    (folder / "bad.onnx").write_bytes(data[: len(data) * 2 // 3])


def empty(folder: Path) -> None:
    (folder / "bad.onnx").touch()


def wrong_magic(folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(b"PK\x03\x04" + bytes(500))


def external(folder: Path) -> onnx.ModelProto:
    """A model in ``folder`` whose weights lie in weights.bin."""
    onnx.save_model(
        proto(), folder / "bad.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024
    )
    return onnx.load(folder / "bad.onnx", load_external_data=False)


def missing_data(folder: Path) -> None:
    external(folder)
    (folder / "weights.bin").unlink()


def short_data(folder: Path) -> None:
    external(folder)
    os.truncate(folder / "weights.bin", 100)


def escaping_data(folder: Path) -> None:
    model = external(folder)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../../../../../etc/passwd"
    onnx.save(model, folder / "bad.onnx")


def linked_data(folder: Path) -> None:
    external(folder)
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to("/etc/passwd")


def foreign_op(folder: Path) -> None:
    model = proto()
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.domain, node.op_type = "com.example", "Sparkle"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, folder / "bad.onnx")


def unknown_op(folder: Path) -> None:
    model = proto()
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMull"
    onnx.save(model, folder / "bad.onnx")


def nan_weights(folder: Path) -> None:
    model = proto()
    tensor = largest(model)
    weights = onnx.numpy_helper.to_array(tensor).copy()
    weights.flat[7] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
    onnx.save(model, folder / "bad.onnx")


@pytest.mark.parametrize(
    ("spoil", "code", "clue"),
    [
        (truncated, "E-FORMAT", "truncated"),
        (empty, "E-FORMAT", "no ONNX graph"),
        (wrong_magic, "E-FORMAT", "zip archive"),
        (missing_data, "E-EXTERNAL-DATA", "weights.bin"),
        (short_data, "E-EXTERNAL-DATA", "weights.bin"),
        (escaping_data, "E-EXTERNAL-DATA", "goes through a folder above"),
        (linked_data, "E-EXTERNAL-DATA", "outside"),
        (foreign_op, "E-UNSUPPORTED-OP", "Sparkle is not standard ONNX, node "),
        (unknown_op, "E-UNSUPPORTED-OP", "MatMull"),
        (nan_weights, "E-NAN-WEIGHTS", "tensor"),
    ],
)
def test_a_bad_model(
    spoil: Callable[[Path], None], code: str, clue: str, place: Path, env: dict[str, str], tmp_path: Path
) -> None:
    spoil(tmp_path)
    message = xopt("optimize", tmp_path / "bad.onnx", "-o", place / "out", env=env).refused(code)
    assert clue in message
    assert "bad.onnx" in message
    assert "root:" not in message  # nothing of a file outside of the model's folder


def test_a_model_without_attention(place: Path, env: dict[str, str], tmp_path: Path) -> None:
    """Passes that need attention say so; nothing is left of the passes before them."""
    weights = [onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "mlp.onnx",
    )
    done = xopt("optimize", tmp_path / "mlp.onnx", "--passes", PRUNE, "-o", place / "out", env=env)
    assert "attention" in done.refused("E-NO-ATTENTION")


DATA: dict[str, dict[str, np.ndarray]] = {
    "no samples": {INPUT: np.zeros((0, 3, 16, 16), np.float32)},
    "an empty axis": {INPUT: np.zeros((4, 3, 0, 16), np.float32)},
    "another shape": {INPUT: np.zeros((4, 3, 8, 8), np.float32)},
    "another rank": {INPUT: np.zeros((4, 768), np.float32)},
    "another name": {"pixels": np.zeros((4, 3, 16, 16), np.float32)},
    "text": {INPUT: np.full((4, 3, 16, 16), "a")},
    "complex numbers": {INPUT: np.zeros((4, 3, 16, 16), np.complex64)},
    "NaN": {INPUT: np.full((4, 3, 16, 16), np.nan, np.float32)},
    "labels of another count": {INPUT: np.zeros((4, 3, 16, 16), np.float32), "labels": np.zeros(3, np.int64)},
    "nothing": {},
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case: str, model: Path, place: Path, env: dict[str, str], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **DATA[case])  # type: ignore[arg-type]
    done = xopt("optimize", model, "--data", tmp_path / "data.npz", "-o", place / "out", env=env)
    assert "data.npz" in done.refused("E-DATA")


def test_data_that_is_no_npz(model: Path, place: Path, env: dict[str, str]) -> None:
    assert str(model) in xopt("optimize", model, "--data", model, "-o", place / "out", env=env).refused("E-DATA")


@pytest.mark.parametrize(
    ("arguments", "code", "clue"),
    [
        (["--passes", "prun-heads"], "E-PASS", "did you mean prune-heads"),
        (["--passes", "prune-heads{keap=0.5}"], "E-OPTION", "did you mean keep"),
        (["--passes", "prune-heads{keep=often}"], "E-OPTION", "keep"),
        (["--target", "toaster"], "E-TARGET", "cpu"),
        (["--target", "cpu:z80"], "E-TARGET", "cpu:"),
        (["--verbose"], "E-OPTION", "--verbose"),
    ],
)
def test_a_misspelt_command(
    arguments: list[str], code: str, clue: str, model: Path, place: Path, env: dict[str, str]
) -> None:
    assert clue in xopt("optimize", model, *arguments, "-o", place / "out", env=env).refused(code)


# -- places that cannot be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["/proc/out", "{model}/out", pytest.param("/dev/null/out", marks=pytest.mark.slow)])
def test_an_unwritable_place_is_found_before_any_work(
    output: str, model: Path, place: Path, env: dict[str, str]
) -> None:
    before = model.read_bytes()
    for command in (["optimize", model, "-o", output], ["compile", model, "-o", f"{output}/model.so"]):
        xopt(*(str(word).format(model=model) for word in command), env=env).refused("E-OUTPUT")
    assert model.read_bytes() == before


@pytest.mark.slow
def test_dev_full_is_named(model: Path, place: Path, env: dict[str, str], tmp_path: Path) -> None:
    """Whichever command is to write there, and not blamed on the temporary files."""
    (tmp_path / "report.json").write_text(json.dumps(sample.report()))
    library = tmp_path / "artifact" / "model.so"
    assert xopt("compile", model, "-o", library, env=env).status == 0
    for command in (
        ["optimize", model, "-o", "/dev/full"],
        ["compile", model, "-o", "/dev/full"],
        ["run", library, "-o", "/dev/full"],
        ["report", tmp_path, "-o", "/dev/full"],
    ):
        assert "/dev/full" in xopt(*command, env=env).refused("E-OUTPUT")
    assert "/dev/full" in xopt("tune", model, "--database", "/dev/full", env=env).refused("E-FILE")
    assert Path("/dev/full").is_char_device()


def test_standard_output_on_a_full_disk() -> None:
    for command in (["passes"], ["passes", "--json"], ["targets"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
        assert done.returncode == 2
        assert done.stderr == ("xopt: error[E-OUTPUT]: the disk is full, standard output, send it somewhere else\n")


def test_a_folder_without_permission(model: Path, place: Path, env: dict[str, str], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    xopt("optimize", model, "-o", locked / "out", env=env).refused("E-OUTPUT")


def old_results(folder: Path) -> None:
    """Something that an earlier run has written."""
    with replacing(folder) as fresh:
        (fresh / "report.json").write_text("{}")


def limited(size: int) -> Callable[[], None]:
    """No file may grow beyond ``size`` bytes: writing fails half-way, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [3_000_000, 20_000])
def test_a_disk_that_fills_up_keeps_the_old_results(
    size: int, model: Path, place: Path, env: dict[str, str], tmp_path: Path
) -> None:
    """Finished passes may wait beside them for --resume."""
    old = place / "out"
    old_results(old)
    done = xopt("optimize", model, "--target", "arm", "-o", old, env=env, preexec=limited(size))
    done.refused("E-OUTPUT")
    assert (old / "report.json").read_text() == "{}"
    shutil.rmtree(old)
    shutil.rmtree(place / ".out.xopt-cache", ignore_errors=True)


@pytest.mark.parametrize("full", ["output", pytest.param("temporary", marks=pytest.mark.slow)])
def test_a_full_file_system(full: str, model: Path, place: Path, env: dict[str, str], tmp_path: Path) -> None:
    """A real file system of a quarter of a megabyte, for the output or for temporary files."""
    small = place / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], capture_output=True).returncode:
        small.rmdir()
        pytest.skip("this user may not mount file systems")
    try:
        output = small / "out" if full == "output" else place / "out"
        space = env if full == "output" else {"TMPDIR": str(small)}
        message = xopt("optimize", model, "--target", "arm", "-o", output, env=space).refused("E-OUTPUT")
        cache = output.with_name(".out.xopt-cache")
        assert {path.name for path in small.iterdir()} <= {cache.name}
        shutil.rmtree(cache, ignore_errors=True)
        assert "full" in message or "space" in message.lower()
    finally:
        subprocess.run(["umount", small], check=True)
        small.rmdir()


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["canonicalize", "compile", "measure"])
def test_ctrl_c(stage: str, model: Path, tmp_path: Path) -> None:
    """One line, status 130, the old results untouched; finished passes wait for --resume, as the guide says."""
    old, temporary = tmp_path / "place" / "out", tmp_path / "temporary"
    old_results(old)
    temporary.mkdir()
    done = interrupted(stage, "optimize", model, "--passes", PRUNE, "-o", old, env={"TMPDIR": str(temporary)})
    assert (done.status, done.out) == (130, "")
    assert done.message.startswith("xopt: interrupted")
    assert (old / "report.json").read_text() == "{}"
    assert {path.name for path in old.parent.iterdir()} <= {"out", ".out.xopt-cache"}
    assert list(temporary.iterdir()) == []
