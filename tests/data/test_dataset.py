"""Data sets: what is read, what is refused and in which words, and random inputs that a model accepts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xopt.data.dataset import Dataset
from xopt.errors import InputError


def text_model() -> ir.Model:
    """Token ids through a table of 100 rows, types through one of 2, and a mask: [batch, seq] -> [batch, seq, 1]."""
    zeros = ",".join("0" * 100)
    return ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[batch, seq] input_ids, int64[batch, seq] token_type_ids, int64[batch, seq] attention_mask)
          => (float[batch, seq, 1] y)
        <float[100, 1] table = {{{zeros}}}, float[2, 1] types = {{0, 0}}>
        {{
          ids32 = Cast<to=6>(input_ids)
          words = Gather(table, ids32)
          kinds = Gather(types, token_type_ids)
          sum = Add(words, kinds)
          mask = Cast<to=1>(attention_mask)
          axis = Constant<value_ints=[2]>()
          wide = Unsqueeze(mask, axis)
          y = Mul(sum, wide)
        }}
        """
    )


def text_arrays(count: int = 4, length: int = 6) -> dict[str, np.ndarray]:
    ids = np.arange(count * length).reshape(count, length)
    return {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": np.ones_like(ids)}


def refusal(call: object) -> InputError:
    with pytest.raises(InputError) as caught:
        call()  # type: ignore[operator]
    return caught.value


def test_npz_gives_back_arrays_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((3, 2), np.float32), labels=np.arange(3))
    data = Dataset.load(tmp_path / "d.npz")
    assert len(data) == 3
    assert data.inputs.keys() == {"x"}
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2]
    assert data.name == "d.npz" and not data.synthetic


def test_batches_cover_all_samples_in_order() -> None:
    data = Dataset({"x": np.arange(7)[:, None]})
    batches = list(data.batches(3))
    assert [len(b["x"]) for b in batches] == [3, 3, 1]
    assert np.concatenate([b["x"] for b in batches])[:, 0].tolist() == list(range(7))


def test_take_keeps_pairs_together() -> None:
    data = Dataset({"x": np.arange(8)[:, None]}, np.arange(4.0))
    assert data.group == 2
    taken = data.take(5)
    assert len(taken) == 4
    assert taken.labels is not None and taken.labels.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arrays", "labels", "words"),
    [
        ({}, None, "no arrays"),
        ({"x": np.zeros((0, 3))}, None, "'x' has shape [0, 3]"),
        ({"x": np.array([1.0, np.nan])}, None, "'x' has 1 values that are NaN"),
        ({"x": np.array([np.inf])}, None, "NaN or infinite"),
        ({"x": np.array(["a"])}, None, "'x' holds <U1"),
        ({"x": np.zeros(3)}, np.array([1.0, np.nan, 2.0]), "'labels' has 1 values"),
    ],
)
def test_bad_arrays_are_refused_by_name(arrays: dict[str, np.ndarray], labels: np.ndarray | None, words: str) -> None:
    error = refusal(lambda: Dataset(arrays, labels))
    assert error.code == "E-DATA"
    assert words in str(error)


def test_labels_are_as_many_as_samples_or_groups_of_them() -> None:
    assert "'labels' has 3 rows" in str(refusal(lambda: Dataset(text_arrays(), np.zeros(3)).matched(text_model())))
    assert Dataset(text_arrays(), np.zeros(2)).matched(text_model()).group == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"not a zip"])
def test_broken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    assert refusal(lambda: Dataset.load(tmp_path / "d.npz")).code == "E-DATA"


def test_pickled_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    assert refusal(lambda: Dataset.load(tmp_path / "d.npz")).code == "E-DATA"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal(lambda: Dataset.load(tmp_path / "none.npz"))
    assert (error.code, error.where) == ("E-FILE", str(tmp_path / "none.npz"))


def test_a_file_that_unpacks_to_more_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((1000, 1000)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 20})())
    assert "of memory are free" in str(refusal(lambda: Dataset.load(tmp_path / "d.npz")))


