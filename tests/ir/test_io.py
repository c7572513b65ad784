"""Files as they come: whole, broken, hostile; and files as we write them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ir.renaming import Renaming
from xopt.errors import InputError
from xopt.ir import canonicalize, export, io, load, native, save
from xopt.runtime.reference import ReferenceSession

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "pkg" : 1]>
small (int64[batch, seq] ids, float[batch, 4] extra) => (float[batch, seq, 4] y, float[batch, 4] z)
<float[300, 4] table, float[4, 4] w, float[4] b, float[4] scale, int64[3] sizes = {0, 0, 4}, float[1] eps = {0.5}>
{
  e = Gather(table, ids)
  n = LayerNormalization <axis: int = -1> (e, scale, b)
  h = MatMul(n, w)
  c = Constant <value: tensor = float[1] {0.25}> ()
  a = pkg.Shift <by: float = 2.0> (h)
  g = Add(a, c)
  q = Reshape(g, sizes)
  y = Gelu(q)
  total = ReduceSum <keepdims: int = 0> (extra)
  zero = Constant <value_float: float = 0.0> ()
  positive = Greater(total, zero)
  z = If (positive) <
    then_branch = yes () => (float[batch, 4] z1) { z1 = Gemm <transB: int = 1> (extra, w, b) },
    else_branch = no () => (float[batch, 4] z2) { z2 = Div(extra, eps) }>
}
<domain: "pkg", opset_import: ["" : 20]>
Shift <by: float> (x) => (r) { k = Constant <value_float: float = @by> ()  r = Add(x, k) }
"""
FEEDS = {"ids": np.array([[1, 2, 3], [4, 5, 6]]), "extra": np.linspace(-1, 2, 8, dtype=np.float32).reshape(2, 4)}


def proto(rows: int = 300) -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT.replace("300", str(rows)))
    random = np.random.default_rng(0)
    for name, shape in {"table": (rows, 4), "w": (4, 4), "b": (4,), "scale": (4,)}.items():
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.onnx"
    file.write_bytes(proto().SerializeToString())
    return file


@pytest.fixture
def external(tmp_path: Path) -> Path:
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save_model(proto(), folder / "small.onnx", save_as_external_data=True, location="small.data", size_threshold=0)
    return folder / "small.onnx"


def outputs(model: ir.Model) -> dict[str, np.ndarray]:
    return ReferenceSession(model).run(FEEDS)


def edited(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load_model(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        canonicalize(load(path))
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    assert caught.value.cure
    return caught.value


# Good files


def test_external_data_is_equal(path: Path, external: Path) -> None:
    a, b = load(path), load(external)
    for name, value in outputs(a).items():
        np.testing.assert_array_equal(value, outputs(b)[name])


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"\1" * 1000)])
def test_a_loaded_model_is_its_own(external: Path, change: Callable[[Path], object]) -> None:
    model = load(external)
    before = outputs(model)
    change(external.parent / "small.data")
    for name, value in outputs(model).items():
        np.testing.assert_array_equal(value, before[name])
    assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


def test_external_constants_of_nodes_are_read_too(external: Path) -> None:
    def constant(model: onnx.ModelProto) -> None:
        table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["table"], value=table))
        model.graph.initializer.remove(table)

    before = outputs(load(external))
    edited(external, constant)
    model = load(external)
    (external.parent / "small.data").write_bytes(b"")
    for name, value in outputs(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_weights_that_memory_does_not_hold(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3))
    refused(external, "E-MEMORY")


def test_canonical_form_means_the_same(path: Path) -> None:
    import onnxruntime

    want = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, FEEDS)
    model = load(path)
    canonicalize(model)
    assert not model.functions
    for value, array in zip(outputs(model).values(), want):
        np.testing.assert_allclose(value, array, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=9, unique=True))
def test_any_names_mean_the_same(tmp_path: Path, names: list[str]) -> None:
    """Of values, nodes, axes, graphs, functions, domains and attributes, in branches and bodies too."""
    taken: dict[str, int] = {}

    def choose(kind: str, name: str) -> str:
        index = taken[kind] = taken.get(kind, -1) + 1
        return f"{names[index % len(names)]}{name if index >= len(names) else ''}"

    called = Renaming(choose)
    plain = ir.from_proto(proto())
    (tmp_path / "renamed.onnx").write_bytes(ir.to_proto(called.model(plain)).SerializeToString())
    model = load(tmp_path / "renamed.onnx")
    canonicalize(model)
    save(model, tmp_path / "saved.onnx")
    given_ = {called("value", name): array for name, array in FEEDS.items()}
    got = ReferenceSession(load(tmp_path / "saved.onnx")).run(given_)
    assert list(got) == [called("value", name) for name in ("y", "z")]
    for one, other in zip(got.values(), outputs(plain).values()):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)  # a few float32 operations in another order


