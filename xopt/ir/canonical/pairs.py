"""Values that are rounded once, where quantizers round them again after each node that only moves them.

    before   x ─▶ Q ─▶ DQ ─▶ Reshape ─▶ Q ─▶ DQ ─▶ Transpose ─▶ Q ─▶ DQ ─▶ y          (all by one scale and zero point)
    after    x ─▶ Reshape ─▶ Transpose ─▶ Q ─▶ DQ ─▶ y
What lies on a grid stays where it is when it is rounded to that grid again, so the first pairs do nothing. The last one
stays where its reader, a product of integers or attention, looks for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from xopt.ir.canonical.report import CanonicalizeReport
from xopt.ir.edit import constant, consumers, input_at, is_op, operand, remove_dead, replace, sweep

MOVING = tuple("Expand Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split())  # noqa: SIM905
_LEVELS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
_LEAST, _MOST = (float(getattr(np.finfo(np.float32), end)) for end in ("tiny", "max"))


def rewrite(model: ir.Model, report: CanonicalizeReport) -> None:
    """Drop every pair that is done again behind it."""
    report.rewrote("repeated-rounding", sweep(model, ("DequantizeLinear",), _drop))
    remove_dead(model)


def _drop(node: ir.Node) -> bool:
    """Let the readers of a pair read what was rounded, when all of them round it again to the same numbers."""
    quantizer = operand(node, 0).producer()
    grid = _grid(node)
    if grid is None or quantizer is None or not is_op(quantizer, "QuantizeLinear") or _grid(quantizer) != grid:
        return False
    source, result = operand(quantizer, 0), node.outputs[0]
    if source.dtype != result.dtype or not _rounded_again(result, grid):
        return False
    return replace(result, source)


def _rounded_again(value: ir.Value, grid: tuple[float, int, str]) -> bool:
    """Whether whatever reads ``value`` moves it and rounds it to ``grid``."""
    pending, seen = [value], {value}
    while pending:
        moved = pending.pop()
        if moved.is_graph_output() or not moved.uses():
            return False
        for reader in consumers(moved):
            if is_op(reader, "QuantizeLinear") and _grid(reader) == grid:
                continue
            if not is_op(reader, *MOVING) or moved in reader.inputs[1:]:
                return False
            pending += [output for output in reader.outputs if output not in seen]
            seen.update(reader.outputs)
    return True


def _grid(node: ir.Node) -> tuple[float, int, str] | None:
    """Scale, zero point and integer type of a node that has one of each, if rounding to them twice is rounding once."""
    scale, given = constant(operand(node, 1)), input_at(node, 2)
    zero = constant(given)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or set(node.attributes) - {"axis"}:
        return None
    if scale.dtype != np.float32 or zero.dtype.name not in _LEVELS:
        return None
    step, middle, (low, high) = float(scale.reshape(())), int(zero.reshape(())), _LEVELS[zero.dtype.name]
    if not _LEAST <= step <= max(middle - low, high - middle) * step <= _MOST:
        return None
    return step, middle, zero.dtype.name
