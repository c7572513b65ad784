"""Rows without keys: zeros in ``Attention``, and written out a factor of the result.

    y = (softmax(s + where(keep, 0, -1e30)) @ v) * any(keep)                   ->  a boolean mask ``keep``
    y = (softmax(s + where(seen, m, 0)) @ v) * seen, seen = max(m) > -inf      ->  a mask ``m`` that may be infinite
This is how an exported attention is read back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from xopt.ir.canonical.masks import LOWEST
from xopt.ir.canonical.terms import PlacedTerm
from xopt.ir.edit import attribute, constant, consumers, input_at, is_op, operand, producer, scalar


def hidden_rows(output: ir.Value, terms: Sequence[PlacedTerm]) -> tuple[ir.Value, PlacedTerm] | None:
    """The product ``output`` after its factor, and the one mask of the scores that says the same; None where no factor
    is found to mean that.
    """
    readers = consumers(output)
    if len(readers) != 1 or len(terms) != 1 or output.is_graph_output() or not is_op(readers[0], "Mul"):
        return None
    factor = next((value for value in readers[0].inputs if value is not output), None)
    term = _of_condition(factor, terms[0]) or _of_numbers(factor, terms[0])
    return None if term is None else (readers[0].outputs[0], term)


def _of_condition(factor: ir.Value | None, term: PlacedTerm) -> PlacedTerm | None:
    """The factor is the largest of a condition as a number, which chooses what is added."""
    cast = producer(_largest(factor), "Cast")
    choice = producer(term.value, "Where") if term.kind == "add" else None
    if cast is None or choice is None or choice.inputs[0] is not cast.inputs[0]:
        return None
    lowest = scalar(choice.inputs[2])
    if scalar(choice.inputs[1]) != 0 or lowest is None or lowest * term.factor > LOWEST:
        return None
    return replace(term, kind="keep", value=operand(choice, 0), factor=1.0, finite=False)


def _of_numbers(factor: ir.Value | None, term: PlacedTerm) -> PlacedTerm | None:
    """The factor says whether the largest of the numbers is more than minus infinity; where it is not, 0 is added."""
    cast = producer(factor, "Cast")
    seen = producer(cast.inputs[0], "Greater") if cast is not None else None
    choice = producer(term.value, "Where") if term.kind == "add" else None
    if seen is None or choice is None or choice.inputs[0] is not seen.outputs[0] or scalar(choice.inputs[2]) != 0:
        return None
    if scalar(seen.inputs[1]) != -math.inf or _largest(seen.inputs[0]) is not choice.inputs[1]:
        return None
    return replace(term, value=operand(choice, 1))


def _largest(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the largest of, over the last axis."""
    node = producer(value, "ReduceMax")
    axes = constant(input_at(node, 1)) if node is not None else None
    source = operand(node, 0) if node is not None else None
    if node is None or source is None or source.shape is None or axes is None or not attribute(node, "keepdims", 1):
        return None
    return source if axes.size == 1 and int(axes.item()) in (-1, len(source.shape) - 1) else None
