"""What holds for every exact pass, checked on any model."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from tests.ir import builders
from xopt.data.dataset import Dataset
from xopt.pipeline import text
from xopt.pipeline.base import Pass, PassReport
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach


def run_unseen(one: Pass, model: ir.Model) -> PassReport:
    """Run without verification."""
    (step,) = PassManager([one], instruments=[]).run(model, PassContext())
    return step.report


def fingerprint(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(one: Pass, model: ir.Model) -> PassReport:
    """Run under verification on inputs that have padding where the model has a mask."""
    context = PassContext(calibration=Dataset(builders.feeds(model, {"batch": 4})))
    (step,) = PassManager([one], instruments=[VerifyEach()]).run(model, context)
    return step.report


def check_laws(one: Pass, model: ir.Model) -> PassReport:
    """Exact, deterministic, idempotent, options round-trip; returns the report of the first run."""
    twin = model.clone()
    report = run(one, model)
    run_unseen(one, twin)
    assert fingerprint(model) == fingerprint(twin), "two runs differ"
    again = run_unseen(one, model)
    assert again.rewritten == 0, "not idempotent"
    assert fingerprint(model) == fingerprint(twin), "a second run changed the graph"
    assert text.parse(text.render([one])) == [one]
    assert text.from_yaml(text.to_yaml([one])) == [one]
    return report
