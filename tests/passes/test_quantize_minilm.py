"""Quantizing a real model on real sentences: MiniLM-L6 on STS Benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import xopt.ir
from tests.acceptance import stsb
from tests.passes.quantizing import products, run
from tests.passes.test_prune_minilm import sentences
from xopt.ir.cost import cost
from xopt.runtime.reference import ReferenceSession

DROP = 0.005
"""Spearman on the test split; 0.8203 in float32, 0.8168 in 8 bits when this was written."""


def test_form_and_size(minilm: ir.Model, shared_data: Path, minilm_folder: Path, tmp_path: Path) -> None:
    before, words = cost(minilm), 0
    for name, value in minilm.graph.initializers.items():
        words += value.const_value.nbytes if "embeddings" in name else 0
    report = run(minilm, sentences(shared_data, minilm_folder, 16))
    assert report.rewritten == report.matched == len(products(minilm)) == 37
    # Queries, keys and values share an input: four values a block, and the pooler's.
    assert report.numbers == {"values": 25, "weights": 37}
    after = cost(minilm)
    assert (after.macs, after.parameters) == (before.macs, before.parameters)
    assert after.bytes - words < 0.27 * (before.bytes - words)
    xopt.ir.save(minilm, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 1.02 * after.bytes


@pytest.mark.slow
def test_sts_benchmark(minilm: ir.Model, shared_data: Path, minilm_folder: Path) -> None:
    pairs, scores = stsb.read(shared_data, "test")
    tokenize = stsb.tokenizer(minilm_folder)
    baseline = stsb.spearman(ReferenceSession(minilm).run, tokenize, pairs, scores)
    run(minilm, sentences(shared_data, minilm_folder, 300))
    found = stsb.spearman(ReferenceSession(minilm).run, tokenize, pairs, scores)
    print(f"Spearman {baseline:.4f} in float32, {found:.4f} in 8 bits")
    assert found > baseline - DROP


@pytest.mark.slow
def test_the_most_sensitive_layers_are_worth_leaving(minilm: ir.Model, shared_data: Path, minilm_folder: Path) -> None:
    """With the same share of weights in float, those that were measured keep the outputs closer than the first ones."""
    data = sentences(shared_data, minilm_folder, 32)
    feeds = {name: array[:16] for name, array in data.inputs.items()}
    kept = feeds["attention_mask"].astype(bool)
    wanted = ReferenceSession(minilm).run(feeds)["last_hidden_state"][kept]
    chosen, others = minilm.clone(), minilm.clone()
    left = run(chosen, data, share=0.7).refused
    layers = [node.name for node in others.graph if node.op_type == "MatMul"]
    run(others, data, skip=tuple(str(name) for name in layers[: len(left)]))
    errors = [
        np.linalg.norm(ReferenceSession(model).run(feeds)["last_hidden_state"][kept] - wanted)
        for model in (chosen, others)
    ]
    assert errors[0] < errors[1]
