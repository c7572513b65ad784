"""Loops of compiled code: its body is called once for each iteration, which an interrupt ends.

Bodies are functions of the module that runs; its machine is that of the session whose run this thread is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from xopt.runtime.arrays import aligned_copy, as_tensor
from xopt.runtime.serving import session

REFUSAL = "xopt refuses: "
"""What the message of a check in compiled code starts with."""
CHECKED = 64
"""Iterations after which free memory is asked for again."""


def register(runtime: Any) -> None:
    """Make what compiled code calls known to TVM's runtime (``tvm_ffi``)."""
    runtime.register_global_func("xopt.loop", _loop, override=True)


def _loop(
    name: str,
    trips: Any,
    going: Any,
    given: Sequence[Any],
    states: Sequence[Any],
    empty: Sequence[Any],
    dtypes: str,
) -> list[Any]:
    """The states after the last iteration, then what the iterations gave, stacked.

    Args:
        name: of the body: (given ..., step, going, states ...) -> (going, states ..., to stack ...).
        trips: int64 tensor of one number: iterations at most.
        going: bool tensor of one value: whether to begin.
        given: what every iteration takes.
        states: what the first iteration takes.
        empty: shapes of what is stacked when there is no iteration.
        dtypes: of what is stacked, by spaces.
    """
    body, most = session().machine[name], int(_one(trips))
    now = list(states)
    count, stacks = len(now), [list[Any]() for _ in empty]
    step = 0
    while step < most and _one(going):
        going, *results = body(*given, _tensor(np.array(step, np.int64)), _tensor(np.array(True)), *now)
        now, new = results[:count], results[count:]
        for stack, element in zip(stacks, new):
            stack.append(np.from_dlpack(element))
        if step % CHECKED == 0 and stacks:
            _check_memory(stacks)
        step += 1
    kinds = dtypes.split()
    return now + [_stacked(*one) for one in zip(stacks, empty, kinds)]


def _one(tensor: Any) -> Any:
    return np.from_dlpack(tensor).reshape(-1)[0]


def _check_memory(stacks: Sequence[Sequence[Any]]) -> None:
    """Refuse to go on when what has been stacked, twice over, would no longer fit."""
    held = sum(len(stack) * stack[-1].nbytes for stack in stacks)
    if held > psutil.virtual_memory().available // 2:
        raise ValueError(f"{REFUSAL}what a loop gives does not fit into memory")


def _stacked(elements: Sequence[Any], empty: Sequence[int], dtype: str) -> Any:
    """What the iterations gave along a new first axis."""
    if not elements:
        return _tensor(np.zeros((0, *(int(dim) for dim in empty)), dtype))
    if any(element.shape != elements[0].shape for element in elements):
        raise ValueError(f"{REFUSAL}the iterations of a loop give results of different shapes")
    return _tensor(np.stack(elements))


def _tensor(array: Any) -> Any:
    """An array as the runtime's tensor, in memory that lies as its own does."""
    return as_tensor(aligned_copy(array))
