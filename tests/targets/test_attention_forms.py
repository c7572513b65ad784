"""Every form of Attention, compiled, means what ONNX's reference says."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.ir import attentions
from tests.targets.running import built, execute, reference
from xopt import targets
from xopt.errors import InputError
from xopt.ir.canonical import canonicalize
from xopt.targets.lowering import lower

GROUPS = [list(attentions.CASES)[start::2] for start in range(2)]


def together(names: list[str], flat: bool, grouped: bool) -> tuple[ir.Model, dict[str, np.ndarray], list[np.ndarray]]:
    """One model of several nodes, each with inputs and outputs of its own: they are compiled at once."""
    nodes, inputs, outputs, feeds, want = [], [], [], {}, []
    for name in names:
        attributes, given = attentions.CASES[name]
        one = attentions.model(attributes, given, flat=flat, grouped=grouped)
        drawn = attentions.feeds(one, given)
        want += reference(one, drawn)
        for value in one.graph.inputs:
            feeds[f"{name}.{value.name}"] = drawn[value.name or ""]
            value.name = f"{name}.{value.name}"
        inputs += list(one.graph.inputs)
        outputs += list(one.graph.outputs)
        for node in list(one.graph):
            node.name = name
            one.graph.remove(node)
            nodes.append(node)
        one.graph.inputs.clear()
        one.graph.outputs.clear()
    for index, value in enumerate(outputs):
        value.name = f"y{index}"
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 25}, name="many")
    return ir.Model(graph, ir_version=11), feeds, want


@pytest.mark.parametrize("names", GROUPS)
@pytest.mark.parametrize(("flat", "grouped"), [(True, False), (False, True)])
def test_forms(names: list[str], flat: bool, grouped: bool) -> None:
    model, feeds, want = together(names, flat, grouped)
    canonicalize(model)
    got = built(lower(model, targets.get("cpu")))(feeds)
    labels = [f"{node.name} {place}" for node in model.graph for place, _ in enumerate(node.outputs)]
    for label, mine, its in zip(labels, got, want, strict=False):
        np.testing.assert_allclose(mine, its, rtol=2e-5, atol=2e-6, err_msg=label)


@pytest.mark.parametrize(
    ("attributes", "given", "why"),
    [
        ({"left_window_size": -2}, {}, "window"),
        ({"softmax_precision": 7}, {}, "softmax"),
        ({}, {**attentions.past(2), "nonpad_kv_seqlen": np.array([2, 2])}, "together"),
        ({}, {"attn_mask": attentions.mask(attentions.QUERIES, attentions.KEYS + 1)}, "longer"),
        ({"sinks": 1}, {}, "sinks"),
    ],
)
def test_refused(attributes: dict[str, int], given: attentions.Feeds, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        lower(attentions.model(attributes, given, flat=True, grouped=False), targets.get("cpu"))
    assert caught.value.code == "E-UNSUPPORTED-OP"


def test_scores_changed_by_a_graph_inside() -> None:
    text = """<ir_version: 13, opset_import: ["": 26, "ai.onnx.preview": 1]>
    g (float[2, 4, 3, 8] q, float[2, 2, 5, 8] k, float[2, 2, 5, 6] v) => (float[2, 4, 3, 6] y) {
        y = ai.onnx.preview.FlexAttention <
            score_mod: graph = capped (float[B, H, L, S] s) => (float[B, H, L, S] t) {
                cap = Constant <value: tensor = float {0.5}> () a = Div (s, cap) b = Tanh (a) t = Mul (b, cap)
            }
        > (q, k, v)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    canonicalize(model)
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)))
    scores = 0.5 * np.tanh(q @ np.repeat(k, 2, 1).swapaxes(2, 3) / np.sqrt(8) / 0.5)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    (got,) = execute(lower(model, targets.get("cpu")), {"q": q, "k": k, "v": v})
    np.testing.assert_allclose(got, weights @ np.repeat(v, 2, 1), rtol=1e-5, atol=1e-6)
