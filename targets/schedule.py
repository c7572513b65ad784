"""Schedules for the loop nests that are not our kernels: parallel over the outer loops, contiguous elements innermost.

TVM's default for CPUs leaves every generated function a scalar loop nest on one thread. Here each function is

    inlined          a pointwise step that one other step reads is computed inside it
    pointwise        outer loops fused and parallel; the last loop in vectors where its length is a multiple of them
    reduction        outer loops parallel, the last spatial axis innermost, so that sums run over vectors

Loops that are too short to pay for a fork stay on one thread. A function of another form (sorts, scans) is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import Call, TensorLoad
from tvm.ir.prim.expr import Select

from xopt.kernels.emit import TASKS

LANES = 16
"""Elements in a vectorized loop: one AVX-512 register of float32, or several narrower ones."""

SMALLEST = 1 << 13
"""Elements below which starting threads costs more than it saves (a fork takes about a microsecond)."""

LARGEST = 256
"""Elements that the code of a step may read for the step to be computed inside another."""

EXPANDED = frozenset(f"tirx.{name}" for name in ("tanh", "tan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf"))
"""Functions that TVM writes out as expressions of their argument, ..."""

COPIES = 16
"""... which these hold about so many times."""

BRANCHES = 4
"""How much longer TVM's simplifier takes over a choice in another: it looks at all of them under each condition."""

_OPERANDS = ("a", "b", "value", "condition", "true_value", "false_value")

FORK = 64
"""Parallel iterations that keep every thread busy; with fewer, the inner loop is divided as well."""


