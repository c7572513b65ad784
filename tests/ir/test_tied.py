"""Embeddings that are also the last layer's matrix: found by their content, written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.net import Net
from xopt import targets
from xopt.ir import canonicalize, export, load, save
from xopt.ir.tied import tied_tables
from xopt.runtime.manifest import weights_path
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session

VOCABULARY, WIDTH = 5003, 56
TABLE_BYTES = VOCABULARY * WIDTH * 4
IDS = np.array([[0, 1, 5002, 77, 5001]])


def language_model(kind: str = "tied") -> ir.Model:
    """Ids -> rows of a table -> a layer -> logits; the last matrix is the table turned, unless ``kind`` says other."""
    net = Net("language")
    table = net.random.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    turned = table.T.copy()
    turned[-1, -1] += kind == "almost"
    rows = net.op("Gather", net.constant("table", table), net.input("ids", ["batch", "length"], ir.DataType.INT64))
    hidden = net.op("MatMul", rows, net.weight("layer", WIDTH, WIDTH))
    net.output(net.op("MatMul", hidden, net.constant("matrix", turned)), "logits")
    if kind == "read otherwise":
        net.output(net.op("ReduceSum", net.constant("table", table), net.ints(1)), "sums")
    return net.build()


def test_a_table_and_its_matrix_are_found() -> None:
    model = language_model()
    [(table, matrix)] = tied_tables(model.graph).items()
    assert (table.name, matrix.name) == ("table", "matrix")


@pytest.mark.parametrize("kind", ["almost", "read otherwise"])
def test_others_are_not(kind: str) -> None:
    assert not tied_tables(language_model(kind).graph)


@pytest.mark.parametrize("kind", ["tied", "almost"])
@pytest.mark.parametrize("target", ["cpu", "cpu:avx2"])
def test_the_artifact_holds_them_once_and_computes_the_same(kind: str, target: str, tmp_path: Path) -> None:
    model = language_model(kind)
    library = targets.compile(model, target, tmp_path / "model.so")
    once = weights_path(library).stat().st_size < 1.5 * TABLE_BYTES
    assert once == (kind == "tied")
    ours = Session.load(library).run({"ids": IDS})["logits"]
    expected = ReferenceSession(model).run({"ids": IDS})["logits"]
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_at_bfloat16_rows_stay_what_they_are(tmp_path: Path) -> None:
    machine = targets.configured("cpu", False, precision="bf16")
    library = targets.compile(language_model(), machine, tmp_path / "model.so")
    assert weights_path(library).stat().st_size > 1.4 * TABLE_BYTES  # the table, and the matrix at half of its size


def test_the_exported_file_holds_them_once_and_means_the_same(tmp_path: Path) -> None:
    model = language_model()
    save(export(model), tmp_path / "model.onnx")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.5 * TABLE_BYTES
    again = load(tmp_path / "model.onnx")
    canonicalize(again)
    assert len(tied_tables(again.graph)) == 1
    for exported in (model, again):
        logits = ReferenceSession(exported).run({"ids": IDS})["logits"]
        table = model.graph.initializers["table"].const_value.numpy()  # type: ignore[union-attr]
        layer = model.graph.initializers["layer"].const_value.numpy()  # type: ignore[union-attr]
        expected = table[IDS].astype(np.float64) @ layer @ table.T
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
