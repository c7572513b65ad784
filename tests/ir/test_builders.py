"""The test models are valid ONNX and deterministic."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from tests.ir import builders


@pytest.mark.parametrize("name", builders.ZOO)
def test_the_checker_accepts_it_and_it_is_the_same_twice(name: str) -> None:
    proto = ir.to_proto(builders.ZOO[name]())
    onnx.checker.check_model(proto, full_check=True)
    assert proto.SerializeToString(deterministic=True) == ir.to_proto(builders.ZOO[name]()).SerializeToString(
        deterministic=True
    )
