"""Everything that was measured as one dict: the content of report.json (docs/cli-json.md)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xopt import files
from xopt.console import SCHEMA, finite
from xopt.errors import InputError
from xopt.measure.accuracy import ARTIFACT
from xopt.report import shape
from xopt.runtime.manifest import read_segments

if TYPE_CHECKING:
    import onnx_ir as ir

    from xopt.search.flow import Outcome
    from xopt.search.job import Job

KIND = "xopt-report"
LARGEST_FILE = 64 << 20
"""Bytes of a report that is read."""


def record(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The report of a finished job, with all raw samples; ``command``, ``output`` and ``verification`` come later."""
    from xopt.measure import machine

    best = outcome.best
    latency = next((step.latency for step in reversed(outcome.steps) if step.candidate is best), None)
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "",
        "model": str(job.path.name if job.path is not None else job.model.graph.name or "model"),
        "target": {
            "name": job.target.name,
            "precision": job.target.precision,
            "runs_here": job.target.can_run(),
            "features": list(job.target.features()),
        },
        "machine": machine.describe(),
        "threads": job.threads,
        "seed": job.seed,
        "feeds": {name: list(array.shape) for name, array in job.feeds.items()},
        "metric": {
            "name": job.metric.name,
            "higher_is_better": job.metric.higher_is_better,
            "baseline": outcome.baseline,
            "max_drop": job.max_drop,
            "samples": outcome.samples,
            "data": job.evaluation.name,
            "synthetic": job.evaluation.synthetic,
            "calibration": {"data": job.calibration.name, "samples": len(job.calibration)},
        },
        "steps": [step.to_dict() for step in outcome.steps],
        "final": {
            "quality": best.quality,
            "judged": best.judged,
            "compiled_quality": best.quality if best.judged == ARTIFACT else None,
            "onnx_quality": _onnx_quality(outcome),
            "drop": best.drop,
            "macs": int(best.cost.macs),
            "bytes": int(best.cost.bytes),
            "parameters": int(best.cost.parameters),
            "latency_ms": None if latency is None else latency.to_dict(),
        },
        "precision": _precision(outcome, job.target.precision),
        "segments": [] if best.artifact is None else read_segments(best.artifact),
        "missing": None if outcome.missing is None else str(outcome.missing),
        "agreement": None if outcome.agreement is None else outcome.agreement.record(),
        "runtimes": {name: times.record() for name, times in outcome.runtimes.items()},
        "skipped": outcome.skipped,
        "structure": {"before": _facts(job.model, job.dims), "after": _facts(best.model, job.dims)},
        "verification": None,
        "output": None,
    }


def _onnx_quality(outcome: Outcome) -> float:
    """The metric of model.onnx in onnxruntime; it is the one that decided where the target does not run here."""
    return outcome.best.quality if outcome.agreement is None else outcome.agreement.onnx_quality


def _precision(outcome: Outcome, name: str) -> dict[str, Any] | None:
    """What the original loses by being compiled, before any lossy pass."""
    if outcome.precision is None:
        return None
    quality, drop = outcome.precision
    return {"name": name, "quality": quality, "drop": drop}


def to_json(report: Mapping[str, Any]) -> str:
    """The text of report.json; numbers that are not finite become null."""
    return json.dumps(finite(report), indent=1) + "\n"


def read(path: Path) -> dict[str, Any]:
    """Read a report.json that is whole; InputError E-FILE or E-FORMAT."""
    data = files.read_bytes(path, "the report", LARGEST_FILE, "name the folder of an optimization")
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("E-FORMAT", "this is not JSON", where=str(path)) from error
    if not isinstance(content, dict) or content.get("kind") != KIND or content.get("schema") != SCHEMA:
        cure = "run xopt optimize again"
        raise InputError("E-FORMAT", f"this is not a report of schema {SCHEMA}", where=str(path), cure=cure)
    if (wrong := shape.fault(content)) is not None:
        cure = "run xopt optimize again"
        raise InputError("E-FORMAT", f"the report is incomplete or altered ({wrong})", where=str(path), cure=cure)
    return content


def _facts(model: ir.Model, dims: Mapping[str, int]) -> dict[str, Any]:
    from xopt import facts, ir

    canonical = model.clone()
    refused = ir.canonicalize(canonical).refused
    return facts.describe(canonical, dims, refused)