def schedule_leftovers(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Schedule every PrimFunc that is not marked as one of our kernels."""
    result = tvm.IRModule(module.functions, attrs=module.attrs)
    for variable, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and not function.attrs.get("xopt.kernel", False):
            result[variable] = divided(unscoped(scheduled(function)))
    return result


def unscoped(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Without the pragma by which TVM's scatters group statements: its code generator warns of it."""

    def rule(part: Any) -> Any:
        is_scope = isinstance(part, tirx.AttrStmt) and part.attr_key == "pragma_scope"
        return _rewritten(part.body, rule) if is_scope else None

    return function.with_body(_rewritten(function.body, rule))


def divided(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """With parallel loops in tasks of nearly the same length, as `xopt.kernels.emit.parallel` makes them."""

    def rule(part: Any) -> Any:
        return _in_tasks(part) if isinstance(part, tirx.For) and part.kind == tirx.ForKind.PARALLEL else None

    return function.with_body(_rewritten(function.body, rule))


def _in_tasks(loop: Any) -> Any:
    dtype = loop.extent.ty.dtype
    tasks, task = tirx.const(TASKS, dtype), tirx.Var("task", dtype)
    first, end = (tirx.floordiv(index * loop.extent, tasks) for index in (task, task + 1))
    inner = tirx.For(loop.loop_var, first, end - first, tirx.ForKind.SERIAL, loop.body)
    return tirx.For(task, tirx.const(0, dtype), tasks, tirx.ForKind.PARALLEL, inner)


def _rewritten(part: Any, rule: Callable[[Any], Any]) -> Any:
    """The statements of a function, down to those of its blocks, with what the rule makes of those it knows."""
    if (replaced := rule(part)) is not None:
        return replaced
    match part:
        case tirx.SeqStmt():
            return tirx.SeqStmt([_rewritten(statement, rule) for statement in part.seq])
        case s_tir.SBlockRealize():
            return s_tir.SBlockRealize(part.iter_values, part.predicate, _rewritten(part.block, rule), part.span)
        case s_tir.SBlock():
            regions = (part.iter_vars, part.reads, part.writes, part.name_hint)
            rest = (part.init, part.alloc_buffers, part.match_buffers, part.annotations, part.span)
            return s_tir.SBlock(*regions, _rewritten(part.body, rule), *rest)
    return part


def scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with its loops scheduled; itself when it has a form that this cannot schedule."""
    schedule = s_tir.Schedule(function)
    try:
        _inline(schedule)
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            _schedule_block(schedule, block)
    except (s_tir.ScheduleError, tvm.error.InternalError, ValueError):
        return function
    return schedule.mod["main"].with_attrs(dict(function.attrs)) if function.attrs else schedule.mod["main"]


def _inline(schedule: s_tir.Schedule) -> None:
    """Compute pointwise steps inside their only reader, while the expression that this makes stays of a size.

    A step that reads its operand twice doubles what is inlined into it: 30 of them in a row would read it 2**30 times.
    """
    sizes: dict[Any, int] = {}
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        if not _is_pointwise(schedule, block) or len(schedule.get_consumers(block)) != 1:
            continue
        store = schedule.get(block).body
        if not isinstance(store, tirx.BufferStore) or (size := _reads(store.value, sizes)) > LARGEST:
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            continue
        sizes[store.buffer] = size


def _reads(expression: Any, sizes: Mapping[Any, int]) -> int:
    """How many elements the code of an expression reads.

    Args:
        expression: what a step stores.
        sizes: the same for each buffer whose step is inlined.
    """
    total, pending = 0, [(expression, 1)]
    while pending:
        part, times = pending.pop()
        if isinstance(part, TensorLoad):
            total += times * sizes.get(part.source, 1)
        elif isinstance(part, Call) and getattr(part.op, "name", "") in EXPANDED:
            times *= COPIES
        elif isinstance(part, Select):
            times *= BRANCHES
        pending += [(operand, times) for operand in _operands(part)]
    return total


def _operands(part: Any) -> list[Any]:
    fields = [getattr(part, name, None) for name in _OPERANDS]
    lists = [getattr(part, name, ()) for name in ("args", "indices")]
    return [field for field in fields if field is not None] + [item for items in lists for item in items]


def _kinds(schedule: s_tir.Schedule, block: Any) -> list[int]:
    return [int(variable.iter_type) for variable in schedule.get(block).iter_vars]


def _is_pointwise(schedule: s_tir.Schedule, block: Any) -> bool:
    return all(kind == tirx.IterVar.DataPar for kind in _kinds(schedule, block))


def _extent(schedule: s_tir.Schedule, loop: Any) -> int | None:
    extent = schedule.get(loop).extent
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None


def _schedule_block(schedule: s_tir.Schedule, block: Any) -> None:
    loops, kinds = schedule.get_loops(block), _kinds(schedule, block)
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == tirx.IterVar.DataPar]
    reduced = [loop for loop, kind in zip(loops, kinds) if kind == tirx.IterVar.CommReduce]
    if not loops or len(loops) != len(kinds) or len(spatial) + len(reduced) != len(loops):
        return
    work = prod(_extent(schedule, loop) or SMALLEST for loop in loops)
    if reduced and not (spatial and _reads_along(schedule, block, kinds)):
        _parallel(schedule, spatial, work)
        if any(_extent(schedule, loop) is None for loop in reduced):  # there may be nothing to begin a sum with
            schedule.decompose_reduction(block, reduced[0])
        return
    inner = spatial.pop()
    if reduced:
        schedule.reorder(*spatial, *reduced, inner)
    length = _extent(schedule, inner)
    if length is not None and length % LANES == 0:
        chunk, inner = schedule.split(inner, [None, LANES])
        schedule.vectorize(inner)
        if reduced or prod(_extent(schedule, loop) or FORK for loop in spatial) < FORK:
            schedule.reorder(*spatial, chunk, *reduced, inner)
            spatial.append(chunk)
    _parallel(schedule, spatial, work)
    if reduced:
        schedule.decompose_reduction(block, reduced[0])


def _reads_along(schedule: s_tir.Schedule, block: Any, kinds: list[int]) -> bool:
    """Whether the last spatial axis runs over contiguous elements of something that the block reads."""
    content = schedule.get(block)
    last = [v.var for v, kind in zip(content.iter_vars, kinds) if kind == tirx.IterVar.DataPar][-1]
    return any(len(read.region) and last.same_as(read.region[-1].min) for read in content.reads)


def _parallel(schedule: s_tir.Schedule, loops: list[Any], work: int) -> None:
    if loops and work >= SMALLEST:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])
