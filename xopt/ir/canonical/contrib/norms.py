"""Norms with the sums before them: residual streams, and the embeddings of a text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from xopt.ir import edit
from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.products import channels_last, channels_second
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


def _group_norm(site: Site) -> Results:
    x = site.value("X")
    rank, last = site.rank(x), bool(site.attr("channels_last"))
    norm = _grouped(site, channels_second(site, x, rank) if last else x)
    return [channels_last(site, norm, rank) if last else norm]


def _grouped(site: Site, x: ir.Value) -> ir.Value:
    """The norm of groups of channels [N, C, D...], activated."""
    attributes: Attributes = {"num_groups": int(site.attr("groups")), "epsilon": float(site.attr("epsilon"))}
    gamma, beta = (site.cast(site.value(name), site.dtype(x)) for name in ("gamma", "beta"))
    norm = site.op("GroupNormalization", x, gamma, beta, **attributes)
    kind = int(site.attr("activation"))
    if kind not in (0, 1):
        raise site.refused(f"activation is {kind}")
    return site.op("Swish", norm) if kind else norm


def _skip_group_norm(site: Site) -> Results:
    """The norm of a sum, and the sum; what is added may be the same for all places [N, C]."""
    site.only(channels_last=1)
    skip = site.value("skip")
    if site.rank(skip) == 2:
        skip = site.op("Unsqueeze", skip, site.ints(1, 2))
    total = site.plus(site.plus(site.value("X"), site.given("bias")), skip)
    rank = site.rank(total)
    return [channels_last(site, _grouped(site, channels_second(site, total, rank)), rank), total]


def _gated_rms_norm(site: Site) -> Results:
    """The norm of each head, times an activated gate."""
    x, scale, gate = site.value("X"), site.value("scale"), site.value("gate")
    epsilon, kind = float(site.attr("epsilon")), str(site.attr("activation"))
    if kind not in ("silu", "swish", "sigmoid"):
        raise site.refused(f"activation is {kind!r}")
    norm = _rms_by_parts(site, x, scale, site.size(scale, -1), epsilon)
    return [site.op("Mul", norm, site.op("Sigmoid" if kind == "sigmoid" else "Swish", gate))]


def _rms_by_parts(site: Site, x: ir.Value, scale: ir.Value, size: int, epsilon: float) -> ir.Value:
    """The norm of parts of the last axis that are ``size`` long."""
    parts = site.op("Reshape", x, site.ints(*[0] * (site.rank(x) - 1), -1, size))
    norm = site.op("RMSNormalization", parts, scale, axis=-1, epsilon=epsilon)
    return site.op("Reshape", norm, site.op("Shape", x))


def _branchwise_rms_norm(site: Site) -> Results:
    """The norm of each branch; one scale for all, or one each."""
    x, scale, branches = site.value("X"), site.given("scale"), int(site.attr("num_branches"))
    size = site.size(x, -1) // max(branches, 1)
    ones = site.array("ones", np.ones(site.few(size), site.dtype(x).numpy()))
    epsilon = float(site.attr("epsilon"))
    own = scale is not None and (site.rank(scale) > 1 or site.size(scale, 0) != size)
    norm = _rms_by_parts(site, x, ones if scale is None or own else scale, size, epsilon)
    if scale is None or not own:
        return [norm]
    return [site.op("Mul", norm, site.op("Reshape", scale, site.ints(*((-1,) if branches else (-1, size)))))]


RULES = {
    "BranchwiseRMSNorm": _branchwise_rms_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "GatedRMSNorm": _gated_rms_norm,
    "GroupNorm": _group_norm,
    "LayerNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipGroupNorm": _skip_group_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
