"""Forms of the operator Attention, as models of one node with inputs that suit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

BATCH, QUERIES, KEYS, WIDTH = 2, 3, 5, 4
OPTIONAL = ("attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
Feeds = dict[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def mask(*shape: int) -> np.ndarray:
    """Booleans, about one third of them false, the first row all false."""
    found = np.random.default_rng(len(shape)).random(shape) > 0.35
    found.reshape(-1, shape[-1])[0] = False
    return found


def hidden(*shape: int) -> np.ndarray:
    """An additive mask with -inf in it."""
    return np.where(mask(*shape), normal(*shape), -np.inf).astype(np.float32)


def past(length: int) -> Feeds:
    return {name: normal(BATCH, 2, length, WIDTH) + n for n, name in enumerate(("past_key", "past_value"))}


CASES: dict[str, tuple[dict[str, Any], Feeds]] = {
    "plain": ({}, {}),
    "causal": ({"is_causal": 1}, {}),
    "causal-past": ({"is_causal": 1}, past(4)),
    "causal-no-past-yet": ({"is_causal": 1}, past(1)),
    "left-window": ({"left_window_size": 1}, {}),
    "both-windows": ({"left_window_size": 1, "right_window_size": 0}, {}),
    "window-past-causal": ({"left_window_size": 2, "right_window_size": 4, "is_causal": 1}, past(2)),
    "filled": ({}, {"nonpad_kv_seqlen": np.array([2, 5])}),
    "filled-causal": ({"is_causal": 1}, {"nonpad_kv_seqlen": np.array([1, 4])}),
    "filled-window": ({"left_window_size": 1}, {"nonpad_kv_seqlen": np.array([3, 5])}),
    "softcap-scale": ({"softcap": 0.5, "scale": 0.3}, {}),
    "double-softmax": ({"softmax_precision": 11}, {}),
    "mask-1": ({}, {"attn_mask": mask(KEYS)}),
    "mask-2-short": ({}, {"attn_mask": mask(QUERIES, 3)}),
    "mask-3-of-heads": ({"is_causal": 1}, {"attn_mask": mask(2, QUERIES, KEYS)}),
    "mask-4-causal-window": ({"is_causal": 1, "left_window_size": 1}, {"attn_mask": mask(BATCH, 1, 1, KEYS)}),
    "mask-of-one-key": ({}, {"attn_mask": np.ones((QUERIES, 1), bool)}),
    "added-short": ({}, {"attn_mask": hidden(QUERIES, 4)}),
    "added-4": ({}, {"attn_mask": hidden(BATCH, 2, QUERIES, KEYS)}),
    "added-past": ({"is_causal": 1}, {"attn_mask": hidden(QUERIES, KEYS + 2), **past(2)}),
    "scores-0": ({"qk_matmul_output_mode": 0, "is_causal": 1}, {"attn_mask": mask(QUERIES, KEYS)}),
    **{f"scores-{mode}": ({"qk_matmul_output_mode": mode, "softcap": 2.0, "is_causal": 1},
                          {"attn_mask": mask(QUERIES, KEYS)}) for mode in range(1, 4)},
}  # fmt: skip


def model(attributes: Mapping[str, Any], given: Feeds, *, flat: bool, grouped: bool, opset: int = 25) -> ir.Model:
    """Attention of 2 query heads over 2 key heads, or one; all outputs are the model's where they make sense."""
    shared, given = 1 if grouped else 2, fitting(given, grouped)
    if flat:
        attributes = {**attributes, "q_num_heads": 2, "kv_num_heads": shared}
    width = shared * WIDTH
    shapes: dict[str, Sequence[int]] = (
        {"Q": (BATCH, QUERIES, 2 * WIDTH), "K": (BATCH, KEYS, width), "V": (BATCH, KEYS, width)}
        if flat
        else {"Q": (BATCH, 2, QUERIES, WIDTH), "K": (BATCH, shared, KEYS, WIDTH), "V": (BATCH, shared, KEYS, WIDTH)}
    )
    values: list[ir.Value | None] = [_value(name, shape, np.float32) for name, shape in shapes.items()]
    values += [_value(n, given[n].shape, given[n].dtype) if n in given else None for n in OPTIONAL]
    while values[-1] is None:
        values.pop()
    count = 4 if "qk_matmul_output_mode" in attributes else 3 if "past_key" in given else 1
    node = ir.node("Attention", values, attributes=dict(attributes), num_outputs=count, name="tested")
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
    inputs = [value for value in values if value is not None]
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset}, name="one")
    return ir.Model(graph, ir_version=11)


def fitting(given: Feeds, grouped: bool) -> Feeds:
    """The past of as many key heads as there are."""
    return {name: array[:, :1] if grouped and name.startswith("past") else array for name, array in given.items()}


def _value(name: str, shape: Sequence[int], dtype: Any) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=kind)


def feeds(of: ir.Model, given: Feeds) -> Feeds:
    """Numbers for all inputs."""
    given = fitting(given, any(v.shape[1] == 1 for v in of.graph.inputs if v.name == "past_key"))  # type: ignore[index]
    drawn = {v.name or "": normal(*v.shape) for v in of.graph.inputs if v.name not in given}  # type: ignore[misc]
    return {**drawn, **given}