def test_an_axis_without_a_name_has_none(path: Path) -> None:
    def unname(model: onnx.ModelProto) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = ""

    model = load(edited(path, unname))
    assert {dim.value for value in model.graph.inputs for dim in value.shape if isinstance(dim, ir.SymbolicDim)} == {
        None
    }
    canonicalize(model)
    assert outputs(model)["y"].shape == (2, 3, 4)


@pytest.mark.parametrize("what", [b"extra", b"small", b"batch", b"Shift", b"total"])
def test_names_that_are_no_text_are_refused(path: Path, what: bytes) -> None:
    content = path.read_bytes()
    assert what in content
    path.write_bytes(content.replace(what, b"\xff" * len(what)))
    refused(path, "E-FORMAT")


def test_stale_value_info_is_dropped(path: Path) -> None:
    wrong = onnx.helper.make_tensor_value_info("h", onnx.TensorProto.INT8, [9, 9, 9])
    edited(path, lambda model: model.graph.value_info.append(wrong))
    model = load(path)
    canonicalize(model)
    value = next(node.outputs[0] for node in model.graph if node.op_type == "MatMul")
    assert str(value.shape) == "[batch,seq,4]"


def test_round_trip_is_exact_and_deterministic(path: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    save(load(path), first)
    save(load(first), second)
    assert first.read_bytes() == second.read_bytes()
    for name, value in outputs(load(path)).items():
        np.testing.assert_array_equal(value, outputs(load(second))[name])


def test_large_models_get_external_data(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "EMBEDDED_WEIGHTS", 100)
    want = outputs(load(path))
    target = tmp_path / "large.onnx"
    save(load(path), target)
    (data,) = tmp_path.glob("large-*.data")
    assert data.stat().st_size == 4 * 300 * 4
    for name, value in outputs(load(target)).items():
        np.testing.assert_array_equal(value, want[name])
    save(load(target), target)  # over its own data
    for name, value in outputs(load(target)).items():
        np.testing.assert_array_equal(value, want[name])
    assert [file.name for file in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("opset", range(13, 26))
def test_opsets(opset: int, tmp_path: Path) -> None:
    """ReduceSum, Unsqueeze, ReduceMean and Split changed in between."""
    split = "Split" if opset < 18 else "Split <num_outputs: int = 2>"
    mean = (
        "m = ReduceMean <axes: ints = [-1]> (x)"
        if opset < 18
        else "k = Constant <value_ints: ints = [-1]> () m = ReduceMean(x, k)"
    )
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[n, 4] x) => (float[n, 2] y) '
        f"{{ {mean} d = Sub(x, m) s = Softmax <axis: int = 1> (d) y, rest = {split} <axis: int = 1> (s) }}".replace(
            "> <", ", "
        )
    )
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    loaded = load(file)
    canonicalize(loaded)
    assert loaded.opset_imports[""] == max(24, opset)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    d = np.exp(x - x.mean(-1, keepdims=True))
    want = (d / d.sum(-1, keepdims=True))[:, :2]
    np.testing.assert_allclose(ReferenceSession(loaded).run({"x": x})["y"], want, rtol=1e-5)


# Bad files


def test_no_such_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.onnx", "E-FILE")
    refused(tmp_path, "E-FILE")


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\x03\x04zip", b"\x80\x04pickle", b"<html>", b"\x08\x0a", b"GGUF", bytes(range(1, 65))]
)
def test_not_onnx(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    refused(file, "E-FORMAT")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "E-FORMAT")


def test_opset_too_old_or_new(path: Path) -> None:
    for version in (12, 99):
        edited(path, lambda model, v=version: setattr(model.opset_import[0], "version", v))
        refused(path, "E-UNSUPPORTED-OP")


