"""What the tests of prune-heads share: runs under verification, and small models that are worth pruning."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from tests.ir import builders
from xopt.data.dataset import Dataset
from xopt.passes import PruneHeads
from xopt.pipeline.base import PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach


def samples(model: ir.Model, count: int = 24, seed: int = 0) -> Dataset:
    return Dataset(builders.feeds(model, {"batch": count}, seed))


def run(
    model: ir.Model, data: Dataset | None = None, *, context: PassContext | None = None, **options: Any
) -> PassReport:
    context = context or PassContext()
    context.calibration = data or samples(model)
    (step,) = PassManager([PruneHeads(**options)], instruments=[VerifyEach()]).run(model, context)
    return step.report


def kept(report: PassReport, kind: str) -> list[int]:
    return [int(count) for count in str(report.numbers[f"{kind}_kept"]).split()]


def array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def write(value: ir.Value | None, data: np.ndarray) -> None:
    assert value is not None and value.const_value is not None
    value.const_value = ir.tensor(data.astype(value.const_value.numpy().dtype), name=value.name)
