"""Which tokens of calibration samples count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ir import builders
from xopt.data.dataset import Dataset
from xopt.ir.fx import run_with_values, to_fx
from xopt.ir.shapes import bind_dims
from xopt.recover.samples import _attended, batches


def test_padding_is_read_off_every_form_of_mask() -> None:
    """Left and right padding, as a mask of keys, and with the causal mask in it, where queries see no key."""
    keys = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    lowest = torch.finfo(torch.float32).min
    causal = torch.ones(5, 5, dtype=torch.bool).tril() & keys[:, None, None]
    for shown in (keys[:, None, None], causal):
        assert torch.equal(_attended(shown), keys)
        assert torch.equal(_attended(torch.where(shown, 0.0, lowest)), keys)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_fixed_batch_gives_the_tokens_of_an_open_one(batch: int) -> None:
    """Seven samples with padding; what fills up the last run does not count."""
    open_ = builders.bert(layers=1)
    data = Dataset(builders.feeds(open_, {"batch": 7}))
    name = "layers.0.ffn.act_out"
    found = []
    for model in (open_, bind_dims(open_, {"batch": batch})):
        view = to_fx(model)
        rows = [b.rows(name, run_with_values(view, b.feeds, [name])[name]) for b in batches(model, view, data)]
        found.append(np.sort(torch.cat(rows).detach().numpy(), axis=0))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
