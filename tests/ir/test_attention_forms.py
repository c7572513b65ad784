"""Every form of Attention means what ONNX's reference says: as torch functions, and written out for onnxruntime.

Written out, a row all of whose keys an additive mask hides is what a softmax makes of it: NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.ir import attentions
from tests.targets.running import onnxruntime, reference
from xopt.ir.exporting import export
from xopt.ir.fx import to_fx
from xopt.ir.structure import attention_problem

SIDES = [(True, False), (False, True)]


@pytest.mark.parametrize(("attributes", "given"), attentions.CASES.values(), ids=attentions.CASES)
@pytest.mark.parametrize(("flat", "grouped"), SIDES)
def test_forms(attributes: dict[str, Any], given: attentions.Feeds, flat: bool, grouped: bool) -> None:
    model = attentions.model(attributes, given, flat=flat, grouped=grouped)
    feeds = attentions.feeds(model, given)
    want = reference(model, feeds)

    module = to_fx(model)
    tensors = {module.meta["inputs"][name]: torch.from_numpy(array) for name, array in feeds.items()}
    ours = module(**tensors)
    written = export(model)
    theirs = onnxruntime(written)(feeds)
    assert not any(node.op_type == "Attention" for node in written.graph)
    for index, expected in enumerate(want):
        np.testing.assert_allclose(ours[f"y{index}"].detach().numpy(), expected, rtol=2e-5, atol=2e-6)
        rows = np.isnan(theirs[index]) & (expected == 0) & ("attn_mask" in given and set(given) == {"attn_mask"})
        np.testing.assert_allclose(np.where(rows, 0, theirs[index]), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("causal", None), ("mask-3-of-heads", None), ("softcap-scale", None),
        ("causal-past", "attention-with-past_key"), ("left-window", "attention-with-left_window_size"),
        ("filled", "attention-with-nonpad_kv_seqlen"), ("double-softmax", "attention-with-softmax_precision"),
        ("mask-2-short", "attention-with-short-mask"), ("scores-3", "attention-with-present_key"),
    ],
)  # fmt: skip
def test_passes_are_told_what_they_do_not_know(name: str, problem: str | None) -> None:
    model = attentions.model(*attentions.CASES[name], flat=True, grouped=False)
    node = next(node for node in model.graph if isinstance(node, ir.Node))
    assert attention_problem(node) == problem