def test_foreign_op(path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[2].domain = "com.microsoft"
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))

    message = str(refused(edited(path, change), "E-UNSUPPORTED-OP"))
    assert "com.microsoft::MatMul" in message
    assert str(path) in message


def test_foreign_op_in_a_function(path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.functions[0].node[-1].domain = "com.microsoft"
        model.functions[0].opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))

    assert "com.microsoft::Add" in str(refused(edited(path, change), "E-UNSUPPORTED-OP"))


def test_unknown_op(path: Path) -> None:
    refused(edited(path, lambda model: setattr(model.graph.node[2], "op_type", "Magic")), "E-UNSUPPORTED-OP")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_must_be_numbers(path: Path, bad: float) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "w")
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[1, 2] = bad
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w"))

    assert "'w'" in str(refused(edited(path, change), "E-NAN-WEIGHTS"))


def test_infinite_masks_are_fine(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) <float[2] m> { y = Add(x, m) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, -np.inf], np.float32), "m"))
    file = tmp_path / "mask.onnx"
    file.write_bytes(model.SerializeToString())
    canonicalize(load(file))


@pytest.mark.parametrize("dims", [[1 << 20, 1 << 20], [1 << 62], [-1, 4], [4, 5], [1 << 31, 1 << 31, 1 << 31]])
def test_declared_size_must_match(path: Path, dims: list[int]) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "w")
        tensor.dims[:] = dims

    refused(edited(path, change), "E-FORMAT")


def test_hostile_sizes_allocate_nothing(tmp_path: Path) -> None:
    """Constants that ask for terabytes, directly and through shape inference."""
    for body in (
        "y = ConstantOfShape(n)",
        "s = ConstantOfShape(n) k = Cast <to: int = 7> (s) y = ConstantOfShape(k)",
        "y = Expand(x, n)",
        "r = Range(zero, many, one) y = Reshape(x, r)",
        "y = Tile(x, n)",
    ):
        text = (
            '<ir_version: 10, opset_import: ["" : 20]> g (float[1] x) => (y) <int64[1] n = {1099511627776}, '
            f"int64 zero = {{0}}, int64 one = {{1}}, int64 many = {{1099511627776}}> {{ {body} }}"
        )
        model = onnx.parser.parse_model(text)
        model.graph.output[0].type.tensor_type.elem_type = 1
        file = tmp_path / "hostile.onnx"
        file.write_bytes(model.SerializeToString())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        survives(file)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


def set_entry(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "w")
        entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, text in entries.items():
            tensor.external_data.add(key=name, value=text)

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../secret.data"),
        ("location", "/etc/passwd"),
        ("location", "link.data"),
        ("location", "inner/../../secret.data"),
        ("location", "missing.data"),
        ("location", ""),
        ("location", "."),
        ("location", "nul\0l"),
        ("location", "x" * 5000),
        ("offset", "-4"),
        ("offset", "100000"),
        ("offset", "one"),
        ("length", "4"),
        ("length", "99999999999999"),
    ],
)
def test_external_data_stays_in_its_folder(external: Path, key: str, value: str) -> None:
    secret = external.parent.parent / "secret.data"
    shutil.copy(external.parent / "small.data", secret)
    (external.parent / "link.data").symlink_to(secret)
    refused(edited(external, set_entry(key, value)), "E-EXTERNAL-DATA")


def test_external_data_missing_or_short(external: Path) -> None:
    data = external.parent / "small.data"
    data.write_bytes(data.read_bytes()[:-1])
    refused(external, "E-EXTERNAL-DATA")
    data.unlink()
    refused(external, "E-EXTERNAL-DATA")


# Writing


def test_unwritable_output(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="E-OUTPUT"):
        save(load(path), tmp_path / "no" / "such" / "folder.onnx")


@pytest.mark.parametrize("limit", [100, 1 << 40], ids=["external", "embedded"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_failing_write_leaves_the_old_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, limit: int
) -> None:
    monkeypatch.setattr(io, "EMBEDDED_WEIGHTS", limit)
    model, before = load(path), path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="E-OUTPUT"):
        save(model, path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx"]


def test_interrupted_write_leaves_the_old_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = load(path), path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx"]


# Mutated files: whatever is in them, the end is success or one clear error

INTEGERS = st.sampled_from([-(1 << 63), -2, -1, 0, 1, 2, 3, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1])
FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def survives(path: Path) -> None:
    problem: InputError | None = None
    try:
        model = load(path)
        canonicalize(model)
        export(model)
    except InputError as error:
        problem = error
    assert problem is None or (problem.cure and "\n" not in str(problem)), problem


@FUZZ
@given(data=st.data())
def test_mutated_bytes(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(proto(rows=7).SerializeToString())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    start, length = data.draw(st.integers(0, len(content) - 1)), data.draw(st.sampled_from([0, 0, 1, 7, 100]))
    del content[start : start + length]
    file = tmp_path / "bytes.onnx"
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content), start]))])
    survives(file)


