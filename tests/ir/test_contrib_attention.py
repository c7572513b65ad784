"""Attention of ``com.microsoft`` in all its layouts, with masks, biases and pasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ir.contrib import RANDOM, below, check, int32, int64, loaded, model_of, normal
from xopt.errors import InputError
from xopt.ir import canonicalize

B, S, L, P, N, H = 2, 5, 7, 3, 2, 8
D = N * H
SHOWN = int32([1, 1, 1, 0, 0], [1, 1, 1, 1, 1])
BEFORE = np.concatenate([np.ones((B, P), np.int32), SHOWN], 1)
MASKS = {
    "none": None,
    "keys": SHOWN,
    "nothing": 0 * SHOWN,
    "pairs": RANDOM.integers(0, 2, (B, S, S)).astype(np.int32),
    "ends": int32(3, 5),
    "ends-starts": int32(3, 5, 1, 2),
}
PROJECTION = [normal(B, S, 12), normal(12, 3 * D) * np.float32(0.3), normal(3 * D)]


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(mask: str, causal: int, tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"num_heads": N, "unidirectional": causal}
    form = {"constants": (1, 2), "fixed": (0, 3) if mask == "ends-starts" else ()}
    check(tmp_path, "Attention", [*PROJECTION, MASKS[mask]], attributes, **form)
    attributes |= {"mask_filter_value": -5.0, "scale": 0.2}
    check(tmp_path, "Attention", [*PROJECTION, MASKS[mask]], attributes, **form)


@pytest.mark.parametrize("bias", [(1, N, S, S), (B, 1, S, S)])
def test_attention_with_a_bias(bias: tuple[int, ...], tmp_path: Path) -> None:
    inputs = [*PROJECTION, SHOWN, None, normal(*bias)]
    check(tmp_path, "Attention", inputs, {"num_heads": N, "unidirectional": 1}, constants=(1, 2))


def test_values_of_another_width(tmp_path: Path) -> None:
    inputs = [PROJECTION[0], normal(12, D + D + N * 4), normal(D + D + N * 4)]
    attributes = {"num_heads": N, "qkv_hidden_sizes": [D, D, N * 4]}
    check(
        tmp_path, "Attention", inputs, attributes, fixed=(1,), ops={"MatMul": 1, "Add": 1, "Split": 1, "Attention": 1}
    )


@pytest.mark.parametrize("mask", [None, BEFORE, int32(6, 8)], ids=["none", "keys", "ends"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("length", [1, S])
def test_attention_with_a_past(mask: Any, causal: int, length: int, tmp_path: Path) -> None:
    if mask is not None and mask.ndim == 2:
        mask = mask[:, : P + length]
    inputs = [PROJECTION[0][:, :length], *PROJECTION[1:], mask, normal(2, B, N, P, H)]
    attributes = {"num_heads": N, "unidirectional": causal}
    check(tmp_path, "Attention", inputs, attributes, constants=(1, 2), outputs=["y", "present"])


def test_the_present_without_a_past(tmp_path: Path) -> None:
    check(tmp_path, "Attention", PROJECTION, {"num_heads": N}, constants=(1, 2), outputs=["y", "present"])


@pytest.mark.parametrize(
    ("attributes", "word"),
    [({"do_rotary": 1}, "do_rotary is 1"), ({"past_present_share_buffer": 1}, "past_present_share_buffer is 1")],
)
def test_attention_that_is_refused(attributes: dict[str, int], word: str, tmp_path: Path) -> None:
    proto, _, _ = model_of("Attention", PROJECTION, {"num_heads": N}, constants=(1, 2))
    from onnx import helper

    proto.graph.node[0].attribute.extend(helper.make_attribute(*item) for item in attributes.items())
    with pytest.raises(InputError, match=word):
        canonicalize(loaded(proto, tmp_path))


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_heads_that_cannot_be(heads: int, tmp_path: Path) -> None:
    proto, _, _ = model_of("Attention", PROJECTION, {"num_heads": N}, constants=(1, 2))
    proto.graph.node[0].attribute[0].i = heads
    with pytest.raises(InputError, match="heads"):
        canonicalize(loaded(proto, tmp_path))


# Several operands

Q, K, V, BIAS = normal(B, S, D), normal(B, L, D), normal(B, L, D), normal(3 * D)
PAST = [normal(B, N, P, H), normal(B, N, P, H)]
HEADS = {"num_heads": N}


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "biased"])
@pytest.mark.parametrize(
    "mask",
    [None, below(2, B, L), below(2, B, S, L), int32(4, 7)],
    ids=["none", "keys", "pairs", "ends"],
)
def test_multi_head_attention(bias: Any, mask: Any, tmp_path: Path) -> None:
    inputs, form = [Q, K, V, bias, mask], {"fixed": (0, 4) if mask is not None and mask.ndim == 1 else ()}
    check(tmp_path, "MultiHeadAttention", inputs, HEADS, **form)
    attributes = {**HEADS, "mask_filter_value": -3.0, "scale": 0.1}
    check(tmp_path, "MultiHeadAttention", inputs, attributes, constants=(3,), **form)


@pytest.mark.parametrize("bias", [(1, 1, S, L), (B, N, S, L)])
def test_a_bias_of_the_scores(bias: tuple[int, ...], tmp_path: Path) -> None:
    check(tmp_path, "MultiHeadAttention", [Q, K, V, None, below(2, B, L), normal(*bias)], HEADS)


def test_wide_heads_of_values(tmp_path: Path) -> None:
    inputs = [Q, K, normal(B, L, N * 4), normal(D + D + N * 4)]
    check(tmp_path, "MultiHeadAttention", inputs, HEADS)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "biased"])
def test_cached_keys_of_another_stream(bias: Any, tmp_path: Path) -> None:
    inputs = [Q, normal(B, N, L, H), normal(B, N, L, H), bias, below(2, B, L)]
    check(tmp_path, "MultiHeadAttention", inputs, HEADS)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [None, BEFORE], ids=["none", "keys"])
@pytest.mark.parametrize("bias", [None, normal(1, N, S, P + S)], ids=["plain", "biased"])
def test_a_past_of_keys_and_values(causal: int, mask: Any, bias: Any, tmp_path: Path) -> None:
    inputs = [normal(B, S, D), normal(B, S, D), normal(B, S, D), BIAS, mask, bias, *PAST]
    attributes = {**HEADS, "unidirectional": causal}
    check(tmp_path, "MultiHeadAttention", inputs, attributes, outputs=["y", "keys", "values"])


def test_present_keys_and_values_without_past_ones(tmp_path: Path) -> None:
    inputs = [normal(B, S, D), normal(B, S, D), normal(B, S, D), BIAS]
    attributes = {**HEADS, "unidirectional": 1}
    check(tmp_path, "MultiHeadAttention", inputs, attributes, outputs=["y", "keys", "values"])


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "biased"])
@pytest.mark.parametrize("keys_only", [False, True])
def test_packed_operands(bias: Any, keys_only: bool, tmp_path: Path) -> None:
    """onnxruntime has no kernel for these on the CPU; it has one for the same operands apart."""
    from onnx import helper

    from tests.ir.contrib import session
    from xopt.ir import export
    from xopt.ir.io import to_bytes

    length = L if keys_only else S
    q, k, v = normal(B, S, N, H), normal(B, length, N, H), normal(B, length, N, H)
    apart = [x.reshape(B, -1, D) for x in (q, k, v)]
    proto, _, want = model_of("MultiHeadAttention", [*apart, bias], HEADS)
    packed = [apart[0], np.stack([k, v], 3)] if keys_only else [np.stack([q, k, v], 3)]
    del proto.graph.input[:]
    feeds = {f"i{place}": array for place, array in enumerate(packed)} | ({} if bias is None else {"i3": bias})
    proto.graph.input.extend(helper.make_tensor_value_info(name, 1, array.shape) for name, array in feeds.items())
    inputs = [*feeds, "", ""] if bias is None else [*list(feeds)[:-1], *[""] * (4 - len(feeds)), "i3"]
    del proto.graph.node[0].input[:]
    proto.graph.node[0].input.extend(inputs)
    model = loaded(proto, tmp_path)
    canonicalize(model)
    (got,) = session(to_bytes(export(model))).run(None, feeds)
    np.testing.assert_allclose(got, want[0], rtol=1e-5, atol=1e-5)


# Grouped queries over a cache

GROUPS, SIZE = 2, 16
TABLES = [normal(40, SIZE // 2), normal(40, SIZE // 2)]


def grouped(
    folder: Path,
    length: int,
    past: int | None,
    filled: list[int],
    *,
    packed: bool = False,
    more: dict[int, np.ndarray] | None = None,
    **attributes: Any,
) -> None:
    """Check an attention of ``length`` new tokens whose samples have ``filled`` keys, the new ones among them."""
    batch, heads = len(filled), 4
    q, k, v = (normal(batch, length, count * SIZE) for count in (heads, GROUPS, GROUPS))
    inputs: list[Any] = [np.concatenate([q, k, v], -1), None, None] if packed else [q, k, v]
    inputs += [None, None] if past is None else [normal(batch, GROUPS, past, SIZE) for _ in range(2)]
    inputs += [np.asarray(filled, np.int32) - 1, int32(max(filled))]
    inputs += [*(TABLES if attributes.get("do_rotary") else [None, None]), None, None, None]
    for place, array in (more or {}).items():
        inputs[place] = array

    def shown(array: np.ndarray, place: int) -> np.ndarray:
        """Without what padding computes."""
        whole = array.copy()
        for sample, end in enumerate(filled):
            if place:
                whole[sample, :, end:] = 0
            elif length == max(filled):
                whole[sample, end:] = 0
        return whole

    while inputs[-1] is None:
        inputs.pop()
    attributes = {"num_heads": heads, "kv_num_heads": GROUPS, **attributes}
    outputs = ["y", "keys", "values"]
    check(folder, "GroupQueryAttention", inputs, attributes, outputs=outputs, shown=shown)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", [0, 1])
@pytest.mark.parametrize(
    ("length", "past", "filled"),
    [
        (5, None, [5, 5]),
        (5, 0, [3, 5]),
        (5, 8, [5, 5]),
        (1, 6, [7, 7]),
        (1, 8, [4, 7]),
        (3, 6, [9]),
    ],
)
def test_grouped_queries(packed: bool, rotary: int, length: int, past: Any, filled: list[int], tmp_path: Path) -> None:
    grouped(tmp_path, length, past, filled, packed=packed, do_rotary=rotary)


@pytest.mark.parametrize(
    "attributes",
    [
        {"local_window_size": 3},
        {"softcap": 2.0},
        {"scale": 0.3},
        {"smooth_softmax": 1},
        {"do_rotary": 1, "rotary_interleaved": 1},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_attributes_of_grouped_queries(attributes: dict[str, Any], tmp_path: Path) -> None:
    grouped(tmp_path, 5, 0, [5, 5], **attributes)
    grouped(tmp_path, 1, 6, [4, 7], **attributes)
    grouped(tmp_path, 3, 6, [9], **attributes)


def test_sinks_and_biases(tmp_path: Path) -> None:
    grouped(tmp_path, 1, 6, [4, 7], more={11: normal(4)})
    grouped(tmp_path, 3, 6, [9], more={11: normal(4), 10: normal(1, 1, 3, 9)})
    grouped(tmp_path, 1, 6, [7, 7], more={10: normal(2, 4, 1, 7)})


@pytest.mark.parametrize(("length", "past", "filled"), [(5, 0, [5, 5]), (1, 6, [7, 7])])
def test_positions_of_the_tokens(length: int, past: int, filled: list[int], tmp_path: Path) -> None:
    more = {9: below(12, len(filled), length, dtype=np.int64)}
    grouped(tmp_path, length, past, filled, more=more, do_rotary=1)


# Rotary embeddings


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", [int64(3), below(12, B, S, dtype=np.int64)], ids=["first", "each"])
@pytest.mark.parametrize("shape", [(B, S, 4 * SIZE), (B, 4, S, SIZE)])
@pytest.mark.parametrize("part", [SIZE, 4])
def test_rotary(interleaved: int, positions: Any, shape: tuple[int, ...], part: int, tmp_path: Path) -> None:
    inputs = [normal(*shape), positions, *(table[:, : part // 2] for table in TABLES)]
    attributes = {"interleaved": interleaved}
    attributes |= {} if part == SIZE else {"num_heads": 4, "rotary_embedding_dim": part}
    check(tmp_path, "RotaryEmbedding", inputs, attributes, fixed=(1,))


# One query for each sample

LAST = [normal(2, 1, 24) for _ in "qkv"]
BUFFERS = [normal(2, 3, 7, 8) for _ in "kv"]
USED = np.int32([4])


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([*LAST, None, None, *BUFFERS, USED], ["y", "k", "v"]),
        ([*LAST, int32([0, 1, 1, 1, 1], [1, 1, 1, 1, 1]), None, *BUFFERS, USED], ["y", "k", "v"]),
        ([*LAST, None, normal(1, 3, 1, 5), *BUFFERS, USED], ["y", "k", "v"]),
        ([*LAST, None, None, *BUFFERS, USED, None, None, normal(72)], ["y", "k", "v"]),
        ([LAST[0], *BUFFERS], ["y"]),
        ([LAST[0], *BUFFERS, below(2, 2, 7)], ["y"]),
    ],
)
def test_decoder_masked(inputs: Any, outputs: list[str], tmp_path: Path) -> None:
    """Caches are buffers, of which what is written is compared."""
    attributes = {"num_heads": 3, "past_present_share_buffer": int(len(outputs) > 1)}
    written = lambda array, place: array[:, :, :5] if place else array  # noqa: E731
    check(
        tmp_path, "DecoderMaskedMultiHeadAttention", inputs, attributes, outputs=outputs, shown=written,
        fixed=range(11), tolerance=1e-4,
    )  # fmt: skip
