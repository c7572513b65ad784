"""TVM's legalization, from Relax operators to loops, with its failures kept until it has ended.

What is raised in the midst of it leaves a builder of TVM's own open, and TVM complains of that on the terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import tvm
from tvm import relax

VIEWS = frozenset(("relax.reshape",))
"""Operators that stay: what only has another shape is not copied."""

Legalizer: TypeAlias = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def legalize(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Every operator that has a form as loops in that form. Raises what the first one did that could not be."""
    errors: list[Exception] = []
    table = {name: _kept(legalizer, errors) for name, legalizer in _legalizers().items()}
    result = relax.transform.LegalizeOps(table, skip_ops=sorted(VIEWS))(module)
    if errors:
        raise errors[0]
    return result


@cache
def _legalizers() -> dict[str, Legalizer]:
    """TVM's own, by operator."""
    names = [name for name in tvm.ir.Op.list_op_names() if name.startswith("relax.") and name not in VIEWS]
    found = {name: tvm.ir.Op.get(name).get_attr("FLegalize") for name in names}
    return {name: legalizer for name, legalizer in found.items() if legalizer is not None}


def _kept(legalizer: Legalizer, errors: list[Any]) -> Legalizer:
    def attempt(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        try:
            return legalizer(builder, call)
        except Exception as error:
            errors.append(error)
            return call

    return attempt