def test_matched_converts_widths_and_drops_what_the_model_does_not_read() -> None:
    arrays = {name: array.astype(np.int32) for name, array in text_arrays().items()}
    data = Dataset({**arrays, "extra": np.zeros((4, 1))}).matched(text_model())
    assert data.inputs.keys() == arrays.keys()
    assert all(array.dtype == np.int64 for array in data.inputs.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": None}, "'attention_mask' is missing"),
        ({"input_ids": np.zeros((4, 6), np.float32)}, "'input_ids': expected int64, got float32"),
        ({"input_ids": np.zeros((4, 6, 1), np.int64)}, "'input_ids': expected [samples, seq], got [4, 6, 1]"),
        ({"input_ids": np.zeros((3, 6), np.int64)}, "input_ids 3, token_type_ids 4"),
        (
            {"attention_mask": np.ones((4, 5), np.int64)},
            "'attention_mask': expected [samples, seq], seq = 6, got [4, 5]",
        ),
        ({"input_ids": np.full((4, 6), 100)}, "'input_ids' indexes a table of 100 rows, got 100 to 100"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(change: dict[str, np.ndarray | None], words: str) -> None:
    arrays = {name: array for name, array in {**text_arrays(), **change}.items() if array is not None}
    error = refusal(lambda: Dataset(arrays).matched(text_model()))
    assert error.code == "E-DATA"
    assert words in str(error)


@given(count=st.integers(1, 9), length=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_random_inputs_fit_the_model(count: int, length: int, seed: int) -> None:
    model = text_model()
    data = Dataset.random(model, count, seed, {"seq": length})
    assert data.synthetic
    assert {name: array.shape for name, array in data.inputs.items()} == dict.fromkeys(text_arrays(), (count, length))
    assert (data.inputs["attention_mask"] == 1).all()
    assert data.inputs["input_ids"].max() < 100
    assert data.inputs["token_type_ids"].max() < 2
    assert data.matched(model).digest == data.digest
    assert Dataset.random(model, count, seed, {"seq": length}).digest == data.digest


def test_a_model_without_inputs_has_no_data() -> None:
    head = '<ir_version: 10, opset_import: ["" : 20]> g () => (float[1] y) <float[1] a = {1}>'
    model = ir.from_onnx_text(f"{head} {{ y = Add(a, a) }}")
    with pytest.raises(InputError, match="the model has no inputs"):
        Dataset.random(model, 1, 0)


def test_random_ids_use_the_whole_table() -> None:
    ids = Dataset.random(text_model(), 64, 0, {"seq": 64}).inputs["input_ids"]
    assert ids.min() == 0 and ids.max() == 99


def test_another_seed_gives_other_numbers() -> None:
    digests = {Dataset.random(text_model(), 8, seed).digest for seed in range(4)}
    assert len(digests) == 4


def test_data_from_a_callable(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "import numpy as np\n"
        "@dataclasses.dataclass\n"
        "class Sample: label: int = 0\n"
        "def pair(): return {'x': np.ones((2, 1))}, np.arange(2)\n"
        "def plain(): return {'x': np.ones((2, 1)), 'labels': np.arange(2)}\n"
        "def wrong(): return 3\n"
        "def fails(): raise RuntimeError('no disk')\n"
    )
    for name in ("pair", "plain"):
        data = Dataset.of(f"{source}:{name}")
        assert data.labels is not None and len(data) == 2
    assert refusal(lambda: Dataset.of(f"{source}:wrong")).code == "E-DATA"
    assert "no disk" in str(refusal(lambda: Dataset.of(f"{source}:fails")))
    assert refusal(lambda: Dataset.of(f"{source}:none")).code == "E-OPTION"
    assert refusal(lambda: Dataset.of("no_such_module:f")).code == "E-OPTION"


@pytest.mark.parametrize(
    "source", [None, 3, [1, 2], {"x": [[1], [1, 2]]}, {"x": [object()]}, {"x": None}, {1: "text"}, "/dev/zero", b"\xff"]
)
def test_what_is_no_data(source: object) -> None:
    assert refusal(lambda: Dataset.of(source)).code in ("E-DATA", "E-FILE")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "body", ["raise ValueError('x')", "import sys; sys.exit(0)", "return 3", "return {'x': [[1], [1, 2]]}", "return {}"]
)
def test_a_function_that_does_not_give_data(body: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def data():\n    {body}\n")
    assert refusal(lambda: Dataset.of(f"{tmp_path}/mine.py:data")).code == "E-DATA"
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    assert refusal(lambda: Dataset.of(f"{tmp_path}/leaves.py:data")).code == "E-OPTION"


def test_numbers_beyond_the_model_s_type() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
    )
    error = refusal(lambda: Dataset({"x": np.array([1e300])}).matched(model))
    assert "float32 does not" in str(error)


def diffusion_model(t: str, batch: str = "batch") -> ir.Model:
    """x [batch, 4] times t of another shape."""
    return ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[{batch}, 4] x, float{t} t) => (float[{batch}, 4] y) {{ y = Mul(x, t) }}
        """
    )


X = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.mark.parametrize(
    ("t", "given", "runs", "fed"),
    [
        ("[1]", np.ones(1), [4, 2], (1,)),
        ("[1]", np.array([1.0, 1, 1, 2, 2, 3]), [3, 2, 1], (1,)),
        ("[1]", np.array([[1.0], [1], [1], [2], [2], [2]]), [3, 3], (1,)),
        ("", np.array(2.0), [4, 2], ()),
        ("", np.array([2.0, 2, 2, 2, 2, 3]), [4, 1, 1], ()),
        ("[batch, 1]", np.arange(6.0)[:, None], [4, 2], (4, 1)),
        ("[batch, 1]", np.array([[3.0]]), [4, 2], (4, 1)),
    ],
)
def test_what_a_run_takes_once_is_shared_or_given_for_each_sample(
    t: str, given: np.ndarray, runs: list[int], fed: tuple[int, ...]
) -> None:
    model = diffusion_model(t)
    data = Dataset({"x": X, "t": given.astype(np.float32)}).matched(model)
    assert len(data) == 6
    found = list(data.runs(np.arange(6), 4))
    assert [len(index) for index, _ in found] == runs
    assert found[0][1]["t"].shape in (fed, (runs[0], *fed[1:]))
    values = np.broadcast_to(given.reshape(-1) if given.size > 1 else given.reshape(()), 6)
    for index, feeds in found:
        np.testing.assert_array_equal(feeds["x"], X[index])
        assert (np.ravel(feeds["t"]) == values[index][: feeds["t"].size]).all()
    assert [len(data.take(2)), len(data.part(2, 5))] == [2, 3]


def test_a_fixed_batch_is_filled_up_with_samples_that_it_has() -> None:
    data = Dataset({"x": X[:5], "t": np.ones(1, np.float32)}).matched(diffusion_model("[1]", "3"))
    (first, _), (last, feeds) = data.runs(np.arange(5), 32)
    assert (len(first), last.tolist()) == (3, [3, 4])
    np.testing.assert_array_equal(feeds["x"], X[[3, 4, 3]])


def test_minus_infinity_is_a_number_in_a_mask() -> None:
    mask = np.array([[0.0, -np.inf, 0, 0]] * 2, np.float32)
    data = Dataset({"x": X[:2], "t": mask}).matched(diffusion_model("[batch, 4]"))
    assert np.isneginf(data.inputs["t"]).any()


@pytest.mark.parametrize("t", ["[1]", "", "[batch, 1]"])
def test_random_samples_of_what_is_shared_are_one(t: str) -> None:
    data = Dataset.random(diffusion_model(t), 6, 0)
    assert len(data) == 6
    assert data.inputs["t"].shape == {"[1]": (1,), "": (), "[batch, 1]": (6, 1)}[t]


def test_random_lengths_are_no_longer_than_the_sequence() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 9, 4] x, int32[batch] lengths) => (float[batch, 9, 4] y, int32[batch] z)
        { y = Relu(x) z = Identity(lengths) }
        """
    )
    assert (Dataset.random(model, 3, 0).inputs["lengths"] == 9).all()
