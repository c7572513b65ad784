"""Attention as it is written by hand, in each part's ways and in mixtures of them, is found and computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.ir import spellings
from tests.ir.spellings import HEADS, MASKS, PRODUCTS, PROJECTIONS, SCORES, SOFTMAXES, WHOLE, Block, Spelling, spelled
from xopt.facts import left_out
from xopt.ir.canonical import canonicalize
from xopt.ir.structure import transformer_blocks
from xopt.runtime.reference import ReferenceSession

PARTS = {"projection": PROJECTIONS, "scores": SCORES, "mask": MASKS, "softmax": SOFTMAXES, "y": PRODUCTS}
ALONE = {f"{part}-{way}": spelled(**{part: way}) for part, ways in PARTS.items() for way in list(ways)[1:]} | WHOLE
SIZES = ((2, 7), (1, 5), (3, 12), (2, 1))
TOLERANCE = 5e-6
"""Of outputs near 1: sums of 16 numbers, and two matrices and a softmax between, in another order."""


def mixtures(count: int, seed: int) -> list[dict[str, str]]:
    """Random choices of a way of each part."""
    draw = random.Random(seed)
    return [{part: draw.choice(list(ways)) for part, ways in PARTS.items()} for _ in range(count)]


def exported(spelling: Spelling, by: str, folder: Path) -> bytes:
    """The block as an ONNX file with dynamic axes."""
    path, given = folder / "model.onnx", (torch.randn(2, 7, spellings.WIDTH), torch.ones(2, 7, dtype=torch.int64))
    names = {"input_names": ["x", "mask"]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if by == "torchscript":
                axes = {name: {0: "batch", 1: "seq"} for name in names["input_names"]}
                torch.onnx.export(
                    Block(spelling).eval(), given, path, dynamo=False, opset_version=17, dynamic_axes=axes, **names
                )
            else:
                dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq", max=spellings.LONGEST)}
                program = torch.onnx.export(
                    Block(spelling).eval(), given, dynamo=True, dynamic_shapes=(dims, dims), verbose=False, **names
                )
                program.save(path, external_data=False)
        finally:
            logging.disable(logging.NOTSET)
    return path.read_bytes()


def check(spelling: Spelling, by: str, folder: Path) -> None:
    data = exported(spelling, by, folder)
    model = ir.from_proto(onnx.load_from_string(data))
    report = canonicalize(model)
    assert {place["reason"] for place in left_out(model, report.refused)} == set(spelling.named)
    sites = [block.attention for block in transformer_blocks(model) if block.attention is not None]
    assert len(sites) == spelling.count
    assert all((site.heads, site.kv_heads) == (HEADS, spelling.kv_heads) for site in sites)
    original = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names, session, draw = [v.name for v in original.get_outputs()], ReferenceSession(model), np.random.default_rng(1)
    for batch, length in SIZES:
        mask = np.ones((batch, length), np.int64)
        mask[-1, length // 2 + 1 :] = 0
        feeds = {"x": draw.standard_normal((batch, length, spellings.WIDTH)).astype(np.float32), "mask": mask}
        for name, want in zip(names, original.run(None, feeds), strict=True):
            np.testing.assert_allclose(session.run(feeds)[name], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ALONE)
def test_each_way(name: str, tmp_path: Path) -> None:
    check(ALONE[name], "torchscript", tmp_path)


@pytest.mark.parametrize("parts", mixtures(12, seed=1), ids=lambda parts: "-".join(parts.values()))
def test_mixtures(parts: dict[str, str], tmp_path: Path) -> None:
    check(spelled(**parts), "torchscript", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parts", mixtures(100, seed=2), ids=lambda parts: "-".join(parts.values()))
def test_more_mixtures(parts: dict[str, str], tmp_path: Path) -> None:
    check(spelled(**parts), "torchscript", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_each_way_by_dynamo(name: str, tmp_path: Path) -> None:
    check(ALONE[name], "dynamo", tmp_path)
