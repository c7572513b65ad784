"""A padded batch as several that are padded less: the best that a runtime without `remove-padding` can do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xopt.measure.isolated import Factory
from xopt.measure.latency import Runner


def sorted_by_length(factory: Factory, part: int) -> Runner:
    """Run a batch sorted by length, ``part`` sentences at a time; results come back in the batch's order and shape."""
    run = factory()

    def whole(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        lengths = feeds["attention_mask"].sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        tokens = None
        for start in range(0, len(order), part):
            rows = order[start : start + part]
            longest = int(lengths[rows].max())
            outputs = run({name: np.ascontiguousarray(array[rows, :longest]) for name, array in feeds.items()})
            found = outputs["last_hidden_state"]
            if tokens is None:
                tokens = np.zeros((*feeds["input_ids"].shape, found.shape[-1]), np.float32)
            tokens[rows, :longest] = found
        assert tokens is not None
        return {"last_hidden_state": tokens}

    return whole
