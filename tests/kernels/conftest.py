"""Compile each kernel once a session and call it with numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")

Kernel = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Kernel]:
    """``compiled(family, workload, isa, config=None)(*inputs, out=shape)`` runs a kernel for this machine."""
    import tvm

    from xopt.kernels import emit

    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 2})
    cache: dict[str, Any] = {}

    def get(family: ModuleType, workload: Any, isa: Any, config: Any = None) -> Kernel:
        config = config or family.heuristic(workload, isa)
        name = family.name(workload, config, isa)
        if name not in cache:
            cache[name] = emit.compiled(family.build(workload, config, isa), target)
        function = cache[name]

        def run(*inputs: np.ndarray, out: list[tuple[int, ...]], dtypes: Sequence[str] = ()) -> list[np.ndarray]:
            # A value that no kernel writes by chance: an element left out is seen.
            kinds = dtypes or ["float32"] * len(out)
            outputs = [tvm.runtime.tensor(np.full(shape, 123, dtype)) for shape, dtype in zip(out, kinds, strict=True)]
            function(*(tvm.runtime.tensor(array) for array in inputs), *outputs)
            return [output.numpy() for output in outputs]

        return run

    return get
