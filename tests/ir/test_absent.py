"""An optional input that the data decide is not one that is absent."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from tests.ir.net import Net
from xopt.ir import walk
from xopt.ir.canonical.masks import hides_later_keys
from xopt.ir.symbolic import Symbols


def triangle(k: str) -> ir.Model:
    """A mask [1, 1, 4, 4] of the lower triangle, with its diagonal as asked."""
    net = Net("triangle")
    shape = net.ints(1, 1, 4, 4)
    ones = net.op("Cast", net.op("ConstantOfShape", shape, value=ir.tensor([1.0])), to=int(ir.DataType.BOOL))
    offset = {
        "absent": lambda: None,
        "zero": lambda: net.scalar(0),
        "input": lambda: net.input("k", [], ir.DataType.INT64),
    }
    net.output(net.op("Trilu", ones, offset[k](), upper=0), "mask")
    return net.build()


@pytest.mark.parametrize(("k", "causal"), [("absent", True), ("zero", True), ("input", False)])
def test_a_triangle_with_a_computed_diagonal_is_not_known_to_be_causal(k: str, causal: bool) -> None:
    graph = triangle(k).graph
    assert hides_later_keys(Symbols(graph), graph.outputs[0]) is causal


@pytest.mark.parametrize(("steps", "known"), [("absent", True), ("one", True), ("two", False), ("input", False)])
def test_steps_that_are_computed_are_not_one(steps: str, known: bool) -> None:
    net = Net("slice")
    given = {
        "absent": lambda: None,
        "one": lambda: net.ints(1),
        "two": lambda: net.ints(2),
        "input": lambda: net.input("steps", [1], ir.DataType.INT64),
    }
    x = net.input("x", [2, 4, 3])
    y = net.op("Slice", x, net.ints(0), net.ints(4), net.ints(1), given[steps]())
    assert walk.in_order(y.producer()) is known
