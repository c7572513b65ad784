"""Every attention of every zoo model is found, of the expected kind, and the canonical model computes what the export
did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest

from xopt.ir.canonical import CanonicalizeReport
from xopt.ir.edit import consumers
from xopt.ir.structure import token_layout, transformer_blocks
from xopt.runtime.reference import ReferenceSession

from .entry import Entry, Expect
from .exporting import Way, exported
from .measuring import canonical, counts, difference, feeds_of, named, onnxruntime_of, sizes
from .ways import ENTRIES, all_ways, default_ways, expected

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
    original = onnxruntime_of(exported(entry, way))
    model, report = canonical(entry, way)
    _check_kind(model, report, expected(entry, way))
    session = ReferenceSession(model, threads=1)
    for batch, seq in sizes(entry, way):
        feeds = feeds_of(entry, model, batch, seq)
        assert difference(session.run(feeds), original(feeds)) < TOLERANCE


def _check_kind(model: ir.Model, report: CanonicalizeReport, expect: Expect) -> None:
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert counts(model) == (expect.count, expect.count if expect.ffns is None else expect.ffns)
    assert len(report.attention) == expect.count
    assert named(model, report) == set(expect.named)
    if not nodes:
        return
    weights = [node for node in model.graph if node.op_type == "Softmax" and consumers(node.outputs[0], "MatMul")]
    assert expect.named or not weights
    if "attention-4d" in expect.named:
        return
    names = ("heads", "causal", "mask", "fused", "scale")
    parts = [_each(getattr(expect, name), expect.count) for name in names]
    for node, *each in zip(nodes, *parts, strict=True):
        _check_node(node, replace(expect, **dict(zip(names, each, strict=True))))
    sites = {block.attention.node: block.attention.causal for block in transformer_blocks(model) if block.attention}
    assert all(sites.get(node, causal) == causal for node, causal in zip(nodes, parts[1]))
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
    written = not node.attributes["is_causal"].as_int() and expect.causal and expect.mask != "none"
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
