"""Activations, products, norms and small operators of ``com.microsoft`` as standard ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as registered

from tests.ir.contrib import DOMAIN, below, canonical, check, int32, int64, loaded, model_of, normal, session
from xopt.errors import InputError
from xopt.ir import canonicalize, export
from xopt.ir.canonical.contrib import rules
from xopt.ir.contrib import OPERATORS, form_of
from xopt.ir.io import to_bytes


def test_the_operators_are_those_of_onnxruntime() -> None:
    """Names and order of inputs, outputs and attributes: what a later onnxruntime adds is found here."""
    schemas = {
        schema.name: schema
        for schema in registered.get_all_operator_schema()
        if schema.domain == DOMAIN or schema.name in ("LayerNormalization", "SimplifiedLayerNormalization")
    }
    for op in OPERATORS:
        form, schema = form_of(op), schemas[op]
        assert form is not None
        assert form.inputs == tuple(given.name for given in schema.inputs), op
        assert form.outputs == tuple(given.name for given in schema.outputs), op
        assert set(form.defaults) == set(schema.attributes), op


def test_every_operator_has_a_rule() -> None:
    assert set(rules()) == set(OPERATORS)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "ops"),
    [
        ("Gelu", [normal(2, 3, 8)], {}, {"Gelu": 1}),
        ("FastGelu", [normal(2, 3, 8)], {}, {"Gelu": 1}),
        ("FastGelu", [normal(3, 8), normal(8)], {}, {"Add": 1, "Gelu": 1}),
        ("BiasGelu", [normal(2, 3, 8), normal(8)], {}, {"Add": 1, "Gelu": 1}),
        ("QuickGelu", [normal(2, 3, 8)], {}, {"Swish": 1}),
        ("QuickGelu", [normal(2, 3)], {"alpha": 0.5}, {"Swish": 1}),
        ("Trilu", [normal(2, 3, 4, 5), int64(1).reshape(())], {"upper": 0}, {"Trilu": 1}),
        ("Trilu", [normal(4, 5)], {}, {"Trilu": 1}),
        ("ExpandDims", [normal(2, 3), int32(-1).reshape(())], {}, None),
        ("Pad", [normal(2, 3), int64(1, 0, 0, 2)], {}, {"Pad": 1}),
        ("Pad", [normal(2, 3), int64([1, 0, 0, 2]), normal(1)], {}, None),
        ("Pad", [normal(2, 3), int64(1, 0, 0, 2)], {"mode": "reflect"}, {"Pad": 1}),
        ("GatherND", [normal(2, 3, 4), int32([0, 1], [1, 2])], {}, None),
        ("GridSample", [normal(1, 2, 4, 4), normal(1, 3, 3, 2)], {"mode": "bicubic"}, {"GridSample": 1}),
        ("GridSample", [normal(1, 2, 4, 4), normal(1, 3, 3, 2)], {"padding_mode": "border", "align_corners": 1}, None),
    ],
)
def test_one_operator(op: str, inputs: list[Any], attributes: dict[str, Any], ops: Any, tmp_path: Path) -> None:
    check(tmp_path, op, inputs, attributes, ops=ops)


def test_unique(tmp_path: Path) -> None:
    values = np.asarray([3, 1, 3, 2, 1], np.float32)
    check(tmp_path, "Unique", [values], outputs=["y", "places", "counts"])


# Products

ROWS = {(0, 0): (2, 3, 4, 5), (0, 1): (2, 3, 5, 4), (1, 0): (4, 2, 3, 5), (1, 1): (5, 2, 3, 4)}
COLUMNS = {(0, 0): (2, 3, 5, 6), (0, 1): (2, 3, 6, 5), (1, 0): (5, 2, 3, 6), (1, 1): (6, 2, 3, 5)}


@pytest.mark.parametrize("left", list(ROWS))
@pytest.mark.parametrize("right", list(COLUMNS))
def test_fused_matmul(left: tuple[int, int], right: tuple[int, int], tmp_path: Path) -> None:
    turned = {"transBatchA": left[0], "transA": left[1], "transBatchB": right[0], "transB": right[1]}
    check(tmp_path, "FusedMatMul", [normal(*ROWS[left]), normal(*COLUMNS[right])], {"alpha": 0.5, **turned})


@pytest.mark.parametrize(
    ("shapes", "attributes"),
    [(((2, 3, 4, 5), (5,)), {"transB": 1}), (((5,), (5, 3)), {"transA": 1}), (((5,), (3, 5)), {"transB": 1})],
)
def test_vectors_are_not_transposed(shapes: Any, attributes: dict[str, int], tmp_path: Path) -> None:
    check(tmp_path, "FusedMatMul", [normal(*shape) for shape in shapes], attributes)


def test_transpose_matmul(tmp_path: Path) -> None:
    attributes = {"transA": 1, "transB": 1, "alpha": 2.0}
    check(tmp_path, "TransposeMatMul", [normal(3, 5, 4), normal(3, 6, 5)], attributes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Relu", ()),
        ("Tanh", ()),
        ("Sigmoid", ()),
        ("Softplus", ()),
        ("Softsign", ()),
        ("LeakyRelu", (0.2,)),
        ("Elu", (0.3,)),
        ("ThresholdedRelu", (0.3,)),
        ("HardSigmoid", (0.3, 0.4)),
    ],
)
def test_fused_gemm(name: str, parameters: tuple[float, ...], tmp_path: Path) -> None:
    given = dict(zip(("activation_alpha", "activation_beta"), parameters))
    attributes = {"activation": name, "alpha": 0.5, "beta": 0.3, "transB": 1, **given}
    check(tmp_path, "FusedGemm", [normal(3, 4), normal(5, 4), normal(5)], attributes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("", []), ("Relu", []), ("Tanh", []), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.6]), ("HardSigmoid", [0.3, 0.4])],
)
@pytest.mark.parametrize("added", [False, True])
def test_fused_conv(name: str, parameters: list[float], added: bool, tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"pads": [1, 1, 1, 1], "strides": [2, 2]}
    attributes |= ({"activation": name} if name else {}) | ({"activation_params": parameters} if parameters else {})
    inputs = [normal(2, 4, 6, 6), normal(4, 2, 3, 3), normal(4), *([normal(2, 4, 3, 3)] if added else [])]
    check(tmp_path, "FusedConv", inputs, {**attributes, "group": 2})


# Norms

X, GAMMA, BETA = normal(2, 3, 8), normal(8), normal(8)


@pytest.mark.parametrize(
    ("inputs", "attributes", "outputs"),
    [
        ([X, normal(2, 3, 8), GAMMA], {}, ["y"]),
        ([X, normal(2, 3, 8), GAMMA, BETA, normal(8)], {"epsilon": 0.1}, ["y", "", "", "sum"]),
        ([X, normal(3, 8), GAMMA, BETA], {}, ["y"]),
        ([X, normal(1, 3, 8), GAMMA, BETA], {"epsilon": 1e-3}, ["y"]),
        ([normal(3, 8), normal(3, 8), GAMMA, None, normal(8)], {}, ["y"]),
    ],
)
def test_skip_layer_norm(inputs: Any, attributes: dict[str, float], outputs: list[str], tmp_path: Path) -> None:
    check(tmp_path, "SkipLayerNormalization", inputs, attributes, outputs=outputs)


@pytest.mark.parametrize("bias", [None, normal(8)])
def test_skip_rms_norm(bias: Any, tmp_path: Path) -> None:
    inputs = [X, normal(2, 3, 8), GAMMA, bias]
    check(tmp_path, "SkipSimplifiedLayerNormalization", inputs, {"epsilon": 0.1}, outputs=["y", "", "", "sum"])


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("LayerNormalization", [X, GAMMA, BETA]),
        ("LayerNormalization", [X, GAMMA]),
        ("SimplifiedLayerNormalization", [X, GAMMA]),
    ],
)
@pytest.mark.parametrize("opset", [12, 16])
def test_norms_of_onnx_before_onnx_had_them(op: str, inputs: Any, opset: int, tmp_path: Path) -> None:
    attributes = {"axis": 2, "epsilon": 0.1}
    check(tmp_path, op, inputs, attributes, domain="", opset=opset)
    wide = [X, normal(3, 8), *([normal(3, 8)] if len(inputs) > 2 else [])]
    check(tmp_path, op, wide, {"axis": 1}, domain="", opset=opset)


def test_the_original_of_such_a_norm_runs_as_it_is(tmp_path: Path) -> None:
    proto, feeds, want = model_of("LayerNormalization", [X, GAMMA, BETA], domain="", opset=12)
    np.testing.assert_array_equal(session(to_bytes(export(loaded(proto, tmp_path)))).run(None, feeds)[0], want[0])


SHOWN = int32([1, 1, 1, 0, 0], [1, 1, 1, 1, 1])
EMBEDDINGS = [below(9, 2, 5), below(2, 2, 5), normal(9, 8), normal(7, 8), normal(2, 8), GAMMA, BETA]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (EMBEDDINGS, ["y", "counts"]),
        ([*EMBEDDINGS, SHOWN], ["y", "counts", "sum"]),
        ([*EMBEDDINGS, None, below(7, 2, 5)], ["y", "counts"]),
        ([EMBEDDINGS[0], None, *EMBEDDINGS[2:4], None, *EMBEDDINGS[5:], SHOWN], ["y", "", "sum"]),
    ],
)
def test_embed_layer_norm(inputs: Any, outputs: list[str], tmp_path: Path) -> None:
    attributes = {"epsilon": 1e-3, "mask_index_type": int("counts" in outputs)}
    check(tmp_path, "EmbedLayerNormalization", inputs, attributes, outputs=outputs)


# What onnxruntime has for other devices only


def test_bias_split_gelu(tmp_path: Path) -> None:
    x, bias = normal(2, 3, 8), normal(8)
    left, right = np.split(x + bias, 2, -1)
    want = left * model_of("Gelu", [right])[2][0]
    np.testing.assert_allclose(canonical("BiasSplitGelu", [x, bias], {}, tmp_path), want, rtol=1e-5, atol=1e-6)


def test_bias_add(tmp_path: Path) -> None:
    x, bias, skip = normal(2, 3, 8), normal(8), normal(2, 3, 8)
    np.testing.assert_allclose(canonical("BiasAdd", [x, bias, skip], {}, tmp_path), x + bias + skip, rtol=1e-6)


def test_gemm_fast_gelu(tmp_path: Path) -> None:
    x, w, bias = normal(2, 3, 8), normal(8, 4), normal(4)
    want = model_of("FastGelu", [x @ w, bias])[2][0]
    np.testing.assert_allclose(canonical("GemmFastGelu", [x, w, bias], {}, tmp_path), want, rtol=1e-5, atol=1e-6)


def test_inside_functions_and_branches(tmp_path: Path) -> None:
    """As torch's exporter leaves functions of other domains, and branches; one of a model in memory."""
    text = """
        <ir_version: 8, opset_import: ["" : 20, "com.microsoft" : 1, "pkg.layer" : 1, "ai.onnx" : 20]>
        g (bool c, float[n, 4] x, float[4] b) => (float[n, 4] y)
        {
            h = pkg.layer.Act (x, b)
            y = If (c) <
                then_branch = t () => (float[n, 4] p) { p = com.microsoft.FusedMatMul <alpha: float = 2.0> (h, w) },
                else_branch = e () => (float[n, 4] q) { q = ai.onnx.Neg (h) }
            >
        }
        <domain: "pkg.layer", opset_import: ["" : 20, "com.microsoft" : 1]>
        Act (a, d) => (r) { r = com.microsoft.BiasGelu (a, d) }
    """
    proto = onnx.parser.parse_model(text)
    w = normal(4, 4)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    model = loaded(proto, tmp_path)
    canonicalize(model)
    assert all(node.domain == "" for node in model.graph.all_nodes())
    x, b = normal(3, 4), normal(4)
    gelu = model_of("BiasGelu", [x, b])[2][0]
    run = session(to_bytes(export(model))).run
    for chosen, want in ((True, gelu @ w * 2), (False, -gelu)):
        got = run(None, {"c": np.asarray(chosen), "x": x, "b": b})[0]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# What is refused


