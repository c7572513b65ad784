"""Each operator of the table against the ONNX reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.ir.canonical import model_of
from tests.targets.running import node_model, reference, run_node
from xopt.errors import InputError

RANDOM = np.random.default_rng(0)
FLOAT, INT64, BOOL, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.INT32


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def data(shape: list[int | str], kind: ir.DataType) -> np.ndarray:
    sizes = [3 if isinstance(dim, str) else dim for dim in shape]
    if kind == BOOL:
        return RANDOM.integers(0, 2, sizes).astype(bool)
    if kind in (INT64, INT32):
        return RANDOM.integers(-3, 4, sizes).astype(kind.numpy())
    return RANDOM.standard_normal(sizes).astype(np.float32)


def case(
    op: str, inputs: dict[str, Any], kind: ir.DataType = FLOAT, out: ir.DataType | None = None, **rest: Any
) -> Any:
    label = f"{op}-" + "-".join(f"{k}{v}" for k, v in rest.items() if isinstance(v, (int, str)))
    return pytest.param(op, inputs, kind, kind if out is None else out, rest, id=label)


X = ["b", 4, 6]
CASES = [
    *(case(op, {"x": X}) for op in ("Abs", "Neg", "Exp", "Erf", "Tanh", "Sigmoid", "Relu", "Floor", "Ceil", "Round")),
    *(case(op, {"x": X}) for op in ("Sign", "Sin", "Cos", "Softplus", "HardSwish", "Elu", "Selu", "LeakyRelu")),
    case("Gelu", {"x": X}), case("Gelu", {"x": X}, approximate="tanh"), case("Swish", {"x": X}, alpha=1.5),
    case("IsNaN", {"x": X}, out=BOOL), case("Not", {"x": X}, BOOL),
    case("Clip", {"x": X, "low": np.array(-0.5, np.float32)}),
    *(case(op, {"x": X, "y": [4, 1]}) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(case(op, {"x": X, "y": ["b", 1, 6]}, BOOL) for op in ("And", "Or", "Xor")),
    *(case(op, {"x": X, "y": X}, INT64, BOOL) for op in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")),
    case("Div", {"x": X, "y": ints(3)}, INT64), case("Mod", {"x": X, "y": ints(3)}, INT64),
    case("Mod", {"x": X, "y": ints(3)}, INT64, fmod=1), case("Mod", {"x": X, "y": np.float32([1.5])}, fmod=1),
    *(case("Pow", {"x": X, "y": np.array(e, np.float32)}) for e in (2.0, 3.0)),
    case("Where", {"c": np.array([[True], [False], [True], [True]]), "x": X, "y": [1, 6]}),
    case("Cast", {"x": X}, out=INT64, to=INT64), case("Cast", {"x": X}, INT64, BOOL, to=BOOL),
    case("Reshape", {"x": X, "s": ints(0, -1)}), case("Flatten", {"x": X}, axis=2),
    case("Transpose", {"x": X}, perm=[2, 0, 1]), case("Squeeze", {"x": ["b", 1, 6], "a": ints(1)}),
    case("Unsqueeze", {"x": X, "a": ints(0, -1)}), case("Concat", {"x": X, "y": X}, axis=1),
    case("Concat", {f"x{i:02}": X for i in range(40)}, axis=1),
    case("Split", {"x": X, "s": ints(1, 3)}, axis=1, outputs=2),
    case("Split", {"x": X}, axis=-1, num_outputs=3, outputs=3),
    case("Slice", {"x": X, "s": ints(1), "e": ints(2**62), "a": ints(1), "t": ints(2)}),
    case("Slice", {"x": X, "s": ints(-1), "e": ints(-(2**62)), "a": ints(2), "t": ints(-2)}),
    case("Slice", {"x": X, "s": ints(-2, 0), "e": ints(9, -1), "a": ints(2, 0)}),
    case("Expand", {"x": [4, 1], "s": ints(2, 1, 6)}), case("Tile", {"x": X, "r": ints(1, 2, 3)}),
    case("Pad", {"x": X, "p": ints(0, 1, 0, 2, 0, 3), "v": np.array(7, np.float32)}),
    *(case("Pad", {"x": X, "p": ints(0, 1, 2, 0, 2, 1)}, mode=mode) for mode in ("reflect", "edge", "wrap")),
    case("Trilu", {"x": X}, upper=0), case("Trilu", {"x": X, "k": ints(1).reshape(())}, upper=1),
    case("Gather", {"x": X, "i": np.array([[0, -1], [2, 1]])}, axis=1),
    case("Gather", {"x": X, "i": ints(-1).reshape(())}, axis=2),
    case("Gather", {"x": floats(7, 5), "i": ["b", 2]}, INT64, FLOAT),
    case("GatherElements", {"x": X, "i": np.array([[[0, -1, 3, 2, 1, 0]]] * 3)}, axis=1),
    case("GatherND", {"x": X, "i": np.array([[[0], [3]], [[1], [-1]], [[2], [2]]])}, batch_dims=1),
    case("ScatterND", {"x": X, "i": np.array([[0, 1], [2, 3]]), "u": floats(2, 6)}),
    case("ScatterElements", {"x": X, "i": np.array([[[0, 1, 3, 2, 1, 0]]] * 3), "u": floats(3, 1, 6)}, axis=1),
    *(case("CumSum", {"x": X, "a": ints(1).reshape(())}, exclusive=flag) for flag in (0, 1)),
    *(case(op, {"x": X, "a": ints(axis)}, keepdims=keep)
      for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2") for axis, keep in ((1, 1), (-1, 0))),
    case("ReduceMin", {"x": X, "a": ints(1)}), case("ReduceProd", {"x": X, "a": ints(1)}),
    case("ReduceLogSumExp", {"x": X, "a": ints(1)}, keepdims=0), case("ReduceSumSquare", {"x": X, "a": ints(0)}),
    case("Softmax", {"x": X}, axis=1), case("LogSoftmax", {"x": X}),
    *(case("ArgMax", {"x": X}, INT64, axis=1, select_last_index=last, keepdims=0) for last in (0, 1)),
    case("TopK", {"x": X, "k": ints(2)}, axis=1, outputs=2),
    case("OneHot", {"x": X, "d": np.array(3), "v": np.float32([0, 1])}, INT64, FLOAT),
    case("MatMul", {"x": X, "w": floats(6, 5)}), case("MatMul", {"x": X, "y": ["b", 6, 5]}),
    case("MatMul", {"x": X, "y": [6, 5]}), case("MatMul", {"x": [4, 6], "y": [6, 5]}),
    case("MatMul", {"x": ["b", 1, 4, 6], "y": ["b", 2, 6, 5]}), case("Softmax", {"x": X}, axis=-1),
    *(case("RotaryEmbedding", {"x": [batch, 5, 32], "c": floats(3, 5, 4), "s": floats(3, 5, 4)}, num_heads=2,
           interleaved=pairs, rotary_embedding_dim=8) for pairs in (0, 1) for batch in (3, "b")),
    case("RotaryEmbedding", {"x": ["b", 2, 5, 8], "c": floats(9, 4), "s": floats(9, 4),
                             "p": np.arange(15).reshape(3, 5) % 9}),
    case("Gemm", {"x": [4, 6], "w": floats(5, 6), "c": floats(5)}, transB=1, alpha=0.5),
    case("Einsum", {"x": X, "y": ["b", 6, 5]}, equation="bij,bjk->bik"),
    case("Conv", {"x": ["b", 3, 8, 8], "w": floats(5, 3, 4, 4), "c": floats(5)}, strides=[4, 4]),
    case("Conv", {"x": ["b", 3, 9], "w": floats(5, 3, 3), "c": floats(5)}, pads=[1, 1], strides=[2]),
    case("Conv", {"x": ["b", 4, 7, 7], "w": floats(4, 1, 3, 3)}, group=4, auto_pad="SAME_UPPER"),
    case("LayerNormalization", {"x": X, "s": floats(6), "c": floats(6)}),
    case("RMSNormalization", {"x": X, "s": floats(6)}),
    case("LayerNormalization", {"x": X, "s": floats(4, 6), "c": floats(4, 6)}, axis=1),
    case("EyeLike", {"x": [4, 6]}, k=1), case("GlobalAveragePool", {"x": ["b", 3, 4, 4]}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "kind", "out", "rest"), CASES)
def test_operator(
    op: str,
    inputs: dict[str, Any],
    kind: ir.DataType,
    out: ir.DataType,
    rest: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = {name: content for name, content in inputs.items() if isinstance(content, list)}
    model = node_model(op, inputs, dtypes=dict.fromkeys(given, kind), output_type=out, **rest)
    if op == "TopK":
        model.graph.outputs[1].type = ir.TensorType(INT64)
    feeds = {name: data(shape, kind) for name, shape in given.items()}
    for ours, theirs in zip(run_node(model, feeds), reference(model, feeds), strict=True):
        assert ours.shape == theirs.shape
        # Float32 rounding of a handful of operations; integers and booleans are exact.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
    assert "pragma" not in capfd.readouterr().err  # the compiler has nothing to complain about


def test_dynamic_dimension_in_range_and_fill() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["b", "s"]), type=ir.TensorType(FLOAT))
    shape = ir.node("Shape", [x])
    constants = {
        n: ir.Value(name=n, const_value=ir.tensor(v)) for n, v in {"zero": np.int64(0), "one": np.int64(1)}.items()
    }
    length = ir.node("Gather", [shape.outputs[0], constants["one"]])
    steps = ir.node("Range", [constants["zero"], length.outputs[0], constants["one"]])
    filled = ir.node("ConstantOfShape", shape.outputs, attributes={"value": ir.tensor(np.array([2.0], np.float32))})
    for node, kind in ((shape, INT64), (length, INT64), (steps, INT64), (filled, FLOAT)):
        node.outputs[0].type = ir.TensorType(kind)
    steps.outputs[0].name, filled.outputs[0].name, shape.outputs[0].name = "steps", "filled", "shape"
    nodes = [shape, length, steps, filled]
    outputs = [node.outputs[0] for node in (steps, filled, shape)]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=list(constants.values()), opset_imports={"": 24})
    result = run_node(ir.Model(graph, ir_version=10), {"x": np.zeros((2, 5), np.float32)})
    assert result[0].tolist() == [0, 1, 2, 3, 4]
    assert result[1].tolist() == [[2.0] * 5] * 2
    assert result[2].tolist() == [2, 5]


def test_positions_after_a_past_are_fused_with_what_reads_them() -> None:
    """The start of the Range is a number, and the past's length is also asked for by the fused function."""
    model = model_of(
        "(float[b, s, 4] x, float[b, p, 4] past) => (float[s] y) <int64 one = {1}, float half = {0.5}>",
        "ps = Shape <start: int = 1, end: int = 2> (past) xs = Shape <start: int = 1, end: int = 2> (x) "
        "before = Squeeze(ps) count = Squeeze(xs) end = Add(before, count) "
        "r = Range(before, end, one) f = Cast <to: int = 1> (r) y = Mul(f, half)",
    )
    (y,) = run_node(model, {"x": np.zeros((2, 3, 4), np.float32), "past": np.zeros((2, 5, 4), np.float32)})
    assert y.tolist() == [2.5, 3.0, 3.5]


@pytest.mark.parametrize(
    ("op", "inputs", "reason"),
    [
        ("NoSuchOperator", {"x": [2]}, "no operator"),
    ],
)
def test_refusal_names_the_node(op: str, inputs: dict[str, Any], reason: str) -> None:
    model = node_model(op, inputs, dtypes={"s": INT64})
    with pytest.raises(InputError, match=reason) as caught:
        run_node(model, {})
    assert caught.value.code == "E-UNSUPPORTED-OP"
    assert "tested" in caught.value.where
