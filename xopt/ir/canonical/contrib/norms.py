"""Norms with the sums before them: residual streams, and the embeddings of a text."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from xopt.ir import edit
from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.site import Attributes, Site


def _layer_norm(site: Site) -> Results:
    x, scale, bias = site.value("X"), site.value("Scale"), site.given("B")
    site.only(stash_type=1)
    attributes: Attributes = {"axis": int(site.attr("axis")), "epsilon": float(site.attr("epsilon"))}
    inputs = [site.cast(x, site.dtype(scale)), scale, bias]
    return site.several("LayerNormalization", 3, *inputs, **attributes)


def _rms_norm(site: Site) -> Results:
    x, scale = site.value("X"), site.value("scale")
    site.only(stash_type=1)
    attributes: Attributes = {"axis": int(site.attr("axis")), "epsilon": float(site.attr("epsilon"))}
    return [site.op("RMSNormalization", site.cast(x, site.dtype(scale)), scale, **attributes)]


def _skip_layer_norm(site: Site) -> Results:
    """The norm of a sum, and the sum."""
    total = _residual(site)
    attributes: Attributes = {"axis": -1, "epsilon": float(site.attr("epsilon"))}
    norm = site.op("LayerNormalization", total, site.value("gamma"), site.given("beta"), **attributes)
    return [norm, None, None, total]


def _skip_rms_norm(site: Site) -> Results:
    total = _residual(site)
    epsilon = float(site.attr("epsilon"))
    return [site.op("RMSNormalization", total, site.value("gamma"), axis=-1, epsilon=epsilon), None, None, total]


def _residual(site: Site) -> ir.Value:
    """The sum of both operands; the bias is that of the linear layer whose product one of them is."""
    first, second = site.value("input"), site.value("skip")
    if edit.producer(second, "MatMul") is not None:
        first, second = second, first
    return site.plus(site.plus(first, site.given("bias")), second)


def _embed_layer_norm(site: Site) -> Results:
    site.pass_over("mask_index_type")
    names = ("word_embedding", "position_embedding", "segment_embedding", "gamma", "beta")
    return embedded(site, {name: site.given(name) for name in names})


def embedded(site: Site, tables: Mapping[str, ir.Value | None]) -> Results:
    """The norm of embeddings of words, positions and segments; how many words the mask shows; the sum."""
    site.pass_over("mask")
    ids, segments = site.value("input_ids"), site.given("segment_ids")
    if (segments is None) != (tables["segment_embedding"] is None):
        raise site.refused("segment_ids and segment_embedding do not go together")
    total = site.op("Gather", tables["word_embedding"], ids)
    total = site.plus(total, site.op("Gather", tables["position_embedding"], _positions(site, ids)))
    if segments is not None:
        total = site.plus(total, site.op("Gather", tables["segment_embedding"], segments))
    attributes: Attributes = {"axis": -1, "epsilon": float(site.attr("epsilon"))}
    norm = site.op("LayerNormalization", total, tables["gamma"], tables["beta"], **attributes)
    counts = len(site.node.outputs) > 1 and site.wants(site.form.outputs[1])
    return [norm, _shown(site, ids) if counts else None, total]


def _positions(site: Site, ids: ir.Value) -> ir.Value:
    """Positions as they are given, or one after the other."""
    if "position_ids" in site.form.inputs and (given := site.given("position_ids")) is not None:
        return given
    return counted(site, site.length(ids, 1))


def counted(site: Site, length: ir.Value) -> ir.Value:
    """int64 [length]: 0, 1, 2 ..., of a length int64 [1]."""
    return site.op("Range", site.index(0), site.op("Squeeze", length, site.ints(0)), site.index(1))


def _shown(site: Site, ids: ir.Value) -> ir.Value:
    """int32 [B]: how many places of each row the mask has; none where there is no mask."""
    mask = site.given("mask")
    ones = site.op("Equal", ids if mask is None else mask, site.number(1, ids))
    count = site.op("ReduceSum", site.cast(ones, ir.DataType.INT32), site.ints(1), keepdims=0)
    return count if mask is not None else site.op("Mul", count, site.number(0, count))


RULES = {
    "EmbedLayerNormalization": _embed_layer_norm,
    "LayerNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
