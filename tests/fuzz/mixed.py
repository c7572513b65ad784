"""A model of what exporters of transformers rarely write: functions, control flow, scatters, attention to a grid."""

from __future__ import annotations

import numpy as np
import onnx

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "pkg" : 1]>
mixed (float[batch, 3, 8, 8] image, int64[batch, seq] ids, float[batch, seq] flags)
  => (float[batch, seq, 16] y, float[batch, 8] pooled, int64[batch, k] best)
{
  grid = Conv <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (image, patch, patch_bias)
  tokens = Reshape(grid, to_tokens)
  turned = Transpose <perm: ints = [0, 2, 1]> (tokens)
  normed = LayerNormalization <axis: int = -1, epsilon: float = 0.00001> (turned, norm_scale, norm_bias)
  words = Gather(table, ids)
  scaled = pkg.Scaled <by: float = 0.25> (words)
  q = pkg.Linear (scaled, w_q, b_q)
  k = pkg.Linear (normed, w_k, b_k)
  v = pkg.Linear (normed, w_v, b_v)
  k_turned = Transpose <perm: ints = [0, 2, 1]> (k)
  logits = MatMul(q, k_turned)
  scale = Constant <value_float: float = 0.25> ()
  scores = Mul(logits, scale)
  weights = Softmax <axis: int = -1> (scores)
  seen = MatMul(weights, v)
  up = pkg.Linear (seen, w_up, b_up)
  active = pkg.Gelu (up)
  down = pkg.Linear (active, w_down, b_down)
  joined = Add(down, words)
%s  depth = Unsqueeze(flags, minus_one)
  y = Mul(chosen, depth)
  parts_a, parts_b = Split <axis: int = 2, num_outputs: int = 2> (chosen)
  swapped = Concat <axis: int = 2> (parts_b, parts_a)
  columns = Gather <axis: int = 2> (swapped, picks)
  sum = ReduceSum <keepdims: int = 0> (columns, one)
  flat = Transpose <perm: ints = [1, 0]> (sum)
  rows = Gather <axis: int = 0> (flat, some)
  written = ScatterND(flat, places, rows)
  back = Transpose <perm: ints = [1, 0]> (written)
  moved = Mul(sum, back)
  pooled = Clip(moved, low, high)
  last = ReduceMax <keepdims: int = 0> (y, two)
  values, best = TopK <axis: int = 1> (last, best_count)
}
<domain: "pkg", opset_import: ["" : 20]>
Scaled <by: float> (x) => (r) { k = Constant <value_float: float = @by> ()  r = Mul(x, k) }
<domain: "pkg", opset_import: ["" : 20]>
Linear (x, w, b) => (r) { h = MatMul(x, w)  r = Add(h, b) }
<domain: "pkg", opset_import: ["" : 20]>
Gelu (x) => (r) {
  root = Constant <value_float: float = 1.41421356> ()
  half = Constant <value_float: float = 0.5> ()
  one = Constant <value_float: float = 1.0> ()
  d = Div(x, root)
  e = Erf(d)
  s = Add(e, one)
  m = Mul(x, s)
  r = Mul(m, half)
}
"""
STRAIGHT = """\
  minus = Neg(joined)
  chosen = Relu(minus)
"""
BRANCHES = """\
  zero = Constant <value_float: float = 0.0> ()
  total = ReduceSum <keepdims: int = 0> (flags)
  positive = Greater(total, zero)
  chosen = If (positive) <
    then_branch = yes () => (float[batch, seq, 16] a) { a = Add(joined, scaled) },
    else_branch = no () => (float[batch, seq, 16] b) { minus = Neg(joined)  b = Relu(minus) }>
"""
FLOATS = {
    "patch": (16, 3, 2, 2), "patch_bias": (16,), "norm_scale": (16,), "norm_bias": (16,), "table": (97, 16),
    "w_q": (16, 16), "w_k": (16, 16), "w_v": (16, 16), "w_up": (16, 32), "w_down": (32, 16),
    "b_q": (16,), "b_k": (16,), "b_v": (16,), "b_up": (32,), "b_down": (16,),
}  # fmt: skip
INTEGERS = {
    "to_tokens": [0, 16, -1], "minus_one": [-1], "one": [1], "two": [2], "best_count": [1],
    "picks": [0, 3, -1, 5, 8, 2, 15, 7], "places": [[1], [-2], [4]],
    "some": [0, -1, 2],
}  # fmt: skip


def model(control_flow: bool = False) -> onnx.ModelProto:
    """The model with weights from a fixed generator."""
    proto = onnx.parser.parse_model(TEXT % (BRANCHES if control_flow else STRAIGHT))
    random = np.random.default_rng(0)
    arrays = {name: (random.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in FLOATS.items()}
    arrays |= {name: np.array(values, np.int64) for name, values in INTEGERS.items()}
    arrays |= {"low": np.float32(-100), "high": np.float32(100)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.checker.check_model(proto, full_check=True)
    return proto
