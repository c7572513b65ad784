"""Experts, and tables and weights of few bits, of ``com.microsoft``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.ir.contrib import DOMAIN, below, check, loaded, normal, positive, session
from xopt.errors import InputError
from xopt.ir import canonicalize, export
from xopt.ir.io import to_bytes

E, D, N, T = 4, 32, 16, 6
"""Experts, width, neurons, tokens."""
TOKENS, ROUTER = normal(T, D), normal(T, E)


def of_experts(wide: int = 1, bias: bool = True) -> list[Any]:
    b1, b2 = (normal(E, wide * N), normal(E, D)) if bias else (None, None)
    return [TOKENS, ROUTER, normal(E, wide * N, D) * np.float32(0.3), b1, normal(E, D, N) * np.float32(0.3), b2]


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (of_experts(), {"k": 1}),
        (of_experts(), {"k": 2, "normalize_routing_weights": 1, "activation_type": "gelu"}),
        (of_experts(bias=False), {"k": E, "activation_type": "silu"}),
        (of_experts(), {"k": 3, "activation_type": "identity", "normalize_routing_weights": 1}),
        (of_experts(2), {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1}),
        (
            of_experts(2),
            {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.702, "activation_beta": 1.0,
             "swiglu_limit": 0.5, "normalize_routing_weights": 1},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("constant", [True, False])
def test_experts(inputs: Any, attributes: dict[str, Any], constant: bool, tmp_path: Path) -> None:
    constants = [place for place in range(2, 6) if inputs[place] is not None] if constant else ()
    check(tmp_path, "MoE", inputs, attributes, constants=constants, fixed=range(6), tolerance=1e-4)


def test_experts_of_sentences(tmp_path: Path) -> None:
    inputs = of_experts()
    inputs[0] = TOKENS.reshape(2, 3, D)
    check(tmp_path, "MoE", inputs, {"k": 2}, constants=(2, 3, 4, 5), tolerance=1e-4)


@pytest.mark.parametrize("kind", ["halves", "third", "silu"])
def test_gates_that_onnxruntime_has_on_other_devices(kind: str, tmp_path: Path) -> None:
    """By its documentation: gates and values in two halves of one layer, or in two layers."""
    x, router, up, _, down, _ = of_experts(1 if kind != "halves" else 2, bias=False)
    third = normal(E, N, D)
    attributes: dict[str, Any] = {"k": 2, "activation_type": "silu" if kind == "silu" else "swiglu"}
    if kind == "halves":
        attributes["swiglu_fusion"] = 2
    inputs = {"input": x, "router_probs": router, "fc1_experts_weights": up, "fc2_experts_weights": down}
    if kind != "halves":
        inputs["fc3_experts_weights"] = third
    gates = np.exp(router) / np.exp(router).sum(-1, keepdims=True)
    gates = np.where(gates >= np.sort(gates, -1)[:, -2:-1], gates, 0)
    hidden = np.einsum("td,end->etn", x, up)
    gate, value = np.split(hidden, 2, -1) if kind == "halves" else (hidden, np.einsum("td,end->etn", x, third))
    results = np.einsum("etn,edn->etd", gate / (1 + np.exp(-gate)) * value, down)
    names = ["input", "router_probs", "fc1_experts_weights", "", "fc2_experts_weights", "", "fc3_experts_weights"]
    got = of_names("MoE", [name if name in inputs else "" for name in names], inputs, attributes, tmp_path)
    np.testing.assert_allclose(got, np.einsum("te,etd->td", gates, results), rtol=1e-4, atol=1e-4)


def of_names(
    op: str, names: list[str], inputs: dict[str, np.ndarray], attributes: dict[str, Any], folder: Path
) -> np.ndarray:
    """The output of an operator some of whose inputs are absent, by its standard operators."""

    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, ["y"], domain=DOMAIN, name="it", **attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "one", given, [y])
    model = loaded(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder)
    canonicalize(model)
    result: np.ndarray = session(to_bytes(export(model))).run(None, inputs)[0]
    return result


def packed(bits: int, *shape: int) -> np.ndarray:
    return below(256, *shape[:-1], shape[-1] * bits // 8, dtype=np.uint8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_quantized_experts(bits: int, block: int, zeros: bool, gated: bool, tmp_path: Path) -> None:
    wide, most = 2 if gated else 1, np.float32(0.3 / (1 << bits))
    parts = lambda rows, columns: (E, rows, columns // block) if block else (E, rows)  # noqa: E731
    inputs: list[Any] = [
        TOKENS, ROUTER,
        packed(bits, E, wide * N, D), positive(*parts(wide * N, D)) * most, normal(E, wide * N),
        packed(bits, E, D, N), positive(*parts(D, N)) * most, normal(E, D),
    ]  # fmt: skip
    if zeros:
        inputs += [None, None, None]
        inputs += [zero_points(bits, parts(wide * N, D)), zero_points(bits, parts(D, N))]
    attributes: dict[str, Any] = {"k": 2, "expert_weight_bits": bits, "normalize_routing_weights": int(zeros)}
    attributes |= {"block_size": block} if block else {}
    attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1} if gated else {"activation_type": "silu"}
    constants = [place for place in range(2, len(inputs)) if inputs[place] is not None]
    # onnxruntime multiplies 8 bits by activations that it rounds to 8 bits
    check(tmp_path, "QMoE", inputs, attributes, constants=constants, tolerance=0.05 if bits == 8 else 2e-3)


def zero_points(bits: int, shape: tuple[int, ...]) -> np.ndarray:
    return below(256, *shape[:-1], -(-shape[-1] * bits // 8), dtype=np.uint8)


@pytest.mark.parametrize("normalized", [0, 1])
def test_routes_that_are_chosen_by_other_numbers_than_they_weigh(normalized: int, tmp_path: Path) -> None:
    inputs: list[Any] = [
        TOKENS, ROUTER, packed(4, E, N, D), positive(E, N) * np.float32(0.02), None,
        packed(4, E, D, N), positive(E, D) * np.float32(0.02), *[None] * 7, positive(T, E),
    ]  # fmt: skip
    attributes = {"k": 2, "expert_weight_bits": 4, "activation_type": "silu", "normalize_routing_weights": normalized}
    check(tmp_path, "QMoE", inputs, attributes, constants=(2, 3, 5, 6), tolerance=2e-3)


# Tables and weights


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_of_a_table_in_bytes(bits: int, zeros: bool, tmp_path: Path) -> None:
    data, scales = packed(bits, 12, 64), positive(12, 2)
    given = [zero_points(bits, (12, 2))] if zeros else []
    inputs = [data, below(12, 2, 3, dtype=np.int64), scales, *given]
    attributes = {"bits": bits, "block_size": 32, "quantize_axis": 1, "gather_axis": 0}
    check(tmp_path, "GatherBlockQuantized", inputs, attributes, constants=(0, 2, 3)[: 2 + zeros])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("shape", [(8, 32), (5, 21)])
def test_weights_of_bitsandbytes(kind: int, shape: tuple[int, int], tmp_path: Path) -> None:
    rows, columns = shape
    weight = below(256, -(-rows * columns // 2), dtype=np.uint8)
    inputs = [normal(2, 3, columns), weight, positive(-(-rows * columns // 16))]
    attributes = {"N": rows, "K": columns, "block_size": 16, "quant_type": kind}
    check(tmp_path, "MatMulBnb4", inputs, attributes, constants=(1, 2), tolerance=1e-4)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"use_sparse_mixer": 1}, "use_sparse_mixer"), ({"k": 9}, "k is 9"), ({"activation_type": "tanh"}, "'tanh'")],
)
def test_what_is_refused(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    inputs = {"input": TOKENS, "router_probs": ROUTER, "up": normal(E, N, D), "down": normal(E, D, N)}
    with pytest.raises(InputError, match=word) as caught:
        of_names("MoE", ["input", "router_probs", "up", "", "down"], inputs, {"k": 2, **change}, tmp_path)
    assert caught.value.code == "E-UNSUPPORTED-OP"
