"""Fuse QKV: one matrix product where an attention makes its queries, keys and values from one input.

    before   x ─▶ MatMul ─▶ Add ─▶ Q          after   x ─▶ MatMul ─▶ Add ─▶ Split ─▶ Q
             x ─▶ MatMul ─▶ Add ─▶ K                                            ├──▶ K
             x ─▶ MatMul ─▶ Add ─▶ V                                            └──▶ V

Projections are grouped by the value that they read: in cross attention, keys and values of the memory are fused.
Quantized weights are fused as integers, with their scales.

Refuses  "already-fused": the projections are parts of one product.
         "nothing-to-fuse": no two of the projections read the same value.
         "shared-weight": a weight is used elsewhere too; fusing would store it twice.
         "read-before-bias": something reads a product before its bias is added.
         "quantized-differently": integers of several types, some weights floating, or scales that are not by column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xopt.ir import edit, quantized
from xopt.ir.structure import AttentionSite, Projection, transformer_blocks
from xopt.pipeline.base import Effect, Pass, PassReport
from xopt.pipeline.context import PassContext


@dataclass(frozen=True)
class FuseQKV(Pass):
    """Compute Q, K and V of each attention with one MatMul."""

    name: ClassVar[str] = "fuse-qkv"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, context: PassContext) -> PassReport:
        report = PassReport(self)
        for block in transformer_blocks(model):
            if block.attention is None:
                continue
            group = _same_input(block.attention)
            if report.accepts(block, _problem(block.attention, group)):
                _fuse(model.graph, group)
                report.rewrote(block)
        edit.remove_dead(model)
        return report


def _same_input(site: AttentionSite) -> list[Projection]:
    """The projections that read what K's reads, in the order Q, K, V; [] without one for K."""
    found = [projection for projection in (site.q, site.k, site.v) if projection is not None]
    return [one for one in found if site.k is not None and one.matmul.inputs[0] is site.k.matmul.inputs[0]]


def _problem(site: AttentionSite, group: list[Projection]) -> str | None:
    if any(one.part is not None for one in (site.q, site.k, site.v) if one is not None):
        return "already-fused"
    if len({one.matmul for one in group}) < max(len(group), 2):
        return "nothing-to-fuse"
    for one in group:
        if len(one.weight.uses()) > 1:
            return "shared-weight"
        if one.bias is not None and len(one.matmul.outputs[0].uses()) > 1:
            return "read-before-bias"
    return None if quantized.joinable(_weights(group)) else "quantized-differently"


def _weights(group: list[Projection]) -> list[ir.Value]:
    """What the products multiply by: initializers, or what is dequantized from some."""
    return [edit.operand(one.matmul, 1) for one in group]


def _fuse(graph: ir.Graph, group: list[Projection]) -> None:
    widths = [_array(one.weight).shape[1] for one in group]
    site = min((one.matmul for one in group), key=list(graph).index)
    source, stem = edit.operand(site, 0), f"{group[0].matmul.name}/qkv"
    rows = list(source.shape)[:-1] if source.shape is not None else None
    shape = [*rows, sum(widths)] if rows is not None else None
    dtype = source.dtype

    weight = quantized.joined(site, _weights(group), f"{stem}.weight")
    fused = edit.insert(site, "MatMul", [source, weight], name=f"{stem}/MatMul", shape=shape)
    if any(one.bias_value is not None for one in group):
        floats = dtype.numpy() if dtype is not None else np.float32
        bias = [
            _array(one.bias_value) if one.bias_value is not None else np.zeros(width, floats)
            for one, width in zip(group, widths)
        ]
        vector = edit.initializer(graph, f"{stem}.bias", np.concatenate(bias))
        fused = edit.insert(site, "Add", [fused, vector], name=f"{stem}/Add", shape=shape)
    sizes = edit.initializer(graph, f"{stem}.sizes", np.array(widths, np.int64))
    parts = edit.insert_many(site, "Split", [fused, sizes], {"axis": -1}, len(group), name=f"{stem}/Split", dtype=dtype)
    for one, part, width in zip(group, parts, widths, strict=True):
        part.shape = ir.Shape([*rows, width]) if rows is not None else None
        edit.replace_uses(one.output, part)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None  # a projection's weight and bias are initializers
    return value.const_value.numpy()
