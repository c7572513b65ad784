"""LSTM, GRU and RNN compute what onnxruntime does: directions, layouts, lengths, states, activations, all outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.targets.running import built
from xopt import targets
from xopt.errors import InputError
from xopt.targets.lowering import lower

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN, FEATURES = 20, 6
"""No whole number of vectors, more than one."""


def model(cell: str, inputs: frozenset[str], constant: bool, directions: int, **attributes: Any) -> onnx.ModelProto:
    """One node: weights are constants or inputs, the optional inputs those that are named."""
    random, rows = np.random.default_rng(3), GATES[cell] * HIDDEN
    first = bool(attributes.get("layout"))
    state = ["batch", directions, HIDDEN] if first else [directions, "batch", HIDDEN]
    shapes: dict[str, list[int | str]] = {
        "x": ["batch", "steps", FEATURES] if first else ["steps", "batch", FEATURES],
        "w": [directions, rows, FEATURES],
        "r": [directions, rows, HIDDEN],
        "b": [directions, 2 * rows],
        "lengths": ["batch"],
        "h0": state,
        "c0": state,
        "p": [directions, 3 * HIDDEN],
    }
    names = list(shapes)[: 8 if cell == "LSTM" else 6]
    used = [name if name in inputs | {"x", "w", "r"} else "" for name in names]
    while not used[-1]:
        used.pop()
    weights = {n for n in used if n in ("w", "r", "b", "p")} if constant else set()
    tensors = [
        onnx.numpy_helper.from_array(random.normal(size=shapes[n]).astype(np.float32) / 3, n) for n in sorted(weights)
    ]
    kinds = {"lengths": onnx.TensorProto.INT32}
    values = [
        onnx.helper.make_tensor_value_info(n, kinds.get(n, onnx.TensorProto.FLOAT), shapes[n])
        for n in used
        if n and n not in weights
    ]
    outputs = ["y", "y_h", "y_c"][: 3 if cell == "LSTM" else 2]
    node = onnx.helper.make_node(cell, used, outputs, hidden_size=HIDDEN, **attributes)
    results = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs]
    graph = onnx.helper.make_graph([node], "cell", values, results, tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def check(proto: onnx.ModelProto, steps: int, batch: int) -> None:
    random = np.random.default_rng(steps)
    sizes = {"steps": steps, "batch": batch}
    feeds: dict[str, np.ndarray] = {}
    for value in proto.graph.input:
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = (random.normal(size=shape) / 2).astype(np.float32)
    if "lengths" in feeds:
        feeds["lengths"] = random.integers(1, steps + 1, batch).astype(np.int32)
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
    canonical = ir.from_proto(proto)
    for got, expected in zip(built(lower(canonical, targets.get("cpu")))(feeds), want, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)  # activations to 2e-7, over a dozen steps


ALL = frozenset(("b", "lengths", "h0", "c0", "p"))


@pytest.mark.parametrize("cell", list(GATES))
@pytest.mark.parametrize(("direction", "directions"), [("forward", 1), ("reverse", 1), ("bidirectional", 2)])
@pytest.mark.parametrize("constant", [True, False], ids=["constants", "inputs"])
def test_directions(cell: str, direction: str, directions: int, constant: bool) -> None:
    proto = model(cell, ALL, constant, directions, direction=direction)
    check(proto, 9, 3)
    check(proto, 1, 1)


@pytest.mark.parametrize("cell", list(GATES))
def test_only_what_must_be_given(cell: str) -> None:
    check(model(cell, frozenset(), True, 1), 5, 2)


def test_gru_with_the_reset_gate_behind_the_product() -> None:
    check(model("GRU", frozenset(("b", "h0")), True, 1, linear_before_reset=1), 7, 2)
    check(model("GRU", frozenset(), False, 1, linear_before_reset=1), 7, 2)


def test_coupled_gates_and_clipping() -> None:
    check(model("LSTM", frozenset(("b",)), True, 1, clip=0.3), 7, 2)
    check(model("LSTM", frozenset(("b",)), True, 1, input_forget=1), 7, 2)


@pytest.mark.parametrize(
    ("functions", "alpha", "beta"),
    [
        (["HardSigmoid", "Softsign", "Relu"], [0.3], [0.4]),
        (["Sigmoid", "ScaledTanh", "LeakyRelu"], [0.9, 0.2], [0.7]),
        (["Sigmoid", "Elu", "Affine"], [0.5, 0.8], [0.1]),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_activations(functions: list[str], alpha: list[float], beta: list[float]) -> None:
    attributes = {"activations": functions, "activation_alpha": alpha, "activation_beta": beta}
    check(model("LSTM", frozenset(("b",)), True, 1, **attributes), 6, 2)


def test_what_is_refused_is_named() -> None:
    proto = model("RNN", frozenset(), True, 1, activations=["Gelu"])
    with pytest.raises(InputError, match="there is no activation Gelu"):
        lower(ir.from_proto(proto), targets.get("cpu"))
    with pytest.raises(InputError, match="recurrent cells, on this target"):
        lower(ir.from_proto(model("RNN", frozenset(), True, 1)), targets.get("cuda"))
