"""Axes, shapes, bounds and counts that are inputs of the model: results, and errors for what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.targets.running import built, node_model, reference
from xopt import targets
from xopt.ir.shapes import infer_shapes
from xopt.targets.lowering import lower

INT = ir.DataType.INT64
X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def of(op: str, shape: list[int | str], lengths: Mapping[str, int], **attributes: Any) -> Any:
    """A node on ``x`` with int64 inputs of some lengths, none known."""
    inputs: dict[str, Any] = {"x": shape} if shape else {}
    inputs |= {name: [length] for name, length in lengths.items()}
    output = INT if op == "Range" else ir.DataType.FLOAT
    model = node_model(op, inputs, dtypes=dict.fromkeys(lengths, INT), output_type=output, **attributes)
    if op == "TopK":
        model.graph.outputs[1].type = ir.TensorType(INT)
    return model


def compiled(model: ir.Model) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    return built(lower(model, targets.get("cpu")))


def check(model: ir.Model, *feeds: dict[str, Any]) -> None:
    run = compiled(model)
    for feed in feeds:
        arrays = {name: np.asarray(value, np.int64 if name != "x" else np.float32) for name, value in feed.items()}
        for got, want in zip(run(arrays), reference(model, arrays), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # sums of at most 24 numbers of float32


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceProd", "ReduceL2", "ReduceLogSumExp"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions_over_axes_of_the_data(op: str, keep: int) -> None:
    check(of(op, ["n", 3, 4], {"axes": 1}, keepdims=keep), *({"x": X, "axes": [axis]} for axis in (0, 1, 2, -1, -3)))
    check(
        of(op, [2, 3, 4], {"axes": 2}, keepdims=keep), *({"x": X, "axes": axes} for axes in ([0, 2], [2, 1], [-3, 1]))
    )


def test_a_shape_of_the_data_that_is_known_to_hold_none() -> None:
    """A 0 among the sizes that the model tells is one, and not the size that was there."""
    model = of("Reshape", [0, 3, 4], {"shape": 3}, allowzero=1)
    model.graph.outputs[0].shape = ir.Shape([3, 4, 0])
    (result,) = compiled(model)({"x": np.zeros((0, 3, 4), np.float32), "shape": np.array([3, 4, 0])})
    assert result.shape == (3, 4, 0)


@pytest.mark.parametrize(
    ("model", "feeds"),
    [
        (of("Reshape", ["n", 3, 4], {"shape": 2}), [{"shape": [6, 4]}, {"shape": [-1, 8]}, {"shape": [0, 12]}]),
        (of("Expand", [1, 3, 1], {"shape": 3}), [{"shape": [2, 3, 4]}, {"shape": [1, 1, 5]}, {"shape": [1, 3, 1]}]),
        (of("Expand", [3, 1], {"shape": 3}), [{"shape": [2, 3, 4]}, {"shape": [1, 1, 1]}]),
        (of("Tile", [2, "m", 4], {"repeats": 3}), [{"repeats": [1, 2, 3]}, {"repeats": [2, 1, 1]}]),
        (of("Squeeze", [1, 3, 1, 4], {"axes": 1}), [{"axes": [0]}, {"axes": [2]}, {"axes": [-2]}]),
        (of("Unsqueeze", [2, 3, 4], {"axes": 2}), [{"axes": [0, 1]}, {"axes": [4, 0]}, {"axes": [-1, 2]}]),
    ],
    ids=["Reshape", "Expand", "Expand-rank", "Tile", "Squeeze", "Unsqueeze"],
)
def test_shapes_of_the_data(model: ir.Model, feeds: list[dict[str, Any]]) -> None:
    shape = [2 if dim == "n" else 3 if dim == "m" else int(dim) for dim in model.graph.inputs[0].shape]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    check(model, *({"x": x, **feed} for feed in feeds))


def test_slices_of_the_data() -> None:
    bounds = {"starts": 2, "ends": 2, "axes": 2, "steps": 2}
    feeds = [
        {"starts": [0, 1], "ends": [2, 3], "axes": [1, 2], "steps": [1, 1]},
        {"starts": [-1, 3], "ends": [-4, 0], "axes": [1, 2], "steps": [-1, -2]},
        {"starts": [0, -2], "ends": [1 << 40, 100], "axes": [-3, -1], "steps": [2, 1]},
    ]
    check(of("Slice", ["n", 3, 4], bounds), *({"x": X, **feed} for feed in feeds))
    check(of("Slice", [2, 3, 4], {"starts": 1, "ends": 1}), {"x": X, "starts": [1], "ends": [2]})


def test_parts_of_sizes_of_the_data() -> None:
    model = of("Split", [2, 3, 4], {"split": 3}, axis=-1, outputs=3)
    check(model, {"x": X, "split": [1, 1, 2]}, {"x": X, "split": [2, 1, 1]})


def test_ranges_fills_and_the_first_k() -> None:
    check(of("ConstantOfShape", [], {"shape": 2}), {"shape": [2, 3]}, {"shape": [1, 7]})
    scalars = of("Range", [], {"start": 1, "limit": 1, "delta": 1})
    for value in scalars.graph.inputs:
        value.shape = ir.Shape([])
    check(scalars, {"start": 0, "limit": 5, "delta": 2}, {"start": 4, "limit": -3, "delta": -2})
    check(of("TopK", [2, 3, 4], {"k": 1}, outputs=2), {"x": X, "k": [1]}, {"x": X, "k": [4]})


@pytest.mark.parametrize(
    ("model", "feed", "message"),
    [
        (of("ReduceSum", [2, 3, 4], {"axes": 1}), {"axes": [3]}, "an axis is not one of 3"),
        (of("Reshape", [2, 3, 4], {"shape": 2}), {"shape": [5, 5]}, "another number of elements"),
        (of("Reshape", [2, 3, 4], {"shape": 2}), {"shape": [-1, 5]}, "another number of elements"),
        (of("Expand", [2, 3, 4], {"shape": 3}), {"shape": [2, 2, 4]}, "does not broadcast"),
        (of("Expand", [2, 3, 4], {"shape": 4}), {"shape": [1 << 40, 2, 3, 4]}, "too large"),
        (of("Tile", [2, 3, 4], {"repeats": 3}), {"repeats": [1 << 20, 1 << 20, 1]}, "too large"),
        (of("Tile", [2, 3, 4], {"repeats": 3}), {"repeats": [-1, 1, 1]}, "too large"),
        (of("Squeeze", [2, 1, 4], {"axes": 1}), {"axes": [0]}, "not of size 1"),
        (of("Slice", [2, 3, 4], {"starts": 1, "ends": 1, "axes": 1}), {"starts": [0], "ends": [1], "axes": [7]}, "is"),
        (of("Split", [2, 3, 4], {"split": 2}, axis=1, outputs=2), {"split": [2, 2]}, "do not add up"),
        (of("TopK", [2, 3, 4], {"k": 1}, outputs=2), {"k": [5]}, "fewer than k"),
        (of("ConstantOfShape", [], {"shape": 1}), {"shape": [-3]}, "too large"),
    ],
)  # fmt: skip
def test_what_cannot_be_ends_the_run(model: ir.Model, feed: dict[str, Any], message: str) -> None:
    arrays = {name: np.asarray(value, np.int64) for name, value in feed.items()}
    for value in model.graph.inputs:
        if value.name == "x":
            arrays["x"] = np.zeros([int(dim) for dim in value.shape], np.float32)
    with pytest.raises(ValueError, match=message):
        compiled(model)(arrays)


def test_sizes_of_the_data_that_shape_inference_tells() -> None:
    """Only the first size of the result is open: what needs the others compiles."""
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[2, 3] x, int64[1] n) => (float[N, 2, 1] y) {
        rest = Constant <value = int64[2] {2, 3}> ()
        shape = Concat <axis: int = 0> (n, rest)
        repeated = Expand (x, shape)
        parts = Constant <value = int64[3] {1, 1, 1}> ()
        a, b, y = Split <axis: int = 2> (repeated, parts)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    functions = lower(model, targets.get("cpu")).module.functions.items()
    (kernel,) = (function for name, function in functions if name.name_hint == "expand")
    assert "_repeated, T.int64(2), T.int64(3))" in kernel.script()
    check(model, {"x": X[0, :2, :3], "n": [3]}, {"x": X[0, :2, :3], "n": [1]})


@pytest.mark.parametrize(
    ("node", "feeds"),
    [
        ("Pad(x, some)", [[0, 1, 0, 0, 2, 0], [0, 0, 0, 0, 0, 0]]),
        ("Slice(x, least, some)", [[2, 2, 4], [2, 1, 9]]),
        ("Unsqueeze(x, some)", [[0], [1]]),
    ],
)
def test_a_width_that_is_told_is_the_depth_of_a_product(node: str, feeds: list[list[int]]) -> None:
    """The other sizes are open."""
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    g (float[2, 3, 4] x, int64[{len(feeds[0])}] some, float[4, 5] w) => (float z) <int64[3] least = {{0, 0, 0}}> {{
        y = {node}
        z = MatMul(y, w)
    }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    rank = 4 if node.startswith("Unsqueeze") else 3
    dims: list[int | str] = [f"d{axis}" for axis in range(rank - 1)]
    model.graph[0].outputs[0].shape = ir.Shape([*dims, 4])
    model.graph.outputs[0].shape = ir.Shape([*dims, 5])
    w = model.graph.inputs.pop()
    w.const_value = ir.tensor(X.reshape(-1)[:20].reshape(4, 5), name="w")
    model.graph.register_initializer(w)
    check(model, *({"x": X, "some": some} for some in feeds))


@pytest.mark.parametrize(("count", "sizes"), [(2, (4, 5, 1)), (3, (3, 4, 8, 9))])
def test_equal_parts_of_an_open_axis(count: int, sizes: tuple[int, ...]) -> None:
    outputs = [f"y{place}" for place in range(count)]
    named = ", ".join(f"float[N{place}, 2] y{place}" for place in range(count))
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    g (float[S, 2] x) => ({named}) {{ {", ".join(outputs)} = Split <axis: int = 0, num_outputs: int = {count}> (x) }}"""
    check(ir.from_proto(onnx.parser.parse_model(text)), *({"x": np.ones((n, 2)) * n} for n in sizes))


RANGES = {
    "a step that a size is": """
        columns = Shape <start: int = 1, end: int = 2> (x)  step = Squeeze (columns)
        limit = Mul (n, step)  y = Range (zero, limit, step)""",
    "a part of a size": """
        f = Cast <to: int = 1> (n)  z = Constant <value = float {0}> ()  one = Constant <value = float {1}> ()
        step = Div (one, f)  y = Range (z, one, step)""",
    "steps of a half": """
        f = Cast <to: int = 1> (n)  z = Constant <value = float {0}> ()  step = Constant <value = float {0.5}> ()
        y = Range (z, f, step)""",
}


@pytest.mark.parametrize("nodes", RANGES.values(), ids=RANGES)
def test_ranges_that_sizes_step(nodes: str) -> None:
    kind = "float" if "Cast" in nodes else "int64"
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    g (float[N, S] x) => ({kind}[L] y) {{
        zero = Constant <value = int64 {{0}}> ()
        rows = Shape <start: int = 0, end: int = 1> (x)  n = Squeeze (rows)
        {nodes}
    }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    check(model, *({"x": np.ones(shape)} for shape in ((4, 3), (2, 5), (1, 1))))
