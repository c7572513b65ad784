"""Run the written ONNX file, and compare it with the compiled artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xopt.errors import VerificationError
from xopt.measure.peers import onnxruntime_runner
from xopt.pipeline.verify import compare, least_cosine, rounding_bound

if TYPE_CHECKING:
    from xopt.search.job import Job
    from xopt.search.lab import Candidate


LOW_PRECISION_COSINE = 0.99
"""Least cosine where the compiled model multiplies in bfloat16, and model.onnx in float32."""


def prove(path: Path, best: Candidate, job: Job) -> dict[str, Any]:
    """Largest difference of the two on the timed feeds; VerificationError E-VERIFY where rounding does not explain it.

    Where the target cannot run here, only that the file runs.
    """
    plain = onnxruntime_runner(path, job.threads)(job.feeds)
    if best.runner is None:
        finite = all(np.isfinite(array).all() for array in plain.values() if array.dtype.kind == "f")
        return {"compared": False, "reason": f"{job.target.name} does not run here", "finite": bool(finite)}
    changes = compare([dict(plain)], [dict(best.runner(job.feeds))])
    bound = rounding_bound(best.model)
    cosine = least_cosine(best.model)
    if job.target.precision != "fp32":
        cosine = min(cosine or 1.0, LOW_PRECISION_COSINE)
    for name, change in changes.items():
        if reason := change.violation(bound if cosine is None else None, cosine):
            what = f"the compiled model and model.onnx disagree on output {name!r}"
            raise VerificationError("E-VERIFY", what, where=reason)
    return {
        "compared": True,
        "bound": bound,
        "outputs": {name: {"max_abs": c.largest, "scale": c.scale, "cosine": c.cosine} for name, c in changes.items()},
    }
