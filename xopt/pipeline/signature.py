"""What callers know of a model: names, order, types and axes of its inputs and outputs. No pass may change it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from xopt.ir import sized


def signature_change(before: ir.Model, after: ir.Model, *, widened: bool = False) -> str | None:
    """What a caller of ``before`` would trip over in ``after``; None when there is nothing.

    Inputs that have a default (an initializer of the same name) may become constants: nobody has to feed them. An
    output's axis may become better known, unless its size is one of an input's that stays open; and one of an input
    that only one size fits (see ``sized``) may be fixed.

    Args:
        before, after: the models.
        widened: axes of inputs that were fixed may be open.
    """
    reason = _change(before, after, widened)
    told = sized(before) if reason is not None else before
    return reason if told is before else _change(told, after, widened)


def _change(before: ir.Model, after: ir.Model, widened: bool) -> str | None:
    fed = [_fed_inputs(model) for model in (before, after)]
    outputs = list(before.graph.outputs), list(after.graph.outputs)
    for what, (old, new) in (("inputs", fed), ("outputs", outputs)):
        names = [[str(value.name) for value in values] for values in (old, new)]
        if names[0] != names[1]:
            return f"the {what} were {', '.join(names[0])} and are {', '.join(names[1]) or 'none'}"
    symbols = {dim.value for value in fed[0] for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
    for kind, pairs in (("input", zip(*fed)), ("output", zip(*outputs))):
        for old_value, new_value in pairs:
            freed = widened and kind == "input"
            if reason := _value_change(old_value, new_value, symbols if kind == "output" or freed else None):
                return f"{kind} {str(old_value.name)!r} {reason}"
    return None


def _fed_inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _value_change(before: ir.Value, after: ir.Value, open_sizes: set[str | None] | None) -> str | None:
    """How type or axes differ; of an output (``open_sizes`` given) only where it is at odds with what was known."""
    if before.dtype is not None and before.dtype != after.dtype:
        return f"was {before.dtype.name} and is {after.dtype.name if after.dtype is not None else 'of no type'}"
    if before.shape is None or (after.shape is None and open_sizes is not None):
        return None
    old, new = list(before.shape), list(after.shape) if after.shape is not None else None
    if new is None or len(old) != len(new) or any(not _axis_holds(a, b, open_sizes) for a, b in zip(old, new)):
        return f"was {_shown(old)} and is {_shown(new) if new is not None else 'of no shape'}"
    return None


def _axis_holds(before: int | ir.SymbolicDim, after: int | ir.SymbolicDim, open_sizes: set[str | None] | None) -> bool:
    if open_sizes is None:
        unnamed = isinstance(before, ir.SymbolicDim) and before.value is None
        return before == after or (unnamed and isinstance(after, ir.SymbolicDim))
    if isinstance(before, int):
        return before == after or isinstance(after, ir.SymbolicDim)
    return isinstance(after, ir.SymbolicDim) or before.value is None or before.value not in open_sizes


def _shown(shape: Sequence[int | ir.SymbolicDim]) -> str:
    return "[" + ", ".join(str(dim) for dim in shape) + "]"
