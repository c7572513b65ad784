from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import xopt.ir
from tests.ir import builders
from tests.passes.exact import check_laws, ops
from xopt.passes import FoldConstants


@pytest.mark.parametrize("kind", builders.ZOO)
def test_laws_on_each_kind_of_model(kind: str) -> None:
    check_laws(FoldConstants(), builders.ZOO[kind]())


def test_shape_arithmetic_folds_once_dimensions_are_fixed() -> None:
    model = xopt.ir.bind_dims(builders.vit(), {"batch": 2})
    assert ops(model)["Shape"] == 1
    report = check_laws(FoldConstants(), model)
    assert report.rewritten >= 2
    assert "Shape" not in ops(model)


def test_a_constant_expression_becomes_an_initializer() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 24]>
        g (float[batch, 4] x) => (float[batch, 4] y) <float[4] a = {1, 2, 3, 4}, float[4] b = {1, 1, 1, 1}> {
            c = Mul(a, b)
            d = Sub(c, b)
            y = Add(x, d)
        }"""
    )
    report = check_laws(FoldConstants(), model)
    assert (report.rewritten, ops(model)) == (2, {"Add": 1})
    (folded,) = model.graph.initializers.values()
    assert folded.const_value is not None
    np.testing.assert_array_equal(folded.const_value.numpy(), [0, 1, 2, 3])


def test_a_small_file_cannot_ask_for_a_large_tensor() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 24]>
        g (float[4] x) => (float y) <int64[2] size = {1000000, 1000000}> {
            big = ConstantOfShape(size)
            total = ReduceMax <keepdims = 0> (big)
            most = ReduceMax <keepdims = 0> (x)
            y = Add(most, total)
        }"""
    )
    FoldConstants().run(model, context=None)  # type: ignore[arg-type]
    assert ops(model)["ConstantOfShape"] == 1
