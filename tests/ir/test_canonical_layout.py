"""Layouts followed backwards say where every element of a tensor came from: checked on numbered arrays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st

from xopt.ir.canonical.layout import Axes, axis, before, columns, regroup
from xopt.ir.io import to_bytes
from xopt.ir.poly import Poly
from xopt.ir.symbolic import Symbols

SOURCE = (2, 3, 24)


def chain(steps: list[tuple[str, list[np.ndarray], dict[str, object]]]) -> ir.Model:
    """x [2,3,24] through the steps: (op, constant inputs, attributes)."""
    x = ir.Value(name="x", shape=ir.Shape(SOURCE), type=ir.TensorType(ir.DataType.FLOAT))
    value, nodes, constants = x, [], []
    for number, (op, arrays, attributes) in enumerate(steps):
        inputs = [value]
        for place, array in enumerate(arrays):
            tensor = ir.tensor(array, name=f"c{number}_{place}")
            constants.append(ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(array.shape)))
            inputs.append(constants[-1])
        node = ir.node(op, inputs, attributes)
        nodes.append(node)
        value = node.outputs[0]
        value.name = f"v{number}"
    value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=constants, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def ints(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int64)


STEPS = {
    "chunk": [("Slice", [ints(8), ints(16), ints(2)], {}), ("Reshape", [ints(0, 0, 4, 2)], {})],
    "timm": [
        ("Reshape", [ints(2, 3, 3, 4, 2)], {}),
        ("Transpose", [], {"perm": [2, 0, 3, 1, 4]}),
        ("Gather", [np.asarray(1, np.int64)], {"axis": 0}),
    ],
    "bloom": [
        ("Reshape", [ints(2, 3, 4, 3, 2)], {}),
        ("Slice", [ints(2), ints(3), ints(3)], {}),
        ("Squeeze", [ints(3)], {}),
        ("Transpose", [], {"perm": [0, 2, 1, 3]}),
    ],
    "even": [("Reshape", [ints(0, 0, 4, 6)], {}), ("Slice", [ints(0), ints(6), ints(3), ints(2)], {})],
    "odd": [
        ("Reshape", [ints(0, 0, 4, 3, 2)], {}),
        ("Slice", [ints(1), ints(2), ints(4)], {}),
        ("Squeeze", [ints(4)], {}),
    ],
    "flat": [
        ("Reshape", [ints(0, 0, 4, 6)], {}),
        ("Transpose", [], {"perm": [0, 2, 1, 3]}),
        ("Reshape", [ints(8, 3, 6)], {}),
    ],
}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(STEPS)))
def test_positions_along_the_last_axis(name: str) -> None:
    model = chain(STEPS[name])
    numbered = np.broadcast_to(np.arange(24, dtype=np.float32), SOURCE)
    got = onnxruntime.InferenceSession(to_bytes(model)).run(None, {"x": np.ascontiguousarray(numbered)})[0]
    symbols = Symbols(model.graph)
    value = model.graph.outputs[0]
    axes: Axes = tuple(axis(f"a{i}", Poly.of(size)) for i, size in enumerate(got.shape))
    while value.producer() is not None:
        moved = before(symbols, value, axes)
        assert moved is not None
        value, axes = moved
    labels = ("", *(f"a{i}" for i in range(len(got.shape))))
    held = columns(axes[-1], labels)
    assert held is not None
    used = {digit.label for digit in axes[-1]}
    first = tuple(slice(None) if f"a{i}" in used else 0 for i in range(len(got.shape)))
    if name == "flat":  # the batch digit was cut in two: heads are its low part
        first = (slice(0, 4), 0, slice(None))
    np.testing.assert_array_equal(got[first].reshape(-1), held)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_regrouping_is_reversible(sizes: list[int], data: st.DataObject) -> None:
    axes: Axes = tuple(axis(f"a{i}", Poly.of(size)) for i, size in enumerate(sizes))
    cut = data.draw(st.integers(0, len(sizes)))
    merged_sizes = [int(np.prod(sizes[:cut], dtype=int)), int(np.prod(sizes[cut:], dtype=int))]
    merged = regroup(axes, tuple(Poly.of(size) for size in merged_sizes))
    assert merged is not None
    assert regroup(merged, tuple(Poly.of(size) for size in sizes)) == axes


def test_sizes_that_cut_a_digit_unevenly_are_refused() -> None:
    assert regroup((axis("a", Poly.of(6)),), (Poly.of(4), Poly.of(2))) is None
    assert regroup((axis("a", Poly.of("batch")),), (Poly.of("seq"),)) is None
