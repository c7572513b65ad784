"""Whole models after onnxruntime's tools: every block is found as before, and the outputs are those of the original."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.ir import builders
from tests.ir.contrib import DOMAIN, session
from xopt.ir import canonicalize, export, load
from xopt.ir.dependency import uncuttable
from xopt.ir.io import to_bytes
from xopt.ir.structure import AttentionSite, transformer_blocks
from xopt.runtime.reference import ReferenceSession

MODELS: dict[str, Callable[[], ir.Model]] = {
    "bert": lambda: builders.bert(mask="float"),
    "gpt2": builders.gpt,
    "vit": builders.vit,
}


def by_session(source: Path, target: Path, kind: str) -> None:
    """What a session saves of its graph, with all fusions that do not depend on the machine."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(target), 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def by_tool(source: Path, target: Path, kind: str) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    model = optimize_model(str(source), model_type=kind, num_heads=4, hidden_size=32, opt_level=0)
    model.save_model_to_file(str(target))


def in_halves(source: Path, target: Path, kind: str) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    model = optimize_model(str(source), model_type=kind, num_heads=4, hidden_size=32, opt_level=0)
    model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(target))


def in_four_bits(source: Path, target: Path, kind: str) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=16)
    tool.process()
    tool.model.save_model_to_file(str(target))


CASES = [
    ("bert", by_session), ("gpt2", by_session), ("vit", by_session),
    ("bert", by_tool), ("gpt2", by_tool), ("vit", by_tool), ("bert", in_halves), ("bert", in_four_bits),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tool"), CASES, ids=lambda given: getattr(given, "__name__", given))
def test_a_model_that_a_tool_has_optimized(kind: str, tool: Callable[..., None], tmp_path: Path) -> None:
    logging.disable(logging.ERROR)
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    original = MODELS[kind]()
    source.write_bytes(to_bytes(export(original)))
    try:
        tool(source, target, kind)
    finally:
        logging.disable(logging.NOTSET)
    domains = {node.domain for node in onnx.load(target).graph.node}
    assert DOMAIN in domains
    canonicalize(original)
    model = load(target)
    canonicalize(model)
    assert all(node.domain == "" for node in model.graph.all_nodes())
    assert len(attentions(model)) == len(attentions(original)) > 0
    assert all(part is not None for site in attentions(model) for part in (site.q, site.k, site.v, site.out))
    assert sum(block.ffn is not None for block in transformer_blocks(model)) == len(transformer_blocks(original))
    if tool is in_four_bits:
        assert {item.reason for item in uncuttable(model)} >= {"quantized"}
    feeds = builders.feeds(original)
    changed = tool is in_four_bits or kind == "gpt2"  # whose Gelu becomes its approximation
    want = session((target if changed else source).read_bytes()).run(None, feeds)
    got = ReferenceSession(model).run(feeds)
    tolerance = 5e-3 if tool is in_halves else 1e-5
    for one, other in zip(got.values(), want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(np.abs(other).max())))


def attentions(model: ir.Model) -> list[AttentionSite]:
    return [block.attention for block in transformer_blocks(model) if block.attention is not None]
