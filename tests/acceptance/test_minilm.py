"""MiniLM-L6 through the whole path, on the sentences of STS Benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.acceptance import stsb
from xopt import targets
from xopt.runtime.session import Session


@pytest.fixture(scope="module")
def compiled(_minilm_canonical: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Session:
    path = tmp_path_factory.mktemp("compiled") / "model.so"
    return Session.load(targets.compile(_minilm_canonical, "cpu", path), threads=2)


@pytest.mark.slow
def test_spearman_of_the_compiled_model_equals_onnxruntimes(
    compiled: Session, minilm_file: Path, minilm_folder: Path, shared_data: Path
) -> None:
    pairs, scores = stsb.read(shared_data, "test")
    tokenize = stsb.tokenizer(minilm_folder)
    found = stsb.spearman(compiled.run, tokenize, pairs, scores)
    original = onnxruntime.InferenceSession(minilm_file, providers=["CPUExecutionProvider"])
    names = [output.name for output in original.get_outputs()]
    wanted = stsb.spearman(
        lambda feeds: dict(zip(names, original.run(names, feeds), strict=True)), tokenize, pairs, scores
    )
    assert found == pytest.approx(wanted, abs=1e-4)
    assert found == pytest.approx(0.8203, abs=1e-4)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 16), (2, 128), (8, 33)])
def test_every_shape_equals_onnxruntime(compiled: Session, minilm_file: Path, batch: int, length: int) -> None:
    rng = np.random.default_rng(batch * 1000 + length)
    ids = rng.integers(0, 30522, (batch, length))
    mask = (np.arange(length)[None] < rng.integers(1, length + 1, (batch, 1))).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask}
    original = onnxruntime.InferenceSession(minilm_file, providers=["CPUExecutionProvider"])
    wanted = original.run(["last_hidden_state"], feeds)[0]
    # Six layers of float32 sums in another order: layer norms keep the error at some units in the last place.
    assert np.abs(compiled.run(feeds)["last_hidden_state"] - wanted).max() <= 2e-5 * np.abs(wanted).max()
