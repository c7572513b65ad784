"""Models of one operator of ``com.microsoft``, and what onnxruntime makes of them before and after canonicalizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper

from xopt.ir import canonicalize, export, load
from xopt.ir.io import to_bytes

RANDOM = np.random.default_rng(0)
DOMAIN = "com.microsoft"
Array = np.ndarray
Inputs = Sequence[Array | None]


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return (np.abs(normal(*shape)) + 0.1).astype(np.float32)


def below(limit: int, *shape: int, dtype: Any = np.int32) -> Array:
    return RANDOM.integers(0, limit, shape).astype(dtype)


def int32(*numbers: Any) -> Array:
    return np.asarray(numbers, np.int32)


def int64(*numbers: Any) -> Array:
    return np.asarray(numbers, np.int64)


def model_of(
    op: str,
    inputs: Inputs,
    attributes: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    constants: Sequence[int] = (),
    fixed: Sequence[int] = (),
    domain: str = DOMAIN,
    opset: int = 20,
) -> tuple[onnx.ModelProto, dict[str, Array], list[Array]]:
    """A model of one node, its feeds, and its outputs in onnxruntime.

    Args:
        inputs: None for what is absent.
        constants: places of inputs that are initializers.
        fixed: places of inputs whose shapes are written; of others all sizes but the last have a name, of vectors only
            those of int32, which hold a number for each sample.
    """
    names = [f"i{place}" if array is not None else "" for place, array in enumerate(inputs)]
    node = helper.make_node(op, names, list(outputs), name="it", domain=domain, **(attributes or {}))
    given, held, feeds = [], [], {}
    for place, (name, array) in enumerate(zip(names, inputs)):
        if array is None:
            continue
        if place in constants:
            held.append(onnx.numpy_helper.from_array(array, name))
            continue
        feeds[name] = array
        last = array.ndim - (array.ndim > 1 or array.dtype != np.int32)
        sizes = [f"s{d}" if axis < last and place not in fixed else d for axis, d in enumerate(array.shape)]
        given.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), sizes))
    written = [name for name in outputs if name]
    graph = helper.make_graph([node], "one", given, [onnx.ValueInfoProto(name=name) for name in written], held)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    want = session(proto.SerializeToString()).run(None, feeds)
    kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in want]
    del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, kind, [None] * array.ndim)
        for name, kind, array in zip(written, kinds, want)
    )
    return proto, feeds, want


def session(content: bytes) -> onnxruntime.InferenceSession:
    """onnxruntime on a graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def loaded(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    """The model as it comes from a file."""
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return load(path)


def check(
    folder: Path,
    op: str,
    inputs: Inputs,
    attributes: Mapping[str, Any] | None = None,
    *,
    ops: Mapping[str, int] | None = None,
    steps: int = 0,
    tolerance: float = 1e-5,
    shown: Callable[[Array, int], Array] = lambda array, _: array,
    **form: Any,
) -> ir.Model:
    """Canonicalize the operator, and compare what the graph computes with what the operator does.

    Args:
        ops: number of nodes of each op that must be left, if given.
        steps: by how much integers may differ: ties that are rounded the other way.
        shown: what is compared of an output at a place.
    """
    proto, feeds, want = model_of(op, inputs, attributes, **form)
    model = loaded(proto, folder)
    canonicalize(model)
    assert all(node.domain == "" for node in model.graph.all_nodes())
    if ops is not None:
        assert Counter(node.op_type for node in model.graph) == Counter(ops)
    got = session(to_bytes(export(model))).run(None, feeds)
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.dtype.kind == "f":
            np.testing.assert_allclose(shown(one, place), shown(other, place), rtol=tolerance, atol=tolerance)
        else:
            assert np.abs(one.astype(np.int64) - other.astype(np.int64)).max(initial=0) <= steps
    return model


def canonical(
    op: str,
    inputs: Sequence[Array],
    attributes: Mapping[str, Any],
    folder: Path,
    kind: Any = np.float32,
    constants: Sequence[int] = (),
) -> Array:
    """The output of an operator without a kernel for the CPU, by its standard operators.

    Args:
        kind: type of the output.
        constants: places of inputs that are initializers.
    """
    names = [f"i{place}" for place in range(len(inputs))]
    node = helper.make_node(op, names, ["y"], domain=DOMAIN, **attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for place, (name, array) in enumerate(zip(names, inputs))
        if place not in constants
    ]
    held = [onnx.numpy_helper.from_array(inputs[place], names[place]) for place in constants]
    y = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
    graph = helper.make_graph([node], "one", given, [y], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = loaded(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder)
    canonicalize(model)
    result: Array = session(to_bytes(export(model))).run(
        None, {name: array for place, (name, array) in enumerate(zip(names, inputs)) if place not in constants}
    )[0]
    return result
