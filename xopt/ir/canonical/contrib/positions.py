"""Biases of attention that depend on how far a key is from its query."""

from __future__ import annotations

import math

import onnx_ir as ir

from xopt.ir.canonical.contrib.activations import Results
from xopt.ir.canonical.contrib.heads import apart
from xopt.ir.canonical.contrib.norms import counted
from xopt.ir.canonical.contrib.site import Site


def _relative(site: Site) -> Results:
    """T5's: a number for each head and bucket [N,buckets], near distances one by one, far ones by their logarithm."""
    table = site.value("bias_table")
    both, most = bool(site.attr("is_bidirectional")), int(site.attr("max_distance"))
    buckets = site.size(table, 1) // (2 if both else 1)
    exact = buckets // 2
    if exact < 1 or most <= exact:
        raise site.refused(f"max_distance is {most} with {site.size(table, 1)} buckets")
    rows, columns = (counted(site, _length(site, name)) for name in ("query_length", "key_length"))
    distance = site.op("Sub", columns, site.op("Unsqueeze", rows, site.ints(1)))
    back = site.op("Abs", distance) if both else site.op("Max", site.op("Neg", distance), site.index(0))
    far = site.cast(site.op("Max", back, site.index(exact)), ir.DataType.FLOAT)
    grown = site.op("Log", site.op("Div", far, site.number(exact, far)))
    steps = site.op(
        "Mul", site.op("Div", grown, site.number(math.log(most / exact), far)), site.number(buckets - exact, far)
    )
    later = site.op("Add", site.op("Cast", steps, to=int(ir.DataType.INT64)), site.index(exact))
    bucket = site.op(
        "Where", site.op("Less", back, site.index(exact)), back, site.op("Min", later, site.index(buckets - 1))
    )
    if both:
        ahead = site.op("Cast", site.op("Greater", distance, site.index(0)), to=int(ir.DataType.INT64))
        bucket = site.op("Add", bucket, site.op("Mul", ahead, site.index(buckets)))
    return [site.op("Unsqueeze", site.op("Gather", table, bucket, axis=1), site.ints(0))]


def _length(site: Site, name: str) -> ir.Value:
    """A number as int64 [1]."""
    return site.op("Reshape", site.cast(site.value(name), ir.DataType.INT64), site.ints(1))


def _gated(site: Site) -> Results:
    """WavLM's: a bias that all positions share, times what each query says of it."""
    heads = int(site.attr("num_heads"))
    queries = apart(site, site.plus(site.value("query_layer"), site.value("query_bias")), heads)
    gates = site.plus(site.op("MatMul", queries, site.value("weight")), site.value("bias"))
    halves = site.op("ReduceSum", site.op("Reshape", gates, site.ints(0, 0, 0, 2, -1)), site.ints(-1), keepdims=0)
    first, second = site.several("Split", 2, site.op("Sigmoid", halves), axis=-1, num_outputs=2)
    inner = site.op("Sub", site.op("Mul", second, site.value("eco_a")), site.number(1.0, second))
    factor = site.op("Add", site.op("Mul", first, inner), site.number(2.0, first))
    return [site.op("Mul", factor, site.value("rel_pos"))]


RULES = {"GatedRelativePositionBias": _gated, "RelativePositionBias": _relative}
