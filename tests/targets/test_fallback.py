"""TVM's converters take no string for one that they know, and no attribute or output that they do not."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xopt import targets
from xopt.errors import InputError
from xopt.ir import infer_shapes
from xopt.targets.lowering import lower
from xopt.targets.ops import KERNELS, OPERATORS, fallback

OFFERED = sorted(
    op for op in fallback._converters() if fallback.supports(op) and not {("", op)} & {*OPERATORS, *KERNELS}
)
STRING = onnx.defs.OpSchema.AttrType.STRING


@functools.cache
def cases() -> dict[str, list[onnx.ModelProto]]:
    """Models of ONNX's own tests of one node, by operator."""
    from onnx.backend.test.loader import load_model_tests

    found: dict[str, list[onnx.ModelProto]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in load_model_tests(kind="node"):
            if case.model is not None and len(case.model.graph.node) == 1:
                found.setdefault(case.model.graph.node[0].op_type, []).append(case.model)
    return found


def offered(op: str) -> list[onnx.ModelProto]:
    return [model for model in cases().get(op, ()) if model.opset_import[0].version >= 13 and _takes(model)]


def _takes(model: onnx.ModelProto) -> bool:
    try:
        _lower(model)
    except InputError:
        return False
    return True


def _lower(proto: onnx.ModelProto) -> None:
    model = ir.from_proto(proto)
    infer_shapes(model)
    lower(model, targets.get("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OFFERED if onnx.defs.has(op)])
def test_strings_and_attributes(op: str) -> None:
    schema = onnx.defs.get_schema(op)
    strings = [name for name, attribute in schema.attributes.items() if attribute.type == STRING]
    for model in offered(op)[:4]:
        for name in (*strings, "temperature"):
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            node = changed.graph.node[0]
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, "no such thing")])
            with pytest.raises(InputError) as caught:
                _lower(changed)
            assert op in str(caught.value), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "op", [op for op in OFFERED if onnx.defs.has(op) and len(onnx.defs.get_schema(op).outputs) > 1]
)
def test_every_optional_output_is_right_or_refused(op: str) -> None:
    from tests.targets.running import built, reference

    for proto in offered(op)[:4]:
        model = ir.from_proto(proto)
        infer_shapes(model)
        given = [np.random.default_rng(0).uniform(0.1, 1, [d or 1 for d in v.shape or ()]) for v in model.graph.inputs]  # type: ignore[misc]
        feeds = {v.name or "": a.astype(v.dtype.numpy()) for v, a in zip(model.graph.inputs, given) if v.dtype}
        for got, want in zip(built(lower(model, targets.get("cpu")))(feeds), reference(model, feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