def messages(message: object) -> list[object]:
    """``message`` and every protobuf message inside it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                found += messages(inner)
    return found


def mutate(message: object, data: st.DataObject) -> None:
    """Change one field of ``message``: another number or name, an element twice or not at all, nothing left."""
    field, value = data.draw(st.sampled_from([(f, v) for f, v in message.ListFields()]))
    action = data.draw(st.sampled_from(["set", "set", "clear", "double", "drop"]))
    name = field.name
    if action == "clear":
        message.ClearField(name)
    elif field.is_repeated:
        index = data.draw(st.integers(0, len(value) - 1))
        if action == "drop":
            del value[index]
        elif field.message_type is not None:
            value.add().CopyFrom(value[index])
        elif action == "double":
            value.append(value[index])
        elif isinstance(value[index], int):
            value[index] = (
                data.draw(INTEGERS) if field.cpp_type != field.CPPTYPE_INT32 else data.draw(st.integers(-9, 99))
            )
        elif isinstance(value[index], str):
            value[index] = data.draw(st.sampled_from(["", "x", "w", "y", "ids"]))
    elif isinstance(value, str):
        setattr(message, name, data.draw(st.sampled_from(["", "x", "w", "Add", "Softmax", "y", "ids", "\0", "pkg"])))
    elif isinstance(value, bytes):
        setattr(message, name, data.draw(st.binary(max_size=64)))
    elif isinstance(value, float):
        setattr(message, name, data.draw(st.floats(width=32)))
    elif isinstance(value, int):
        wide = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
        new = data.draw(INTEGERS if wide else st.integers(0, 30))
        if field.enum_type is None or new in field.enum_type.values_by_number:
            setattr(message, name, new)


@FUZZ
@given(data=st.data())
def test_mutated_messages(tmp_path: Path, data: st.DataObject) -> None:
    model = proto()
    for _ in range(data.draw(st.integers(1, 3))):
        candidates = [m for m in messages(model) if m.ListFields()]
        mutate(data.draw(st.sampled_from(candidates)), data)
    file = tmp_path / "messages.onnx"
    file.write_bytes(model.SerializeToString())
    survives(file)


@FUZZ
@given(
    key=st.sampled_from(["location", "offset", "length", "checksum"]),
    value=st.one_of(
        st.text(max_size=20), INTEGERS.map(str), st.sampled_from(["small.data", "./small.data", "..", "/"])
    ),
)
def test_mutated_external_data(key: str, value: str, external: Path) -> None:
    original = external.read_bytes()
    try:
        survives(edited(external, set_entry(key, value)))
    finally:
        external.write_bytes(original)


@pytest.mark.parametrize(("scales", "zeros", "axis"), [(3, 3, 0), (4, 4, 1), (4, 3, 0), (4, 4, 2)])
def test_scales_that_do_not_fit_the_integers(scales: int, zeros: int, axis: int, tmp_path: Path) -> None:
    tensors = {"w": np.ones((4, 3), np.int8), "s": np.ones(scales, np.float32), "z": np.zeros(zeros, np.int8)}
    node = onnx.helper.make_node("DequantizeLinear", list(tensors), ["m"], axis=axis)
    product = onnx.helper.make_node("MatMul", ["x", "m"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["b", width]) for name, width in (("x", 4), ("y", 3))]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph([node, product], "g", ends[:1], ends[1:], stored)
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "q.onnx")
    with pytest.raises(InputError, match="do not fit"):
        load(tmp_path / "q.onnx")


@pytest.mark.parametrize("claimed", [1, 2, 4, 1 << 40, -1])
def test_a_split_that_claims_other_outputs_than_it_has(path: Path, claimed: int) -> None:
    def split(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 18
        source = model.graph.node[-1].output[0]
        parts = ["part0", "part1", "part2"]
        model.graph.node.append(onnx.helper.make_node("Split", [source], parts, axis=-1, num_outputs=claimed))

    edited(path, split)
    assert "num_outputs" in str(refused(path, "E-FORMAT"))


def test_native_code_that_crashes_ends_a_process_of_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Split with more parts than it claims, ONNX's shape inference reads sizes that are not there."""

    def split(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 18
        source = model.graph.node[-1].output[0]
        model.graph.node.append(
            onnx.helper.make_node("Split", [source], ["part0", "part1", "part2"], axis=-1, num_outputs=2)
        )

    edited(path, split)
    monkeypatch.setattr(io, "check_splits", lambda model: None)
    assert "crashes (SIG" in str(refused(path, "E-FORMAT"))


def test_native_code_that_does_not_end_is_stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SECONDS", 1)
    monkeypatch.setattr(native, "_CHILD", native._CHILD.replace("model =", "while True: pass\nmodel ="))
    assert "more than 1 s" in str(refused(path, "E-FORMAT"))


def hub(folder: Path, external: Path, blobs: str) -> Path:
    """The model and its data as the Hugging Face cache has them: links into ``blobs``, which lies beside it or not."""
    snapshot = folder / "cache/snapshots/0123/onnx"
    for place in (folder / "cache/blobs", folder / "elsewhere", snapshot):
        place.mkdir(parents=True)
    for number, name in enumerate(("small.onnx", "small.data")):
        shutil.copy(external.parent / name, folder / blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(folder / blobs / str(number), snapshot))
    return snapshot / "small.onnx"


def test_links_of_the_hub_cache_are_followed(external: Path, tmp_path: Path) -> None:
    before = outputs(load(external))
    after = outputs(load(hub(tmp_path, external, "cache/blobs")))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_links_out_of_the_hub_cache_are_not(external: Path, tmp_path: Path) -> None:
    refused(hub(tmp_path, external, "elsewhere"), "E-EXTERNAL-DATA")


def test_blobs_that_are_a_link_themselves_are_no_cache(external: Path, tmp_path: Path) -> None:
    file = hub(tmp_path, external, "elsewhere")
    (tmp_path / "cache/blobs").rmdir()
    (tmp_path / "cache/blobs").symlink_to(tmp_path / "elsewhere")
    refused(file, "E-EXTERNAL-DATA")


def test_nodes_out_of_order_are_sorted(path: Path) -> None:
    """Tools append the nodes that they add, also in subgraphs and functions."""
    before = outputs(load(path))

    def reverse(model: onnx.ModelProto) -> None:
        conditional = next(node for node in model.graph.node if node.op_type == "If")
        branches = [attribute.g for attribute in conditional.attribute]
        branches[0].node.append(onnx.helper.make_node("Neg", ["z0"], ["z1"]))
        branches[0].node[0].output[0] = "minus"
        branches[0].node.append(onnx.helper.make_node("Neg", ["minus"], ["z0"]))
        for part in (model.graph, *branches, *model.functions):
            nodes = list(part.node)[::-1]
            del part.node[:]
            part.node.extend(nodes)

    after = outputs(load(edited(path, reverse)))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_circle_is_refused(path: Path) -> None:
    def close(model: onnx.ModelProto) -> None:
        model.graph.node[0].input[1] = model.graph.node[-1].output[0]

    refused(edited(path, close), "E-FORMAT")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (onnx.helper.make_tensor_type_proto(onnx.TensorProto.STRING, [2]), "texts"),
        (onnx.helper.make_tensor_type_proto(onnx.TensorProto.COMPLEX64, [2]), "complex"),
        (onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, [2])), "sequence"),
        (onnx.helper.make_optional_type_proto(onnx.helper.make_tensor_type_proto(1, [2])), "optional"),
        (onnx.helper.make_map_type_proto(7, onnx.helper.make_tensor_type_proto(1, [2])), "map"),
    ],
)
def test_inputs_that_are_no_numbers_are_refused_by_name(path: Path, kind: onnx.TypeProto, word: str) -> None:
    def add(model: onnx.ModelProto) -> None:
        model.graph.input.add(name="odd").type.CopyFrom(kind)

    with pytest.raises(InputError, match=word) as caught:
        load(edited(path, add))
    assert caught.value.code == "E-UNSUPPORTED-OP" and "'odd'" in str(caught.value.where)