def refusal(op: str, inputs: Any, attributes: dict[str, Any], folder: Path, **form: Any) -> str:
    with pytest.raises(InputError) as caught:
        canonicalize(loaded(model_of(op, inputs, attributes, **form)[0], folder))
    assert caught.value.code == "E-UNSUPPORTED-OP"
    assert "node 'it'" in str(caught.value)
    return str(caught.value)


def test_what_a_rule_does_not_write_is_refused(tmp_path: Path) -> None:
    inputs = [X, normal(2, 3, 8), GAMMA]
    assert "output mean is read" in refusal(
        "SkipLayerNormalization", inputs, {}, tmp_path, outputs=["y", "mean", "", "sum"]
    )


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda node: setattr(node, "op_type", "Magic"), "E-UNSUPPORTED-OP", "com.microsoft::Magic"),
        (lambda node: node.input.append("i0"), "E-FORMAT", "inputs"),
        (lambda node: node.output.append("more"), "E-FORMAT", "outputs"),
        (lambda node: node.input.pop(), "E-FORMAT", "lacks its input B"),
        (lambda node: node.attribute.append(helper.make_attribute("more", 1)), "E-FORMAT", "'more'"),
        (lambda node: node.attribute.append(helper.make_attribute("alpha", "x")), "E-FORMAT", "of another type"),
        (lambda node: setattr(node, "domain", "ai.onnx.ml"), "E-UNSUPPORTED-OP", "classic machine learning"),
        (lambda node: setattr(node, "domain", "com.microsoft.nchwc"), "E-UNSUPPORTED-OP", "ORT_ENABLE_EXTENDED"),
    ],
    ids=["operator", "inputs", "outputs", "missing", "attribute", "type", "domain", "machine"],
)
def test_a_node_that_cannot_be(change: Any, code: str, word: str, tmp_path: Path) -> None:
    proto, _, _ = model_of("FusedMatMul", [normal(2, 4), normal(4, 3)])
    change(proto.graph.node[0])
    if proto.graph.node[0].domain != DOMAIN:
        proto.opset_import.append(helper.make_opsetid(proto.graph.node[0].domain, 1))
    with pytest.raises(InputError) as caught:
        loaded(proto, tmp_path)
    assert caught.value.code == code
    assert word in str(caught.value)
