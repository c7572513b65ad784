"""Which tokens of calibration samples count."""

from __future__ import annotations

import torch

from xopt.recover.samples import _attended


def test_padding_is_read_off_every_form_of_mask() -> None:
    """Left and right padding, as a mask of keys, and with the causal mask in it, where queries see no key."""
    keys = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    lowest = torch.finfo(torch.float32).min
    causal = torch.ones(5, 5, dtype=torch.bool).tril() & keys[:, None, None]
    for shown in (keys[:, None, None], causal):
        assert torch.equal(_attended(shown), keys)
        assert torch.equal(_attended(torch.where(shown, 0.0, lowest)), keys)
