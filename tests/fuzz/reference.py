"""What a model means: onnxruntime on the original file, nothing optimized; and how far rounding may move that.

The tolerance is measured on the model itself. Every float that the model computes is multiplied by 1 + u, with random
u of a few units in the last place, in some runs; what moves the outputs then is rounding, magnified by the model as it
magnifies its own. (Stochastic arithmetic: Parker, Monte Carlo arithmetic, 1997.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

Arrays = dict[str, np.ndarray]
SIZES = (
    {"batch": 2, "seq": 5, "past": 3, "other": 4},
    {"batch": 1, "seq": 1, "past": 1, "other": 1},
    {"batch": 3, "seq": 11, "past": 6, "other": 2},
)
"""Sizes of symbolic axes in each run."""
BASE = 3e-5
"""Difference that is never looked at, as a share of the output's largest element: some hundred roundings of float32."""
ULPS = 8
RUNS = 4
SAFETY = 8.0
"""How far beyond the largest of the noisy runs a difference may be."""
STEP = 0.03
"""Difference that a quantized model may show: a number on the border of two of its steps goes to either."""


SUMS = frozenset(("MatMul", "Gemm", "Conv", "Pow", "ReduceSum", "ReduceMean", "ReduceL2"))
NORMS = frozenset(("LayerNormalization", "RMSNormalization", "LpNormalization"))
LARGE = 1e35


class Refused(Exception):  # noqa: N818
    """onnxruntime does not run the model."""


def session(model: Path | bytes, optimized: bool = False) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options)
    except Exception as error:
        raise Refused(str(error)) from error


def run(opened: Any, feeds: Mapping[str, np.ndarray]) -> Arrays:
    names = [value.name for value in opened.get_outputs()]
    taken = {value.name for value in opened.get_inputs()}
    try:
        results = opened.run(names, {name: array for name, array in feeds.items() if name in taken})
    except Exception as error:
        raise Refused(str(error)) from error
    return {name: np.asarray(result) for name, result in zip(names, results)}


def feeds(model: onnx.ModelProto, variant: int, hostile: bool = False) -> Arrays:
    """Inputs of the declared types: ids of a small vocabulary, masks of zeros and ones, else normal numbers.

    Args:
        hostile: integers from outside the vocabulary too.
    """
    random, sizes = np.random.default_rng(variant), SIZES[variant % len(SIZES)]
    stored = {tensor.name for tensor in model.graph.initializer}
    made = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if value.name in stored:
            continue
        shape = [_size(dim, place, sizes) for place, dim in enumerate(tensor.shape.dim)]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.prod(shape, dtype=float) > 1 << 24:
            raise Refused("inputs are too large to feed")
        if np.issubdtype(dtype, np.integer):
            if "mask" in value.name or value.name == "extra":
                array = (random.random(shape) < 0.7).astype(dtype)
                array[..., :1] = 1
            else:
                array = random.integers(0, 97, shape).astype(dtype)
                if hostile and array.size:
                    wild = np.array([-1, -97, -98, 97, 5000, 1 << 40, -(1 << 40)]).astype(dtype)
                    array.flat[random.integers(array.size)] = random.choice(wild)
        elif dtype == np.bool_:
            array = random.random(shape) < 0.5
        else:
            array = random.standard_normal(shape).astype(dtype)
        made[value.name] = np.asarray(array)
    return made


def _size(dim: Any, place: int, sizes: Mapping[str, int]) -> int:
    if dim.HasField("dim_value"):
        return max(int(dim.dim_value), 0)
    return sizes.get(dim.dim_param, sizes["batch"] if place == 0 else sizes["seq"])


# -- comparing ---------------------------------------------------------------------------------------------------------


def difference(want: Arrays, got: Arrays) -> tuple[float, str]:
    """Largest difference relative to the largest finite number of its output; and what is wrong beside numbers.

    Where NaN is wanted, anything will do: no number is right there (a row of which a mask hides everything).
    """
    if list(want) != list(got):
        return 0.0, f"outputs {list(got)}, not {list(want)}"
    worst = 0.0
    for name, a in want.items():
        b = got[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return 0.0, f"{name!r} is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}"
        if a.dtype.kind not in "fiub":
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        other = ~finite & (x != y) & ~np.isnan(x)
        if other.any():
            place = int(np.flatnonzero(other)[0])
            return 0.0, f"{name!r} has {y.flat[place]:g} where {x.flat[place]:g} is right, in {int(other.sum())} places"
        scale = np.abs(x[np.isfinite(x)]).max(initial=0.0)
        worst = max(worst, float(np.abs(x[finite] - y[finite]).max(initial=0.0) / max(scale, 1e-30)))
    return worst, ""


def tolerance(model: Path, given: Arrays, want: Arrays) -> float | None:
    """How far rounding may move the outputs, as :func:`difference` counts; None when it may do anything.

    That is when noise, or onnxruntime's own optimizations, change what is finite, or a shape; and when a sum comes so
    near to the largest float that the order of its terms decides whether it overflows.
    """
    proto = onnx.load_model(model, load_external_data=True)
    if _overflows(proto, given):
        return None
    worst = 0.0
    variants: list[Any] = [(model, True)]
    variants += [(noisy(proto, seed), False) for seed in range(RUNS)]
    for variant, optimized in variants:
        try:
            moved, wrong = difference(want, run(session(variant, optimized), given))
        except Refused:
            continue
        if wrong:
            return None
        worst = max(worst, moved)
    floor = STEP if any(node.op_type == "QuantizeLinear" for node in proto.graph.node) else BASE
    return max(floor, SAFETY * worst)


def _overflows(model: onnx.ModelProto, given: Arrays) -> bool:
    """Whether a sum inside, or that of the squares in a norm, is larger than ``LARGE``."""
    model = copy.deepcopy(model)
    floats = _floats(model)
    sums = [node.output[0] for node in model.graph.node if node.op_type in SUMS and node.output[0] in floats]
    normed = [node.input[0] for node in model.graph.node if node.op_type in NORMS and node.input[0] in floats]
    shown = list(dict.fromkeys([*sums, *normed]))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in shown)
    try:
        found = run(session(model.SerializeToString()), given) if shown else {}
    except Refused:
        return False
    large = any(bool((np.abs(found[name]) > LARGE).any()) for name in sums)
    return large or any(bool((np.square(found[name], dtype=np.float64).sum(-1) > LARGE).any()) for name in normed)


def noisy(model: onnx.ModelProto, seed: int) -> bytes:
    """The model with every float that it computes off by some units in the last place."""
    model = copy.deepcopy(model)
    floats = _floats(model)
    outputs = {value.name for value in model.graph.output}
    nodes, eps = [], float(ULPS * np.finfo(np.float32).eps)
    for count, node in enumerate(list(model.graph.node)):
        changed = [name for name in node.output if name in floats]
        for place, name in enumerate(node.output):
            if name in changed:
                node.output[place] = f"{name}@exact"
        nodes.append(node)
        for name in changed:
            options = {"low": 1 - eps, "high": 1 + eps, "seed": float(1 + count + 1000 * seed), "dtype": 1}
            noise, exact = f"{name}@noise", f"{name}@exact"
            nodes.append(helper.make_node("RandomUniformLike", [exact], [noise], **options))
            if name in outputs:
                nodes.append(helper.make_node("Identity", [exact], [name]))
            else:
                nodes.append(helper.make_node("Mul", [exact, noise], [name]))
    kept = [copy.deepcopy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model.SerializeToString()


def _floats(model: onnx.ModelProto) -> set[str]:
    """Values of the main graph that are float32; those that subgraphs capture keep their name."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
