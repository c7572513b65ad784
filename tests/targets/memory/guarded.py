"""Run by a test in a process of its own, under guard.c: every kernel that indexes, with valid and with hostile indices.

Prints how many runs there were; a read or write outside of a tensor kills the process.
"""

from __future__ import annotations

import sys

import numpy as np
import tvm
from tvm import relax, te

from tests.targets.test_indices import CASES, Case, outside
from xopt import targets
from xopt.targets.lowering import lower

TRIALS = 40


def machine(case: Case) -> relax.VirtualMachine:
    """The model of a case on the processor, each tensor allocated by itself."""
    target = targets.get("cpu")
    with target.tvm_target():
        module = target.pipeline()(lower(case.model(), target).module)
        executable = relax.build(module, target.tvm_target(), relax_pipeline=None)
    return relax.VirtualMachine(executable, tvm.cpu(), memory_cfg="naive")


def attack(case: Case) -> int:
    """Run a case with valid indices, and with one or all of them outside; returns the number of runs."""
    main, random = machine(case)["main"], np.random.default_rng(CASES.index(case))
    refused = 0
    for trial in range(TRIALS):
        feeds, extents = case.feeds(random)
        indices = feeds["x1"]
        if trial % 2:
            hostile = random.choice(outside(extents[0], case.kind), indices.shape).astype(indices.dtype)
            chosen = random.random(indices.shape) < (1 if trial % 4 == 1 else 0.2)
            feeds["x1"] = np.where(chosen, hostile, indices)
        try:
            main(*(tvm.runtime.tensor(feeds[name]) for name in sorted(feeds)), [])
        except ValueError:
            refused += 1
    assert refused >= TRIALS // 4, f"{case}: only {refused} refused"
    return TRIALS


def overrun() -> None:
    """A kernel that reads and writes a page too far, to show that it is noticed."""
    x = te.placeholder((64,), "float32")
    y = te.compute((64,), lambda i: x[i + 1024])
    with targets.get("cpu").tvm_target() as target:
        function = tvm.compile(te.create_prim_func([x, y]).with_attr("global_symbol", "bad"), target)
    function["bad"](*(tvm.runtime.tensor(np.zeros(64, np.float32)) for _ in range(2)))


if __name__ == "__main__":
    if sys.argv[1:] == ["overrun"]:
        overrun()
    print(sum(map(attack, CASES)) if not sys.argv[1:] else "not noticed")
