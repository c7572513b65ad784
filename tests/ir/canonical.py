"""Helper for the tests of canonical rewrites: small graphs as text, checked against onnxruntime before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from xopt.ir import canonicalize
from xopt.ir.io import to_bytes
from xopt.runtime.reference import ReferenceSession

SIZES = {"B": 2, "S": 3}


def model_of(signature: str, body: str, opset: int = 20) -> ir.Model:
    """A model from ONNX's text format: ``(inputs) => (outputs) <initializers>`` and the nodes."""
    return ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {signature} {{ {body} }}')
    )


def feeds_of(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal float32 inputs, with 2 samples of 3 tokens where dimensions are symbolic."""
    random = np.random.default_rng(seed)
    shapes = {
        value.name: [d if isinstance(d, int) else SIZES[str(d)] for d in value.shape] for value in model.graph.inputs
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def check(model: ir.Model, ops: Mapping[str, int] | None = None) -> ir.Model:
    """Canonicalize ``model`` (twice, which must change nothing more) and compare its outputs with the original's.

    Args:
        model: changed in place.
        ops: number of nodes of each op that must be left, if given.
    """
    feeds = feeds_of(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    want = session.run(None, feeds)
    canonicalize(model)
    once = to_bytes(model)
    canonicalize(model)
    assert to_bytes(model) == once
    if ops is not None:
        assert Counter(node.op_type for node in model.graph) == Counter(ops)
    got = ReferenceSession(model).run(feeds)
    for value, array in zip(got.values(), want):
        np.testing.assert_allclose(value, array, rtol=1e-4, atol=1e-5)
    return model
