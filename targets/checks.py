"""What only run time can tell: sizes that have to agree, and indices that have to lie inside what they index.

    main:   assert sizes            conditions on the dimensions of the inputs, before any tensor is made
            ...                     indices are clamped where they are used; how many were outside is counted
            assert counts are 0     no result leaves a run that used an index outside

A failed assertion ends the run with an error in the calling thread, and the session stays usable. Assertions are code
of the host, whatever the target: a device only counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax, tirx
from tvm.tirx.analysis import undefined_vars
from tvm.tirx.script.builder import ir as T

from xopt.errors import InputError
from xopt.kernels.emit import PrimFunc, argument, i64, prim_func, put
from xopt.runtime.session import REFUSAL

if TYPE_CHECKING:
    from xopt.targets.base import Target

Condition = tuple[Any, str]
"""A comparison of integers, and what is wrong when it does not hold."""


def check_sizes(
    builder: relax.BlockBuilder, requirements: Mapping[str, Sequence[Any]], inputs: Sequence[relax.Var], target: Target
) -> list[relax.BindingBlock]:
    """What goes before everything else, so that the dimensions of the inputs fulfil what is required of them.

    Args:
        builder: of the module.
        requirements: conditions by what is wrong when one does not hold.
        inputs: the tensors whose dimensions are known at the start of a run.
        target: where the model runs.

    Raises:
        InputError: E-UNSUPPORTED-OP, a condition depends on a size that only the data decides.
    """
    conditions = [(condition, otherwise) for otherwise, found in requirements.items() for condition in found]
    if not conditions:
        return []
    given = {dim.name for tensor in inputs for dim in tensor.ty.shape if isinstance(dim, tirx.Var)}
    used: dict[str, tirx.Var] = {}
    for condition, otherwise in conditions:
        found = {variable.name: variable for variable in undefined_vars(condition)}
        if not found.keys() <= given:
            raise InputError("E-UNSUPPORTED-OP", f"a size that the data decides cannot be checked: {otherwise}")
        used |= found
    numbers = [used[name] for name in sorted(used)]
    name = _unused(builder, "check_sizes")
    builder.add_func(_assertion(name, numbers, conditions, target), name)
    return [relax.BindingBlock([relax.VarBinding(relax.Var("sizes", _NOTHING), _call(name, numbers))])]


def check_indices(builder: relax.BlockBuilder, counts: Sequence[tuple[relax.Var, str]], target: Target) -> None:
    """Emit what goes behind everything else: no count of indices outside (int64 [1]) may differ from 0.

    Args:
        builder: of the module, in the function.
        counts: each with what is wrong when it is not 0.
        target: where the model runs.
    """
    if not counts:
        return
    numbers = [tirx.Var(f"outside{position}", "int64") for position in range(len(counts))]
    for (count, _), number in zip(counts, numbers):
        builder.match_cast(builder.emit(relax.op.tensor_to_shape(count)), relax.ShapeType([number]))
    conditions = [(number == 0, otherwise) for number, (_, otherwise) in zip(numbers, counts)]
    name = _unused(builder, "check_indices")
    builder.add_func(_assertion(name, numbers, conditions, target), name)
    builder.emit(_call(name, numbers))


def check_now(name: str, numbers: Sequence[tirx.Var], condition: Condition) -> PrimFunc:
    """A kernel over int64 numbers that asserts a condition before what comes behind it, and writes a 0."""
    test, otherwise = condition

    def body() -> None:
        for variable in numbers:
            T.arg(variable.name, variable)
        done = argument("done", (1,), "int64")
        with T.Assert(test, [REFUSAL + otherwise], "ValueError"):
            T.evaluate(i64(0))
        put(done, i64(0), 0)

    return prim_func(name, body)


_NOTHING = relax.TupleType([])


def _unused(builder: relax.BlockBuilder, name: str) -> str:
    """A name for one more function of the module."""
    taken = {variable.name_hint for variable in builder.get().functions}
    return next(found for number in itertools.count() if (found := f"{name}_{number}" if number else name) not in taken)


def _call(name: str, numbers: Sequence[tirx.Var]) -> relax.Call:
    """The call of an assertion: impure, so that no pass takes it for superfluous."""
    return relax.Call(relax.ExternFunc(name), list(numbers), ty_args=[_NOTHING])


def _assertion(name: str, numbers: Sequence[tirx.Var], conditions: Sequence[Condition], target: Target) -> PrimFunc:
    """A host function over int64 numbers that asserts conditions on them, in order."""

    def body() -> None:
        for variable in numbers:
            T.arg(variable.name, variable)
        for condition, otherwise in conditions:
            with T.Assert(condition, [REFUSAL + otherwise], "ValueError"):
                T.evaluate(i64(0))
        T.evaluate(i64(0))

    function = prim_func(name, body).with_attr("global_symbol", name).with_attr("xopt.kernel", True)
    host = target.host()
    return function if host is None else function.with_attr("target", host)
