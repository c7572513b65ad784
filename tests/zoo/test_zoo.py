"""Every attention of every zoo model is found, of the expected kind, and the canonical model computes what the export
did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from xopt.facts import left_out
from xopt.ir.canonical import CanonicalizeReport, canonicalize
from xopt.ir.edit import consumers
from xopt.ir.structure import token_layout, transformer_blocks
from xopt.runtime.reference import ReferenceSession

from .entry import Entry, Expect
from .exporting import TRACED, Way, exported, load
from .ways import ENTRIES, all_ways, default_ways

SIZES = ((2, 7), (1, 5), (3, 12), (4, 1))
"""(batch, sequence) that dynamic exports are compared at."""
TOLERANCE = 5e-6
"""Of the largest output: two blocks of float32 sums over <= 64 terms, in another order, differ by some 10 ulp
(1.2e-7).
"""


def _cases(ways: Callable[[Entry], Iterator[Way]]) -> list[object]:
    return [pytest.param(entry, way, id=f"{entry.name}-{way}") for entry in ENTRIES for way in ways(entry)]


def _long_run(entry: Entry) -> Iterator[Way]:
    done = set(default_ways(entry))
    return (way for way in all_ways(entry) if way not in done)


@pytest.mark.parametrize(("entry", "way"), _cases(default_ways))
def test_found_and_equal(entry: Entry, way: Way) -> None:
    _check(entry, way)


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "way"), _cases(_long_run))
def test_found_and_equal_in_every_export(entry: Entry, way: Way) -> None:
    _check(entry, way)


def _check(entry: Entry, way: Way) -> None:
    data = exported(entry, way)
    model = load(data)
    report = canonicalize(model)
    _check_kind(model, report, entry.expect)
    original, canonical = _onnxruntime(data), ReferenceSession(model, threads=1)
    for batch, seq in _sizes(entry, way):
        feeds = {name: tensor.numpy() for name, tensor in zip(entry.inputs, entry.feeds(batch, seq))}
        feeds = {name: with_padding(feeds[name]) if "mask" in name else feeds[name] for name in canonical.inputs}
        want, got = original(feeds), canonical.run(feeds)[canonical.outputs[0]]
        assert got.shape == want.shape
        known = ~np.isnan(want)  # what an attention to nothing is, where it is filled with infinities
        np.testing.assert_allclose(
            got[known], want[known], rtol=0, atol=TOLERANCE * max(1.0, np.abs(want[known]).max())
        )


def with_padding(mask: np.ndarray) -> np.ndarray:
    """Padding on the left of the last sample as well: with a causal mask its first queries see no key."""
    mask = mask.copy()
    mask[-1, : mask.shape[1] // 2] = 0
    return mask


def _sizes(entry: Entry, way: Way) -> tuple[tuple[int, int], ...]:
    if not way.dynamic:
        return (TRACED,)
    if (
        entry.name == "llama" and way.opset >= 23
    ):  # its RotaryEmbedding has tables [1, S, d/2]: onnxruntime wants [B, S, d/2]
        return tuple(size for size in SIZES if size[0] == 1)
    return SIZES


def _onnxruntime(data: bytes) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, dict(feeds))[0]


def _check_kind(model: ir.Model, report: CanonicalizeReport, expect: Expect) -> None:
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    blocks = transformer_blocks(model)
    assert len(nodes) == len(report.attention) == expect.count
    assert sum(block.ffn is not None for block in blocks) == (expect.count if expect.ffns is None else expect.ffns)
    assert {place["reason"] for place in left_out(model, report.refused)} == set(expect.named)
    if not nodes:
        return
    weights = [node for node in model.graph if node.op_type == "Softmax" and consumers(node.outputs[0], "MatMul")]
    assert expect.named or not weights
    if "attention-4d" in expect.named:
        return
    parts = (expect.heads, expect.mask, expect.fused, expect.scale)
    for node, *each in zip(nodes, *(_each(part, expect.count) for part in parts), strict=True):
        _check_node(node, replace(expect, **dict(zip(("heads", "mask", "fused", "scale"), each, strict=True))))
    assert all(block.attention.causal == expect.causal for block in blocks if block.attention)
    assert (token_layout(model).padding_mask is not None) == ("padding" in _each(expect.mask, expect.count))
    if expect.rotary:
        assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == 2 * expect.count


def _each(part: Any, count: int) -> tuple[Any, ...]:
    return part if isinstance(part, tuple) else (part,) * count


def _check_node(node: ir.Node, expect: Expect) -> None:
    q = node.inputs[0]
    assert q is not None and q.shape is not None and len(q.shape) == 3
    heads = node.attributes["q_num_heads"].as_int()
    assert heads == expect.heads
    assert node.attributes["kv_num_heads"].as_int() == (expect.kv_heads or heads)
    assert node.attributes["softcap"].as_float() == expect.softcap
    depth = int(q.shape[2]) // heads
    assert node.attributes["scale"].as_float() == pytest.approx(expect.scale or depth**-0.5, rel=1e-6)
    written = not node.attributes["is_causal"].as_int() and expect.causal and expect.mask == "padding"
    assert node.attributes["is_causal"].as_int() == (expect.causal and not written)
    assert _mask_kind(node) == ("bias" if written else expect.mask)
    sources = {value.producer() for value in node.inputs[:3] if value is not None}
    is_split = len(sources) == 1 and all(source is not None and source.op_type == "Split" for source in sources)
    assert is_split == expect.fused


def _mask_kind(node: ir.Node) -> str:
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return "none"
    assert mask.shape is not None and len(mask.shape) == 4
    return "padding" if mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] != 1 else "bias"
