"""What happens to a model of the zoo: blocks that are found, the compiled artifact beside onnxruntime, each pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from xopt import targets
from xopt.data.dataset import Dataset
from xopt.errors import InputError
from xopt.facts import left_out
from xopt.ir.canonical import CanonicalizeReport, canonicalize
from xopt.ir.structure import transformer_blocks
from xopt.pipeline import registry
from xopt.pipeline.context import PassContext
from xopt.pipeline.manager import PassManager
from xopt.pipeline.verify import VerifyEach
from xopt.runtime.reference import ReferenceSession
from xopt.runtime.session import Session

from .entry import Entry
from .exporting import TRACED, Way, exported, load

Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]

SIZES = ((2, 7), (1, 5), (3, 12), (4, 1))
"""(batch, sequence) that dynamic exports are compared at."""
CALIBRATED = (8, 7)
"""(batch, sequence) of the samples that passes look at."""
COMPILED = 1e-5
"""Of the largest output: two blocks of float32 sums in another order, and exp, tanh and erf by polynomials."""
OPTIONS: dict[str, dict[str, Any]] = {"prune-heads": {"keep": 0.5, "ffn": True}, "merge-tokens": {"ratio": 0.2}}
"""Of passes, where they are not the default."""
PASSES = tuple(name for name in registry.BUILT_IN if name not in ("canonicalize", "free-batch"))
"""All but the one that every model has been through, and the one for fixed batches."""


def canonical(entry: Entry, way: Way) -> tuple[ir.Model, CanonicalizeReport]:
    """The model in canonical form, and what was done for that."""
    model = load(exported(entry, way))
    return model, canonicalize(model)


def counts(model: ir.Model) -> tuple[int, int]:
    """Attention blocks and feed-forward networks."""
    attentions = sum(node.op_type == "Attention" and not node.domain for node in model.graph)
    return attentions, sum(block.ffn is not None for block in transformer_blocks(model))


def named(model: ir.Model, report: CanonicalizeReport) -> set[str]:
    """The reasons why something is in no block."""
    return {place["reason"] for place in left_out(model, report.refused)}


def feeds_of(entry: Entry, model: ir.Model, batch: int, seq: int) -> dict[str, np.ndarray]:
    """Random inputs; masks have padding on both sides."""
    taken = {value.name for value in model.graph.inputs}
    return {
        name: with_padding(tensor.numpy()) if "mask" in name else tensor.numpy()
        for name, tensor in zip(entry.inputs, entry.feeds(batch, seq), strict=True)
        if name in taken
    }


def with_padding(mask: np.ndarray) -> np.ndarray:
    """Padding on the left of the last sample as well: with a causal mask its first queries see no key."""
    mask = mask.copy()
    mask[-1, : mask.shape[1] // 2] = 0
    return mask


def sizes(entry: Entry, way: Way) -> tuple[tuple[int, int], ...]:
    """(batch, sequence) that this export of the model is compared at."""
    if not way.dynamic:
        return (TRACED,)
    if entry.name == "llama" and way.opset >= 23:
        # its RotaryEmbedding has tables [1, S, d/2]: onnxruntime wants [B, S, d/2]
        return tuple(size for size in SIZES if size[0] == 1)
    return SIZES


def onnxruntime_of(data: bytes) -> Callable[[Feeds], Outputs]:
    """An ONNX file in onnxruntime, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds))))


def compiled(model: ir.Model, folder: Path) -> Callable[[Feeds], Outputs]:
    """A canonical model as an artifact for this CPU."""
    return Session.load(targets.compile(model, "cpu", folder / "model.so")).run


def difference(got: Outputs, want: Outputs) -> float:
    """Largest difference as a share of the largest output, or of 1; infinite where a shape or type is another one.

    What is NaN in ``want`` (attention to nothing, filled with infinities) may be anything.
    """
    worst = 0.0
    for name, expected in want.items():
        actual = got[name]
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return float("inf")
        known = ~np.isnan(expected) if expected.dtype.kind == "f" else np.ones(expected.shape, bool)
        if not known.any():
            continue
        wanted = expected[known].astype(np.float64)
        apart = np.abs(actual[known].astype(np.float64) - wanted).max()
        worst = max(worst, float(apart / max(1.0, np.abs(wanted).max())))
    return worst if np.isfinite(worst) else float("inf")


def outcome(name: str, entry: Entry, model: ir.Model) -> tuple[str, str]:
    """What a pass does to a copy of the canonical model, verified: "rewritten", "refused" or "nothing", and where.

    Raises:
        XoptError: the pass, or its verification, failed.
    """
    axes = {dim.value for value in model.graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
    dims = {axis: size for axis, size in zip(("batch", "seq"), TRACED, strict=True) if axis in axes}
    manager = PassManager([registry.get(name)(**OPTIONS.get(name, {}))], instruments=[VerifyEach()])
    copy = model.clone()
    try:
        data = Dataset(feeds_of(entry, model, *CALIBRATED)).matched(model)
        (step,) = manager.run(copy, PassContext(calibration=data, dims=dims, tile=8))
    except InputError as error:
        return "refused", f"{error.code}: {error.what}"
    assert all(refusal.reason and refusal.what for refusal in step.report.refused)
    reasons = Counter(f"{refusal.reason} at {refusal.what}" for refusal in step.report.refused)
    if not step.report.rewritten:
        return ("refused" if reasons else "nothing"), "; ".join(reasons)
    ran = ReferenceSession(copy, threads=1)
    assert set(ran.outputs) == {value.name for value in model.graph.outputs}
    return "rewritten", f"{step.report.rewritten}" + "".join(f"; {reason}" for reason in reasons)
